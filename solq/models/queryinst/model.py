"""QueryInst: queries and their boxes are refined stage by stage, each stage predicting class, box and mask."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import box_convert

from solq.data.batch import PackedTargets
from solq.models.backbones import build_backbone
from solq.models.backbones.fpn import FeaturePyramid
from solq.models.base import InstanceSegmenter, Matches, Outputs
from solq.models.queryinst.config import QueryInstConfig
from solq.models.queryinst.losses import detection_losses
from solq.models.queryinst.masks import DynamicMasks, MaskInputs
from solq.models.queryinst.stages import Stage


class QueryInstOutputs(Outputs, MaskInputs):
    """The predictions of all stages, and what the mask heads read."""


class QueryInst(InstanceSegmenter):
    """Instances as Queries (Fang et al., ICCV 2021), on Sparse R-CNN.

    Args:
        config: the architecture.
    """

    name = "queryinst"
    config: QueryInstConfig
    masks: DynamicMasks

    def __init__(self, config: QueryInstConfig) -> None:
        super().__init__()
        self.config = config
        width, dynamic_width, num_classes = config.width, config.dynamic_width, config.num_classes
        self.backbone = build_backbone(config.backbone, config.backbone_norm, first_level=2)
        self.fpn = FeaturePyramid(self.backbone.num_channels, width)
        self.proposal_boxes = nn.Embedding(config.num_queries, 4)  # cx cy w h in 0..1 of the image
        self.proposal_features = nn.Embedding(config.num_queries, width)
        self.stages = nn.ModuleList(
            Stage(width, config.num_heads, config.feedforward, dynamic_width, num_classes)
            for _ in range(config.num_stages)
        )
        self.masks = DynamicMasks(
            config.num_stages, width, dynamic_width, config.mask_convs, num_classes, config.gradient_checkpointing
        )
        with torch.no_grad():  # every box starts as the whole image
            self.proposal_boxes.weight.copy_(torch.tensor([0.5, 0.5, 1.0, 1.0]))

    def forward(self, images: Tensor, padding_mask: Tensor, last_layer_only: bool = False) -> QueryInstOutputs:
        levels = self.fpn(self.backbone(images))
        pyramid = [level.contiguous(memory_format=torch.channels_last) for level in levels]  # RoIAlign reads it fastest
        extents = _image_extents(padding_mask)[:, None]  # (B, 1, 4)
        queries = self.proposal_features.weight.expand(len(images), -1, -1)
        boxes = box_convert(self.proposal_boxes.weight, "cxcywh", "xyxy") * extents
        all_attended, all_logits, all_boxes = [], [], []
        for stage in self.stages:
            queries, attended, logits, refined = self._run(stage, queries, boxes, pyramid)
            boxes = refined.detach()
            all_attended.append(attended)
            all_logits.append(logits)
            all_boxes.append(refined)
        kept = slice(-1 if last_layer_only else 0, None)
        mask_inputs: MaskInputs = self.masks(all_attended[kept], all_boxes[kept], pyramid)
        return {
            "pred_logits": torch.stack(all_logits[kept]),
            "pred_boxes": box_convert(torch.stack(all_boxes[kept]) / extents, "xyxy", "cxcywh"),
            **mask_inputs,
        }

    @property
    def matcher_settings(self) -> Mapping[str, Any]:
        return {"box_l1": "corners"}

    @property
    def loss_weights(self) -> Mapping[str, float]:
        return {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0, "loss_mask": 8.0}

    def losses(self, outputs: QueryInstOutputs, matches: Matches, targets: PackedTargets) -> dict[str, Tensor]:
        detection = detection_losses(outputs["pred_logits"], outputs["pred_boxes"], targets, matches)
        return detection | self.masks.losses(outputs, matches, targets)

    def learning_rate_groups(self) -> dict[str, list[nn.Parameter]]:
        groups: dict[str, list[nn.Parameter]] = {"backbone": [], "others": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups["backbone" if name.startswith("backbone.") else "others"].append(parameter)
        return groups

    def _run(
        self, stage: nn.Module, queries: Tensor, boxes: Tensor, pyramid: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.config.gradient_checkpointing and self.training:
            return checkpoint(stage, queries, boxes, pyramid, use_reentrant=False)
        return stage(queries, boxes, pyramid)


def _image_extents(padding_mask: Tensor) -> Tensor:
    """Return W H W H (B, 4) float32 of each image without its padding, at least 1."""
    visible = ~padding_mask
    height, width = visible.any(2).sum(1), visible.any(1).sum(1)
    return torch.stack([width, height], dim=1).clamp(min=1).float().repeat(1, 2)
