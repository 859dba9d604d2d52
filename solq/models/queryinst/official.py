"""Published QueryInst checkpoints of mmdetection: their architecture, and the names of their tensors."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from solq.detections import ModelMeta, coco_class_names
from solq.models.backbones import Backbone
from solq.models.published import PublishedTensors
from solq.models.queryinst.config import QueryInstConfig

RESNETS: dict[int, Backbone] = {6: "resnet50", 23: "resnet101"}
"""The backbones by the number of blocks in their third stage."""

NAMES = [
    (r"^backbone\.body\.", "backbone."),
    (r"^fpn\.lateral_convs\.(\d)", r"neck.lateral_convs.\1.conv"),
    (r"^fpn\.output_convs\.(\d)", r"neck.fpn_convs.\1.conv"),
    (r"^proposal_boxes", "rpn_head.init_proposal_bboxes"),
    (r"^proposal_features", "rpn_head.init_proposal_features"),
    (r"^stages", "roi_head.bbox_head"),
    (r"^masks\.heads", "roi_head.mask_head"),
    (r"\.dynamic_conv", ".instance_interactive_conv"),
    (r"\.attention\.", ".attention.attn."),
    (r"\.(fc_layer|fc_norm)", r".instance_interactive_conv.\1"),
    (r"\.linear1", ".ffn.layers.0.0"),
    (r"\.linear2", ".ffn.layers.1"),
    (r"\.class_layers", ".cls_fcs"),
    (r"\.class_embed", ".fc_cls"),
    (r"\.bbox_layers", ".reg_fcs"),
    (r"\.bbox_embed", ".fc_reg"),
    (r"\.convs\.(\d+)\.", r".convs.\1.conv."),
    (r"\.norms\.(\d+)\.", r".convs.\1.bn."),
    (r"\.class_masks", ".conv_logits"),
]
"""Patterns in the names of this model's tensors, and their replacements in a published file, applied in this order."""


def recognizes(weights: Mapping[str, Tensor]) -> bool:
    """Tell whether these are the weights of a published QueryInst checkpoint."""
    return "rpn_head.init_proposal_bboxes.weight" in weights and any("mask_head" in key for key in weights)


def official_names(key: str, config: QueryInstConfig) -> list[str]:
    """Name a tensor of this model as in a published file."""
    for pattern, replacement in NAMES:
        key = re.sub(pattern, replacement, key)
    return [key]


def infer_meta(config: QueryInstConfig) -> ModelMeta:
    """Return the classes and the evaluation size of a published checkpoint with this architecture.

    Labels number COCO's 80 categories from 0 in the order of their ids, 1 to 90 with ten ids left out.
    """
    meta = ModelMeta(eval_scale=800, max_size=1333)
    if config.num_classes == 80:
        categories = [(id, name) for id, name in enumerate(coco_class_names()) if name]
        meta.category_ids, meta.class_names = [id for id, _ in categories], [name for _, name in categories]
    return meta


def infer_config(weights: Mapping[str, Tensor], settings: Any = None) -> QueryInstConfig:
    """Infer the architecture of a published checkpoint from the names and sizes of its tensors.

    The number of attention heads is not among them: it is 8, as published.

    Args:
        weights: by their published names.
        settings: not read; published files have none that could be read without running code.

    Raises:
        ValueError: if a tensor is missing, or the checkpoint is of an architecture that this model does not have.
    """

    tensors = PublishedTensors(weights, "a published QueryInst")
    shape, count = tensors.shape, tensors.count
    head, mask_head = "roi_head.bbox_head.0", "roi_head.mask_head.0"
    num_queries, width = shape("rpn_head.init_proposal_features.weight")
    num_classes = shape(f"{head}.fc_cls.bias")[0]
    if (num_masks := shape(f"{mask_head}.conv_logits.bias")[0]) != num_classes:
        raise ValueError(f"its class heads have {num_classes} classes but its mask heads {num_masks}: use another file")
    blocks = count(r"backbone\.layer3\.(\d+)\.")
    if blocks not in RESNETS or "backbone.layer1.0.conv3.weight" not in weights:
        raise ValueError(f"its backbone is none of {', '.join(RESNETS.values())}: use another file")
    return QueryInstConfig(
        backbone=RESNETS[blocks],
        num_classes=num_classes,
        num_queries=num_queries,
        num_stages=count(r"roi_head\.bbox_head\.(\d+)\."),
        width=width,
        feedforward=shape(f"{head}.ffn.layers.0.0.bias")[0],
        dynamic_width=shape(f"{head}.instance_interactive_conv.norm_in.bias")[0],
        mask_convs=count(r"roi_head\.mask_head\.0\.convs\.(\d+)\."),
    )
