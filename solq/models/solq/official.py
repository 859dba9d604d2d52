"""Official SOLQ checkpoints: their architecture, and the names of their tensors."""

import argparse
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from solq.detections import ModelMeta, coco_class_names
from solq.models.backbones import Backbone
from solq.models.published import PublishedTensors
from solq.models.solq.config import SOLQConfig

# Settings in an official file that the sizes of tensors do not tell, and the values that this model has.
REQUIRED_SETTINGS = {"activation": "relu", "position_embedding": "sine", "dilation": False}


def recognizes(weights: Mapping[str, Tensor]) -> bool:
    """Tell whether these are the weights of an official SOLQ or Deformable DETR checkpoint."""
    return "transformer.level_embed" in weights


def official_names(key: str, config: SOLQConfig) -> list[str]:
    """Name a tensor of this model as in an official file: several names where a module is held several times.

    Swin transformers are named as in Microsoft's repository, where the step to a coarser stage ends the stage before.
    """
    if key.startswith("masks.vector_embed."):
        rest = key.removeprefix("masks.vector_embed.")
        return [f"vector_embed.{layer}.{rest}" for layer in range(config.decoder_layers + config.two_stage)]
    if key.startswith("bbox_embed.") or (key.startswith("class_embed.") and config.two_stage):
        return [key, f"transformer.decoder.{key}"]
    if not key.startswith("backbone."):
        return [key]
    name = key.replace("backbone.", "backbone.0.", 1)
    if downsample := re.match(r"(.*body\.)layers_(\d)(\.downsample\..*)", name):
        before, stage, after = downsample.groups()
        return [f"{before}layers.{int(stage) - 1}{after}"]
    name = re.sub(r"\.norms\.(\d)\.", lambda match: f".body.norm{int(match[1]) + 1}.", name)
    return [re.sub(r"body\.layers_(\d)", r"body.layers.\1", name)]


def infer_meta(config: SOLQConfig) -> ModelMeta:
    """Return the classes and the evaluation size of an official checkpoint with this architecture."""
    meta = ModelMeta()
    if config.num_classes == 91:
        meta.class_names, meta.category_ids = coco_class_names(), list(range(91))
    if config.backbone.startswith("swin"):
        meta.eval_scale, meta.max_size = 1088, 1536
    return meta


def infer_config(weights: Mapping[str, Tensor], settings: Any = None) -> SOLQConfig:
    """Infer the architecture of an official checkpoint from the names and sizes of its tensors.

    What they do not tell is taken from the settings in the file, and else as published: 8 heads, masks coded at
    128×128, 300 queries of a two-stage model.

    Args:
        weights: by their official names.
        settings: the file's `args`, an object or a dict, if it has them.

    Raises:
        ValueError: if a tensor is missing, or the checkpoint is of an architecture that this model does not have.
    """

    tensors = PublishedTensors(weights, "an official SOLQ")
    shape, count = tensors.shape, tensors.count
    if isinstance(settings, Mapping):
        settings = argparse.Namespace(**settings)
    for name, value in REQUIRED_SETTINGS.items():
        if getattr(settings, name, value) != value:
            raise ValueError(f"it was trained with {name} {getattr(settings, name)!r}, must be {value!r}")
    num_levels, width = shape("transformer.level_embed")
    num_heads = getattr(settings, "nheads", 8)
    sampled = shape("transformer.decoder.layers.0.cross_attn.attention_weights.bias")[0]
    two_stage = "transformer.enc_output.weight" in weights
    with_masks = "vector_embed.0.layers.0.weight" in weights
    return SOLQConfig(
        backbone=_infer_backbone(tensors),
        num_classes=shape("class_embed.0.bias")[0],
        width=width,
        num_heads=num_heads,
        encoder_layers=count(r"transformer\.encoder\.layers\.(\d+)\."),
        decoder_layers=count(r"transformer\.decoder\.layers\.(\d+)\."),
        feedforward=shape("transformer.decoder.layers.0.linear1.bias")[0],
        num_queries=getattr(settings, "num_queries", 300) if two_stage else shape("query_embed.weight")[0],
        num_levels=num_levels,
        num_points=sampled // (num_heads * num_levels),
        two_stage=two_stage,
        mask_branch="unified" if with_masks else "none",
        num_coefficients=shape("vector_embed.0.layers.2.bias")[0] if with_masks else None,
        mask_size=getattr(settings, "gt_mask_len", 128) if with_masks else None,
        vector_hidden=shape("vector_embed.0.layers.0.bias")[0] if with_masks else 1024,
    )


def _infer_backbone(tensors: PublishedTensors) -> Backbone:
    """Tell the backbone by the width of its first layer and the number of blocks in its third stage."""
    known: dict[tuple[int, int], Backbone]
    if (stem := tensors.weights.get("backbone.0.body.conv1.weight")) is not None:
        blocks = tensors.count(r"backbone\.0\.body\.layer3\.(\d+)\.")
        known = {(64, 6): "resnet50", (64, 23): "resnet101"}
    elif (stem := tensors.weights.get("backbone.0.body.patch_embed.proj.weight")) is not None:
        blocks = tensors.count(r"backbone\.0\.body\.layers\.2\.blocks\.(\d+)\.")
        known = {(96, 6): "swin-t", (96, 18): "swin-s", (128, 18): "swin-b", (192, 18): "swin-l"}
    else:
        raise ValueError("its backbone is neither a ResNet nor a Swin transformer")
    if (len(stem), blocks) not in known:
        raise ValueError(
            f"its backbone has {len(stem)} channels at first and {blocks} blocks in the third stage, "
            f"must be one of {', '.join(f'{name} {sizes}' for sizes, name in known.items())}"
        )
    return known[len(stem), blocks]
