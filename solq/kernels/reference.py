"""The definitions of the operators in plain PyTorch: the specification, the CPU path, and what tests compare with.

Names and signatures are those of :mod:`solq.kernels`. Imports torch only (SciPy where an assignment is solved).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

SpatialShapes = Tensor | Sequence[tuple[int, int]]


def _shape_pairs(spatial_shapes: SpatialShapes) -> list[tuple[int, int]]:
    return [(h, w) for h, w in (spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes)]


# ---------------------------------------------------------------------------------------------------------------------
# Multi-scale deformable attention (Deformable DETR, section 4.1)
# ---------------------------------------------------------------------------------------------------------------------


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Tensor | Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sum of bilinear samples of `value`, weighted by `attention_weights`."""
    B, _, M, D = value.shape
    Q, P = sampling_locations.shape[1], sampling_locations.shape[4]
    compute = torch.promote_types(value.dtype, torch.float32)
    shapes = _shape_pairs(spatial_shapes)
    grids = 2 * sampling_locations.to(compute) - 1
    sampled = []
    for level, (level_value, (h, w)) in enumerate(
        zip(value.to(compute).split([h * w for h, w in shapes], dim=1), shapes, strict=True)
    ):
        image = level_value.permute(0, 2, 3, 1).reshape(B * M, D, h, w)
        grid = grids[:, :, :, level].transpose(1, 2).reshape(B * M, Q, P, 2)
        sampled.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = attention_weights.to(compute).transpose(1, 2).reshape(B * M, 1, Q, -1)
    output = (torch.stack(sampled, dim=-2).flatten(-2) * weights).sum(-1)
    return output.view(B, M * D, Q).transpose(1, 2).to(value.dtype)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Tensor | Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """`ms_deform_attn` with softmax over L·P and the sampling locations computed inside."""
    compute = torch.promote_types(value.dtype, torch.float32)
    offsets = sampling_offsets.to(compute)
    centres = reference_points.to(compute)[:, :, None, :, None, :]
    if reference_points.shape[-1] == 2:
        shapes = torch.as_tensor(_shape_pairs(spatial_shapes), dtype=compute, device=value.device)
        locations = centres + offsets / shapes.flip(-1)[:, None]
    else:
        P = sampling_offsets.shape[-2]
        locations = centres[..., :2] + offsets / P * centres[..., 2:] * 0.5
    weights = attention_logits.to(compute).flatten(-2).softmax(-1).view(attention_logits.shape)
    return ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights)


# ---------------------------------------------------------------------------------------------------------------------
# Mask codec (SOLQ, section 3.2, mask compression coding)
# ---------------------------------------------------------------------------------------------------------------------


def dct_matrix(size: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """The orthonormal DCT-II matrix A (size, size): the transform of a square mask is A @ mask @ A.T."""
    frequency = torch.arange(size, dtype=torch.float64)[:, None]
    position = torch.arange(size, dtype=torch.float64) + 0.5
    matrix = torch.cos(math.pi / size * frequency * position) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.to(device=device, dtype=dtype)


def zigzag(size: int, num_coefficients: int) -> Tensor:
    """Rows and columns (2, n) of the first coefficients in JPEG's zigzag order: (0,0), (0,1), (1,0), (2,0), …"""
    order = sorted(
        ((row, column) for row in range(size) for column in range(size)),
        key=lambda rc: (sum(rc), rc[0] if sum(rc) % 2 else rc[1]),
    )
    return torch.tensor(order[:num_coefficients], dtype=torch.int64).T


def dct_encode(masks: Tensor, num_coefficients: int = 256) -> Tensor:
    """The first n zigzag coefficients (K, n) of the orthonormal 2-D DCT-II of masks (K, N, N)."""
    size = masks.shape[-1]
    rows, columns = zigzag(size, num_coefficients)
    matrix = dct_matrix(size, device=masks.device, dtype=torch.float32)[: int(rows.max()) + 1]
    return (matrix @ masks.float() @ matrix.T)[:, rows, columns]


def dct_decode(coefficients: Tensor, size: int = 128) -> Tensor:
    """The masks (K, size, size) of which `coefficients` (K, n) are the first DCT coefficients, the others zero."""
    rows, columns = zigzag(size, coefficients.shape[-1])
    kept = int(rows.max()) + 1
    matrix = dct_matrix(size, device=coefficients.device, dtype=torch.float32)[:kept]
    spectrum = coefficients.new_zeros(len(coefficients), kept, kept, dtype=torch.float32)
    spectrum[:, rows, columns] = coefficients.float()
    return matrix.T @ spectrum @ matrix


def binarize(masks: Tensor) -> Tensor:
    """True where a decoded mask (K, N, N) lies above the middle between its own minimum and maximum."""
    return masks > (masks.amin((1, 2), keepdim=True) + masks.amax((1, 2), keepdim=True)) / 2


def _roi_align_matrix(start: Tensor, end: Tensor, extent: int, size: int) -> Tensor:
    """RoIAlign along one axis (K, size, extent): it averages bilinear samples, so it is linear and separable."""
    start, end = start - 0.5, end - 0.5
    bin_size = (end - start) / size
    count = bin_size.ceil().clamp(min=1).nan_to_num(1, 1, 1)  # adaptive sampling: samples per bin
    most = int(count.max()) if len(count) else 1
    step = torch.arange(most, device=start.device)
    bins = torch.arange(size, device=start.device)
    positions = (
        start[:, None, None]
        + bin_size[:, None, None] * (bins[:, None] + (step + 0.5) / count[:, None, None])
    )  # (K, size, most)
    inside = (positions >= -1) & (positions <= extent) & (step < count[:, None, None])
    positions = positions.nan_to_num(-2).clamp(0, extent - 1)
    pixels = torch.arange(extent, device=start.device)
    hat = (1 - (positions[..., None] - pixels).abs()).clamp(min=0) * inside[..., None]
    return hat.sum(2) / count[:, None, None]


def crop_masks(masks: Tensor, boxes: Tensor, size: int = 128) -> Tensor:
    """Masks (K, H, W) cropped by their boxes (K, 4; x0 y0 x1 y1 in pixels) with RoIAlign, kept where ≥ 0.5."""
    H, W = masks.shape[-2:]
    x0, y0, x1, y1 = boxes.float().unbind(-1)
    cropped = _roi_align_matrix(y0, y1, H, size) @ masks.float() @ _roi_align_matrix(x0, x1, W, size).mT
    return cropped >= 0.5


def crop_dct_encode(masks: Tensor, boxes: Tensor, size: int = 128, num_coefficients: int = 256) -> Tensor:
    """`dct_encode` of full-image masks (K, H, W) cropped by `boxes` (K, 4) in pixels."""
    return dct_encode(crop_masks(masks, boxes, size), num_coefficients)


def _paste_matrix(start: Tensor, end: Tensor, extent: int, size: int) -> Tensor:
    """Bilinear interpolation (K, extent, size) of a mask stretched over start … end, at the centres of pixels."""
    centres = torch.arange(extent, device=start.device) + 0.5
    positions = (centres - start[:, None]) / (end - start)[:, None] * size - 0.5
    hat = (1 - (positions[..., None] - torch.arange(size, device=start.device)).abs()).clamp(min=0)
    return hat.nan_to_num(0)


def paste_masks(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Masks (K, N, N) stretched over their boxes (K, 4) in an image (H, W), kept where ≥ 0.5: (K, H, W) bool."""
    H, W = image_size
    x0, y0, x1, y1 = boxes.float().unbind(-1)
    size = masks.shape[-1]
    valid = (x1 > x0) & (y1 > y0)
    pasted = _paste_matrix(y0, y1, H, size) @ masks.float() @ _paste_matrix(x0, x1, W, size).mT
    return (pasted >= 0.5) & valid[:, None, None]


def dct_decode_paste(coefficients: Tensor, boxes: Tensor, image_size: tuple[int, int], size: int = 128) -> Tensor:
    """Decoded, binarised masks of vectors (K, n) pasted into their boxes (K, 4) in pixels: (K, H, W) bool."""
    return paste_masks(binarize(dct_decode(coefficients, size)), boxes, image_size)


# ---------------------------------------------------------------------------------------------------------------------
# Matching (DETR, section 3.1; focal-style class cost of Deformable DETR)
# ---------------------------------------------------------------------------------------------------------------------


def _pairwise_giou(queries: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Generalised IoU of boxes given as cx, cy, w, h that broadcast; negative extents count as 0, and 0/0 is 0."""
    (x0_a, x1_a), (y0_a, y1_a), (x0_b, x1_b), (y0_b, y1_b) = (
        (centre - extent.clamp(min=0) / 2, centre + extent.clamp(min=0) / 2)
        for cx, cy, w, h in (queries, targets)
        for centre, extent in ((cx, w), (cy, h))
    )
    width = (torch.minimum(x1_a, x1_b) - torch.maximum(x0_a, x0_b)).clamp(min=0)
    height = (torch.minimum(y1_a, y1_b) - torch.maximum(y0_a, y0_b)).clamp(min=0)
    intersection = width * height
    union = (x1_a - x0_a) * (y1_a - y0_a) + (x1_b - x0_b) * (y1_b - y0_b) - intersection
    hull = (torch.maximum(x1_a, x1_b) - torch.minimum(x0_a, x0_b)) * (
        torch.maximum(y1_a, y1_b) - torch.minimum(y0_a, y0_b)
    )
    smallest = torch.finfo(hull.dtype).tiny
    return intersection / union.clamp(min=smallest) - (hull - union) / hull.clamp(min=smallest)


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
    T = target_labels.shape[0]
    image = torch.searchsorted(target_offsets[1:], torch.arange(T, device=logits.device), right=True)
    logit = logits[:, image, :, target_labels].transpose(0, 1).float()  # (L, T, Q): two index tensors put T first
    if class_cost == "softmax":
        label_cost = -torch.exp(logit - logits.float().logsumexp(-1)[:, image])
    else:
        present, absent = logit.sigmoid(), (-logit).sigmoid()
        positive = alpha * absent**gamma * -torch.log(present + 1e-8)
        negative = (1 - alpha) * present**gamma * -torch.log(absent + 1e-8)
        label_cost = positive - negative
    query_boxes = [coordinate[:, image] for coordinate in boxes.float().unbind(-1)]  # cx, cy, w, h: each (L, T, Q)
    own_boxes = [coordinate[:, None] for coordinate in target_boxes.float().unbind(-1)]  # each (T, 1)
    l1 = sum((a - b).abs() for a, b in zip(query_boxes, own_boxes, strict=True))
    return cost_class * label_cost + cost_bbox * l1 - cost_giou * _pairwise_giou(query_boxes, own_boxes)


def linear_assignment(
    cost: Tensor, target_offsets: Tensor, *, return_non_finite: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The query of each target (L, T) int64 at the least total cost per layer and image; -1 for a target left over.

    NaN and infinite costs are worse than all finite ones together; their number (L, T) is returned on request.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    assignment = torch.full(cost.shape[:2], -1, dtype=torch.int64)
    non_finite = (~cost.isfinite()).sum(-1)
    offsets = target_offsets.tolist()
    for layer, layer_cost in enumerate(cost.detach().cpu().double().numpy()):
        for start, end in zip(offsets[:-1], offsets[1:], strict=True):
            problem = layer_cost[start:end]
            finite = np.isfinite(problem)
            if not finite.all():
                bound = np.abs(problem[finite]).max(initial=0)
                problem = np.where(finite, problem, 2 * (end - start + 1) * bound if bound > 0 else 1)
            rows, columns = linear_sum_assignment(problem)
            assignment[layer, start + torch.as_tensor(rows)] = torch.as_tensor(columns)
    assignment = assignment.to(cost.device)
    return (assignment, non_finite) if return_non_finite else assignment
