"""The matching cost in plain PyTorch: the definition, and what serves CPU tensors.

    cost[l, t, q] = cost_class · class(logits[l, b, q], label_t) + cost_bbox · ‖box_lbq − box_t‖₁
                    − cost_giou · GIoU(box_lbq, box_t),             b the image of target t

The class cost is one of
    focal    α (1 − p)^γ · −log(p + 1e-8) − (1 − α) p^γ · −log(1 − p + 1e-8),  p = sigmoid(logit of the label)
    softmax  −softmax(logits)[label]
after Deformable DETR (https://arxiv.org/abs/2010.04159, appendix A.2) and DETR (https://arxiv.org/abs/2005.12872,
section 3.1).

Degenerate boxes have finite costs: a negative width or height counts as zero in the GIoU, and its 0/0 is 0.
"""

from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

ClassCostForm = Literal["focal", "softmax"]

CACHED_COSTS = 1 << 16  # costs computed at a time, which fit a core's cache with their intermediate results


class PackedTargets(NamedTuple):
    """The targets of all images, one image after another."""

    labels: Tensor  # (T,)
    boxes: Tensor  # (T, 4)
    offsets: Tensor  # (B + 1,), image b has the targets offsets[b] … offsets[b + 1] − 1


class CostOptions(NamedTuple):
    """The keyword arguments of :func:`solq.kernels.matching_cost`."""

    cost_class: float = 2.0
    cost_bbox: float = 5.0
    cost_giou: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0
    class_cost_form: ClassCostForm = "focal"


def _class_cost(logits: Tensor, labels: Tensor, options: CostOptions) -> Tensor:
    """Compute the class cost (L, n, Q) of one image's logits (L, Q, C) and labels (n,)."""
    if options.class_cost_form == "softmax":
        return -logits.softmax(-1).mT[:, labels]
    alpha, gamma = options.alpha, options.gamma
    logit = logits.mT[:, labels]
    present, absent = logit.sigmoid(), (-logit).sigmoid()
    cost = (1 - alpha) * present**gamma * torch.log(absent + 1e-8)
    cost -= alpha * absent**gamma * torch.log(present + 1e-8)
    return cost


def _intersect(center: Tensor, extent: Tensor, other_center: Tensor, other_extent: Tensor) -> list[Tensor]:
    """Intersect two intervals, whose negative extents count as 0.

    Returns:
        The lengths of the intersection, the hull, the first and the second interval.
    """
    half, other_half = extent.clamp(min=0) / 2, other_extent.clamp(min=0) / 2
    low, high = center - half, center + half
    other_low, other_high = other_center - other_half, other_center + other_half
    length, other_length = high - low, other_high - other_low
    overlap = torch.minimum(high, other_high).sub_(torch.maximum(low, other_low))  # negative: the gap between both
    hull = (length + other_length).sub_(overlap)
    return [overlap.clamp_(min=0), hull, length, other_length]


def _giou_plus_one(boxes: Tensor, other_boxes: Tensor) -> Tensor:
    """Compute 1 + generalized IoU of boxes (4, ...) that broadcast, each cx cy w h; a GIoU of 0/0 is 0."""
    x, y = (_intersect(boxes[i], boxes[i + 2], other_boxes[i], other_boxes[i + 2]) for i in (0, 1))
    overlap, hull, area, other_area = (along_x * along_y for along_x, along_y in zip(x, y, strict=True))
    smallest = torch.finfo(hull.dtype).tiny
    union = (area + other_area).sub_(overlap).clamp_(min=smallest)
    return overlap.div_(union).add_(union.div_(hull.clamp_(min=smallest)))


def matching_cost(logits: Tensor, boxes: Tensor, targets: PackedTargets, options: CostOptions) -> Tensor:
    """Compute the cost (L, T, Q) of each query of a target's own image, for every decoder layer."""
    L, _, Q, _ = logits.shape
    cost = logits.new_empty(L, targets.labels.shape[0], Q, dtype=torch.float32)
    coordinates = boxes.float().movedim(-1, 0).contiguous()  # (4, L, B, Q)
    target_coordinates = targets.boxes.float().T[:, :, None]  # (4, T, 1)
    for image, (start, end) in enumerate(pairwise(targets.offsets.tolist())):
        labels, column = targets.labels[start:end].unique(return_inverse=True)
        # The constant makes up for the 1 in `_giou_plus_one`, which is subtracted below.
        class_cost = options.cost_class * _class_cost(logits[:, image].float(), labels, options) + options.cost_giou
        num_layers = max(CACHED_COSTS // max((end - start) * Q, 1), 1)
        for layers in (slice(first, first + num_layers) for first in range(0, L, num_layers)):
            block = cost[layers, start:end]
            torch.index_select(class_cost[layers], 1, column, out=block)
            pairs = coordinates[:, layers, image, None], target_coordinates[:, None, start:end]
            block.sub_(_giou_plus_one(*pairs), alpha=options.cost_giou)
            for query_coordinate, target_coordinate in zip(*pairs, strict=True):
                block.add_((query_coordinate - target_coordinate).abs_(), alpha=options.cost_bbox)
    return cost
