"""Matching cost and assignment in plain PyTorch (DETR, section 3.1; focal-style class cost of Deformable DETR)."""

from itertools import pairwise
from typing import Literal, overload

import torch
from torch import Tensor

CACHED_COSTS = 1 << 16  # as many costs at a time; with what is needed to compute them, they fit a core's cache


def _class_cost(
    logits: Tensor, labels: Tensor, class_cost: Literal["focal", "softmax"], alpha: float, gamma: float
) -> Tensor:
    """The class cost (L, n, Q) of one image's logits (L, Q, C) and labels (n,)."""
    if class_cost == "softmax":
        return -logits.softmax(-1).mT[:, labels]
    logit = logits.mT[:, labels]
    present, absent = logit.sigmoid(), (-logit).sigmoid()
    cost = (1 - alpha) * present**gamma * torch.log(absent + 1e-8)
    cost -= alpha * absent**gamma * torch.log(present + 1e-8)
    return cost


def _overlap_and_hull(centre: Tensor, extent: Tensor, other_centre: Tensor, other_extent: Tensor) -> list[Tensor]:
    """Lengths along one axis: of intersection, hull, and both intervals. Negative extents count as 0."""
    half, other_half = extent.clamp(min=0) / 2, other_extent.clamp(min=0) / 2
    low, high = centre - half, centre + half
    other_low, other_high = other_centre - other_half, other_centre + other_half
    length, other_length = high - low, other_high - other_low
    overlap = torch.minimum(high, other_high).sub_(torch.maximum(low, other_low))  # negative: the gap between both
    hull = (length + other_length).sub_(overlap)
    return [overlap.clamp_(min=0), hull, length, other_length]


def _giou_plus_one(boxes: Tensor, other_boxes: Tensor) -> Tensor:
    """1 + generalised IoU of boxes (4, ...) that broadcast, each cx cy w h; a GIoU of 0/0 is 0."""
    x, y = (_overlap_and_hull(boxes[i], boxes[i + 2], other_boxes[i], other_boxes[i + 2]) for i in (0, 1))
    overlap, hull, area, other_area = (along_x * along_y for along_x, along_y in zip(x, y, strict=True))
    smallest = torch.finfo(hull.dtype).tiny
    union = (area + other_area).sub_(overlap).clamp_(min=smallest)
    return overlap.div_(union).add_(union.div_(hull.clamp_(min=smallest)))


def matching_cost(
    logits: Tensor,
    boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    target_offsets: Tensor,
    *,
    cost_class: float = 2.0,
    cost_bbox: float = 5.0,
    cost_giou: float = 2.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
    class_cost: Literal["focal", "softmax"] = "focal",
) -> Tensor:
    """The cost (L, T, Q) of each query of a target's own image, for every decoder layer."""
    L, _, Q, _ = logits.shape
    cost = logits.new_empty(L, target_labels.shape[0], Q, dtype=torch.float32)
    coordinates = boxes.float().movedim(-1, 0).contiguous()  # (4, L, B, Q)
    target_coordinates = target_boxes.float().T[:, :, None]  # (4, T, 1)
    for image, (start, end) in enumerate(pairwise(target_offsets.tolist())):
        labels, column = target_labels[start:end].unique(return_inverse=True)
        of_class = cost_class * _class_cost(logits[:, image].float(), labels, class_cost, alpha, gamma) + cost_giou
        some = max(CACHED_COSTS // max((end - start) * Q, 1), 1)
        for layers in (slice(first, first + some) for first in range(0, L, some)):
            own = cost[layers, start:end]
            torch.index_select(of_class[layers], 1, column, out=own)
            pairs = coordinates[:, layers, image, None], target_coordinates[:, None, start:end]
            own.sub_(_giou_plus_one(*pairs), alpha=cost_giou)
            for query_coordinate, target_coordinate in zip(*pairs, strict=True):
                own.add_((query_coordinate - target_coordinate).abs_(), alpha=cost_bbox)
    return cost


LARGEST_COST = 1e290  # sums of larger ones overflow


@overload
def linear_assignment(cost: Tensor, target_offsets: Tensor, *, return_non_finite: Literal[False] = False) -> Tensor: ...


@overload
def linear_assignment(
    cost: Tensor, target_offsets: Tensor, *, return_non_finite: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def linear_assignment(
    cost: Tensor, target_offsets: Tensor, *, return_non_finite: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The query of each target (L, T) int64 at the least total cost per layer and image; -1 for a target left over.

    NaN and infinite costs, in float64 also those from LARGEST_COST on, are worse than all others together; their
    number (L, T) is returned on request.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    # NumPy has no bfloat16.
    host_cost = cost.detach().to("cpu", torch.promote_types(cost.dtype, torch.float32)).numpy()
    assignment = np.full(cost.shape[:2], -1, dtype=np.int64)
    non_finite = np.zeros(cost.shape[:2], dtype=np.int64)
    largest = min(LARGEST_COST, float(np.finfo(host_cost.dtype).max))
    for start, end in pairwise(target_offsets.tolist()):
        for layer, problem in enumerate(host_cost[:, start:end]):
            if problem.size and not (problem.max() <= largest and problem.min() >= -largest):  # neither is it of NaN
                finite = np.abs(problem) <= largest
                non_finite[layer, start:end] = (~finite).sum(1)
                bound = np.abs(problem[finite]).max(initial=0).astype(np.float64)
                problem = np.where(finite, problem, 2 * (end - start + 1) * bound if bound > 0 else 1.0)
            rows, columns = linear_sum_assignment(problem)
            assignment[layer, start + rows] = columns
    solved = torch.from_numpy(assignment).to(cost.device)
    return (solved, torch.from_numpy(non_finite).to(cost.device)) if return_non_finite else solved
