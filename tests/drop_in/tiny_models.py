"""Models of transformers with multi-scale deformable attention, small and with random weights, and an input of each."""

from typing import Any

import torch
import transformers
from torch import nn

LABELS = [
    {"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.5, 0.4]])},
    {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.6]])},
]

# transformers 5.0 and older have one by default
NO_TIMM_BACKBONE = {"backbone": None, "use_timm_backbone": False, "use_pretrained_backbone": False}


def resnet(config_class: Any) -> Any:
    return config_class(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def rt_detr_like() -> dict[str, Any]:
    return {
        "backbone_config": resnet(transformers.RTDetrResNetConfig),
        "encoder_hidden_dim": 16,
        "encoder_in_channels": [8, 16, 16],
        "encoder_ffn_dim": 16,
        "encoder_attention_heads": 2,
        "d_model": 16,
        "num_queries": 8,
        "decoder_in_channels": [16, 16, 16],
        "decoder_ffn_dim": 16,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "num_denoising": 0,
        "num_labels": 3,
    }


def lw_detr_like() -> dict[str, Any]:
    return {
        "d_model": 16,
        "num_queries": 8,
        "group_detr": 2,
        "decoder_ffn_dim": 16,
        "decoder_layers": 2,
        "decoder_self_attention_heads": 2,
        "decoder_cross_attention_heads": 2,
        "decoder_n_points": 2,
        "c2f_num_blocks": 1,
        "num_labels": 3,
    }


def images() -> dict[str, Any]:
    return {"pixel_values": torch.rand(2, 3, 64, 64)}


def images_and_labels() -> dict[str, Any]:
    return {**images(), "labels": LABELS}


def images_and_words() -> dict[str, Any]:
    return {**images(), "input_ids": torch.tensor([[2, 5, 3], [2, 6, 3]])}


def deformable_detr() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.DeformableDetrConfig(
        **NO_TIMM_BACKBONE,
        backbone_config=resnet(transformers.ResNetConfig),
        d_model=32,
        num_queries=8,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_labels=3,
        dropout=0.0,
    )
    return transformers.DeformableDetrForObjectDetection(config), images_and_labels()


def deformable_detr_two_stage() -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = deformable_detr()
    refined = {"two_stage": True, "with_box_refine": True, "two_stage_num_proposals": 8}
    return type(model)(type(model.config)(**model.config.to_dict() | refined)), inputs


def rt_detr() -> tuple[nn.Module, dict[str, Any]]:
    return transformers.RTDetrForObjectDetection(transformers.RTDetrConfig(**rt_detr_like())), images_and_labels()


def rt_detr_v2() -> tuple[nn.Module, dict[str, Any]]:
    return transformers.RTDetrV2ForObjectDetection(transformers.RTDetrV2Config(**rt_detr_like())), images_and_labels()


def rt_detr_v2_discrete() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.RTDetrV2Config(**rt_detr_like(), decoder_method="discrete")
    return transformers.RTDetrV2ForObjectDetection(config), images_and_labels()


def d_fine() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.DFineConfig(**rt_detr_like(), decoder_n_points=[2, 4, 2])
    return transformers.DFineForObjectDetection(config), images_and_labels()


def deimv2() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.Deimv2Config(**rt_detr_like(), decoder_n_points=[2, 4, 2])
    return transformers.Deimv2ForObjectDetection(config), images_and_labels()


def pp_doclayout_v2() -> tuple[nn.Module, dict[str, Any]]:
    return transformers.PPDocLayoutV2Model(transformers.PPDocLayoutV2Config(**rt_detr_like())), images()


def pp_doclayout_v3() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.PPDocLayoutV3Config(**rt_detr_like(), x4_feat_dim=8, mask_feature_channels=[8, 8])
    config.backbone_config.out_features = ["stage1", "stage2", "stage3", "stage4"]
    return transformers.PPDocLayoutV3ForObjectDetection(config), images()


def pp_doclayout_v4() -> tuple[nn.Module, dict[str, Any]]:
    return transformers.PPDocLayoutV4ForObjectDetection(transformers.PPDocLayoutV4Config(**rt_detr_like())), images()


def lw_detr() -> tuple[nn.Module, dict[str, Any]]:
    backbone = transformers.LwDetrViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        pretrain_image_size=64,
        patch_size=8,
        num_windows=4,
        out_indices=[1, 2],
    )
    config = transformers.LwDetrConfig(backbone_config=backbone, projector_scale_factors=[2.0, 0.5], **lw_detr_like())
    return transformers.LwDetrForObjectDetection(config), images_and_labels()


def rf_detr() -> tuple[nn.Module, dict[str, Any]]:
    backbone = transformers.RfDetrDinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        num_windows=2,
        out_indices=[1, 2],
    )
    config = transformers.RfDetrConfig(backbone_config=backbone, **lw_detr_like(), dropout=0.0)
    return transformers.RfDetrForObjectDetection(config), images_and_labels()


def swin(*stages: str) -> Any:
    return transformers.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=2,
        out_features=list(stages),
        drop_path_rate=0.0,
    )


def mask2former() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.Mask2FormerConfig(
        backbone_config=swin("stage1", "stage2", "stage3", "stage4"),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=8,
        num_labels=3,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config), images()


def oneformer() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.OneFormerConfig(
        backbone_config=swin("stage1", "stage2", "stage3", "stage4"),
        hidden_dim=32,
        mask_dim=32,
        conv_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        query_dec_layers=1,
        num_attention_heads=2,
        num_queries=8,
        num_labels=3,
        is_training=False,
        text_encoder_width=32,
        text_encoder_num_layers=1,
        text_encoder_context_length=7,
        text_encoder_vocab_size=11,
        task_seq_len=7,
    )
    task = torch.ones(2, 7, dtype=torch.long)
    return transformers.OneFormerForUniversalSegmentation(config), {**images(), "task_inputs": task}


def grounding() -> dict[str, Any]:
    return {
        "backbone_config": swin("stage2", "stage3", "stage4"),
        "text_config": transformers.BertConfig(
            vocab_size=11,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        "num_queries": 8,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "dropout": 0.0,
        "fusion_dropout": 0.0,
        "fusion_droppath": 0.0,
        "max_text_len": 8,
    }


def grounding_dino() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.GroundingDinoConfig(**grounding())
    return transformers.GroundingDinoForObjectDetection(config), images_and_words()


def mm_grounding_dino() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.MMGroundingDinoConfig(**grounding())
    return transformers.MMGroundingDinoForObjectDetection(config), images_and_words()


def omdet_turbo() -> tuple[nn.Module, dict[str, Any]]:
    text = transformers.CLIPTextConfig(
        vocab_size=11,
        hidden_size=24,
        intermediate_size=16,
        projection_dim=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    config = transformers.OmDetTurboConfig(
        **NO_TIMM_BACKBONE,
        text_config=text,
        backbone_config=swin("stage2", "stage3", "stage4"),
        apply_layernorm_after_vision_backbone=False,
        image_size=64,
        text_projection_in_dim=24,
        text_projection_out_dim=24,
        task_encoder_hidden_dim=24,
        class_embed_dim=24,
        num_queries=8,
        encoder_hidden_dim=16,
        vision_features_channels=[16, 16, 16],
        encoder_in_channels=[16, 32, 64],
        encoder_attention_heads=2,
        encoder_dim_feedforward=16,
        decoder_hidden_dim=16,
        decoder_num_heads=2,
        decoder_num_layers=2,
        decoder_dim_feedforward=16,
    )
    words = torch.tensor([[1, 5, 10], [1, 6, 10]])
    inputs = {
        **images(),
        "classes_input_ids": words,
        "classes_attention_mask": torch.ones_like(words),
        "classes_structure": torch.tensor([1, 1]),
        "tasks_input_ids": words,
        "tasks_attention_mask": torch.ones_like(words),
    }
    return transformers.OmDetTurboForObjectDetection(config), inputs


MODELS = (
    deformable_detr,
    deformable_detr_two_stage,
    rt_detr,
    rt_detr_v2,
    rt_detr_v2_discrete,
    d_fine,
    deimv2,
    pp_doclayout_v2,
    pp_doclayout_v3,
    pp_doclayout_v4,
    lw_detr,
    rf_detr,
    mask2former,
    oneformer,
    grounding_dino,
    mm_grounding_dino,
    omdet_turbo,
)

# These make constants in float32 whatever their own dtype.
IN_FLOAT32 = (
    deformable_detr,
    deformable_detr_two_stage,
    rt_detr,
    rt_detr_v2,
    rt_detr_v2_discrete,
    d_fine,
    deimv2,
    omdet_turbo,
)
