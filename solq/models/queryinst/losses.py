"""The losses of classes and boxes of QueryInst (section 3), with the boxes compared by their corners."""

import torch
from torch import Tensor
from torchvision.ops import box_convert

from solq.data.batch import PackedTargets
from solq.models.base import Matches
from solq.models.detection_losses import classification_loss


def detection_losses(logits: Tensor, boxes: Tensor, targets: PackedTargets, matches: Matches) -> dict[str, Tensor]:
    """Compute ``loss_ce``, ``loss_bbox`` and ``loss_giou``, each (L,).

    Args:
        logits: (L, B, Q, K) float32.
        boxes: (L, B, Q, 4) float32, cx cy w h in 0..1.
        targets: T targets, packed; labels and boxes are read.
        matches: the query of each target in each stage.
    """
    matched = matches.queries >= 0
    predicted = matches.select(box_convert(boxes, "cxcywh", "xyxy"))
    target = box_convert(targets.boxes, "cxcywh", "xyxy")
    l1 = (predicted - target).abs().sum(-1)
    giou_loss = 1 - generalized_iou(predicted, target)
    return {
        "loss_ce": classification_loss(logits, targets.labels, matches) / matches.num_matched,
        "loss_bbox": (l1 * matched).sum(1) / matches.num_matched,
        "loss_giou": (giou_loss * matched).sum(1) / matches.num_matched,
    }


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Compute the generalized IoU (…) of pairs of boxes (…, 4) x0 y0 x1 y1; that of two empty boxes is 0.

    No small number is added to the areas: they are shares of an image's area, and those of small objects are small.
    Source: Rezatofighi et al., CVPR 2019.
    """
    smallest = torch.finfo(a.dtype).tiny
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    overlap = sides.clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
    return overlap / union.clamp(min=smallest) - (hull - union) / hull.clamp(min=smallest)
