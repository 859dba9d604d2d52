"""Published checkpoints: recognized, named and read, with COCO's classes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from queryinst_cases import images
from torch import Tensor

import solq
from solq.models import MODELS
from solq.models.queryinst.config import QueryInstConfig
from solq.models.queryinst.model import QueryInst
from solq.models.queryinst.official import infer_config, infer_meta, official_names, recognizes

SHAPES = {  # of some tensors of the published file with ResNet-50 and 100 queries
    "backbone.layer4.2.bn3.num_batches_tracked": [],
    "neck.lateral_convs.3.conv.weight": [256, 2048, 1, 1],
    "neck.fpn_convs.0.conv.bias": [256],
    "rpn_head.init_proposal_bboxes.weight": [100, 4],
    "rpn_head.init_proposal_features.weight": [100, 256],
    "roi_head.bbox_head.5.fc_cls.weight": [80, 256],
    "roi_head.bbox_head.5.fc_reg.bias": [4],
    "roi_head.bbox_head.0.attention.attn.in_proj_weight": [768, 256],
    "roi_head.bbox_head.0.attention.attn.out_proj.bias": [256],
    "roi_head.bbox_head.0.attention_norm.weight": [256],
    "roi_head.bbox_head.0.instance_interactive_conv.dynamic_layer.weight": [32768, 256],
    "roi_head.bbox_head.0.instance_interactive_conv.norm_in.bias": [64],
    "roi_head.bbox_head.0.instance_interactive_conv.fc_layer.weight": [256, 12544],
    "roi_head.bbox_head.0.instance_interactive_conv.fc_norm.bias": [256],
    "roi_head.bbox_head.0.instance_interactive_conv_norm.weight": [256],
    "roi_head.bbox_head.0.ffn.layers.0.0.weight": [2048, 256],
    "roi_head.bbox_head.0.ffn.layers.1.weight": [256, 2048],
    "roi_head.bbox_head.0.ffn_norm.weight": [256],
    "roi_head.bbox_head.0.cls_fcs.1.bias": [256],
    "roi_head.bbox_head.0.reg_fcs.6.weight": [256, 256],
    "roi_head.mask_head.0.convs.3.conv.weight": [256, 256, 3, 3],
    "roi_head.mask_head.0.convs.3.bn.running_var": [256],
    "roi_head.mask_head.0.upsample.weight": [256, 256, 2, 2],
    "roi_head.mask_head.0.conv_logits.weight": [80, 256, 1, 1],
    "roi_head.mask_head.0.instance_interactive_conv.dynamic_layer.bias": [32768],
    "roi_head.mask_head.0.instance_interactive_conv.norm_out.weight": [256],
}


def published(model: QueryInst) -> dict[str, Tensor]:
    return {official_names(key, model.config)[0]: value for key, value in model.state_dict().items()}


def on_meta(**settings: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        return published(QueryInst(QueryInstConfig(**settings)))


@pytest.mark.parametrize(
    ("settings", "keys", "parameters"),
    [
        ({}, 780, 172_688_808),
        ({"num_queries": 300}, 780, 172_740_808),
        ({"backbone": "resnet101"}, 1086, 191_680_936),
        ({"backbone": "resnet101", "num_queries": 300}, 1086, 191_732_936),
    ],
)
def test_published_models(settings: dict[str, Any], keys: int, parameters: int) -> None:
    """The five rows of the model card have four architectures."""
    weights = on_meta(**settings)
    assert len(weights) == keys
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert sum(value.numel() for key, value in weights.items() if not key.endswith(buffers)) == parameters
    assert recognizes(weights)
    assert infer_config(weights) == QueryInstConfig(**settings)
    if not settings:
        assert {key: list(weights[key].shape) for key in SHAPES} == SHAPES


def test_solq_is_not_taken_for_it() -> None:
    weights = on_meta()
    assert [name for name, family in MODELS.items() if family.official.recognizes(weights)] == ["queryinst"]
    assert not recognizes({"transformer.level_embed": torch.empty(4, 384)})


def test_labels_are_cocos_80_categories_in_the_order_of_their_ids() -> None:
    meta = infer_meta(QueryInstConfig())
    assert len(meta.class_names) == len(meta.category_ids) == 80
    assert (meta.class_names[0], meta.category_ids[0]) == ("person", 1)
    assert (meta.class_names[11], meta.category_ids[11]) == ("stop sign", 13)  # no category has the id 12
    assert (meta.class_names[79], meta.category_ids[79]) == ("toothbrush", 90)
    assert (meta.eval_scale, meta.max_size) == (800, 1333)
    assert infer_meta(QueryInstConfig(num_classes=3)).class_names == []


@pytest.fixture(scope="module")
def small() -> QueryInst:
    torch.manual_seed(0)
    return QueryInst(
        QueryInstConfig(num_classes=7, num_queries=9, num_stages=2, width=64, feedforward=32, dynamic_width=8)
    ).eval()


def write(path: Path, weights: Mapping[str, Tensor], **entries: Any) -> Path:
    torch.save({"meta": {"CLASSES": ("a",) * 7, "epoch": 36}, "state_dict": dict(weights)} | entries, path)
    return path


def test_a_file_comes_back(small: QueryInst, tmp_path: Path) -> None:
    """As the published ones are: the weights beside facts of the training, of another size than theirs."""
    loaded = solq.load(write(tmp_path / "small.pth", published(small)))
    assert isinstance(loaded, QueryInst)
    assert loaded.config == small.config
    assert not loaded.training
    with torch.no_grad():
        expected, got = small(*images()), loaded(*images())
    for name in ("pred_logits", "pred_boxes", "mask_queries"):
        torch.testing.assert_close(got[name], expected[name], atol=0, rtol=0)
    solq.save(loaded, tmp_path / "small.safetensors")
    assert solq.load(tmp_path / "small.safetensors").config == small.config


def test_files_that_do_not_fit(small: QueryInst, tmp_path: Path) -> None:
    weights = published(small)
    cases = {
        "it has no roi_head.bbox_head.0.fc_cls.bias": {k: v for k, v in weights.items() if "fc_cls" not in k},
        "class heads have 7 classes but its mask heads 80": weights
        | {"roi_head.mask_head.0.conv_logits.bias": torch.zeros(80)},
        "its backbone is none of resnet50, resnet101": {k: v for k, v in weights.items() if "layer3.5" not in k},
        "the file lacks roi_head.bbox_head.1.fc_reg.bias": {
            k: v for k, v in weights.items() if k != "roi_head.bbox_head.1.fc_reg.bias"
        },
        "the file holds what the model lacks: ema": weights | {"ema": torch.zeros(1)},
    }
    for message, content in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            solq.load(write(tmp_path / "file.pth", content))
        assert "\n" not in str(error.value)
