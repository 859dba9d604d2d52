"""The detection losses that DETR-like models share: focal loss of the classes, L1 and generalized IoU of the boxes."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert

from solq.data.batch import PackedTargets
from solq.models.base import Matches

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss (Lin et al., 2017)


def detection_losses(
    logits: Tensor, boxes: Tensor, labels: Tensor, targets: PackedTargets, matches: Matches, normalizer: Tensor
) -> dict[str, Tensor]:
    """Compute ``loss_ce``, ``loss_bbox`` and ``loss_giou``, each (L,) (Deformable DETR; DETR, section 3.1).

    Args:
        logits: (L, B, Q, C) float32.
        boxes: (L, B, Q, 4) float32, cx cy w h in 0..1.
        labels: (T,) int64, the class of each target.
        targets: T targets, packed; their boxes are read.
        matches: the query of each target in each layer.
        normalizer: () float32, what the sums are divided by.
    """
    matched = matches.queries >= 0
    matched_boxes = matches.select(boxes)
    l1 = (matched_boxes - targets.boxes).abs().sum(-1)
    corners, target_corners = (box_convert(b, "cxcywh", "xyxy") for b in (matched_boxes, targets.boxes))
    giou_loss = 1 - generalized_iou(corners, target_corners)
    return {
        "loss_ce": classification_loss(logits, labels, matches) / normalizer,
        "loss_bbox": (l1 * matched).sum(1) / normalizer,
        "loss_giou": (giou_loss * matched).sum(1) / normalizer,
    }


def classification_loss(logits: Tensor, labels: Tensor, matches: Matches) -> Tensor:
    """Sum the focal loss (L,) over all logits (L, B, Q, C): label (T,) for a target's query, else no class.

    Source: Focal Loss for Dense Object Detection (Lin et al., ICCV 2017).
    """
    matched = matches.queries >= 0
    layers = torch.arange(len(logits), device=logits.device)[:, None]
    # Sum the background loss over all logits; for matched ones, replace it by the positive loss.
    positive = logits[layers, matches.images, matches.queries.clamp(min=0), labels]
    replaced = (_focal_loss(positive, is_object=True) - _focal_loss(positive, is_object=False)) * matched
    return _focal_loss(logits, is_object=False).sum((1, 2, 3)) + replaced.sum(1)


def _focal_loss(logits: Tensor, *, is_object: bool) -> Tensor:
    """Compute the focal loss of each logit for target 1 (`is_object`) or 0."""
    probability = logits.sigmoid()
    if is_object:
        return ALPHA * (1 - probability) ** GAMMA * F.softplus(-logits)
    return (1 - ALPHA) * probability**GAMMA * F.softplus(logits)


def generalized_iou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """Compute the generalized IoU (…) of pairs of boxes (…, 4) x0 y0 x1 y1 (Rezatofighi et al., 2019).

    torchvision's picks the overlapping pairs by a mask, for which the host has to wait.
    """
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    inner_low, inner_high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    overlap = (inner_high - inner_low).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
    hull = (high - low).prod(-1)
    return overlap / (union + eps) - (hull - union) / (hull + eps)
