"""The operators in PyTorch, for any device, under their public names and signatures."""

from typing import Any

from torch import Tensor

from .dynamic_conv.definition import dynamic_conv
from .mask_codec.crop_paste import crop_dct_encode, crop_masks, dct_decode_paste, paste_masks
from .mask_codec.dct import binarize, dct_decode, dct_decode_binary, dct_encode, dct_matrix, kept_rows, zigzag
from .mask_codec.runs import mask_runs, paste_runs
from .matching.assignment import solve_with_scipy
from .matching.cost import CostOptions, PackedTargets
from .matching.cost import matching_cost as plain_matching_cost
from .ms_deform_attn import cpu
from .ms_deform_attn.checks import LevelStartIndex
from .ms_deform_attn.plain import SpatialShapes
from .roi_align.definition import multiscale_roi_align

__all__ = [
    "binarize",
    "crop_dct_encode",
    "crop_masks",
    "dct_decode",
    "dct_decode_binary",
    "dct_decode_paste",
    "dct_encode",
    "dct_matrix",
    "dynamic_conv",
    "kept_rows",
    "linear_assignment",
    "mask_runs",
    "matching_cost",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "multiscale_roi_align",
    "paste_masks",
    "paste_runs",
    "zigzag",
]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: LevelStartIndex | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute :func:`solq.kernels.ms_deform_attn`; `level_start_index` is not read."""
    return cpu.ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: LevelStartIndex | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Compute :func:`solq.kernels.ms_deform_attn_fused`; `level_start_index` is not read."""
    return cpu.ms_deform_attn_fused(value, spatial_shapes, reference_points, sampling_offsets, attention_logits)


def matching_cost(
    logits: Tensor, boxes: Tensor, target_labels: Tensor, target_boxes: Tensor, target_offsets: Tensor, **options: Any
) -> Tensor:
    """Compute :func:`solq.kernels.matching_cost`, with its keyword arguments."""
    targets = PackedTargets(target_labels, target_boxes, target_offsets)
    return plain_matching_cost(logits, boxes, targets, CostOptions(**options))


def linear_assignment(
    cost: Tensor, target_offsets: Tensor, *, return_non_finite: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute :func:`solq.kernels.linear_assignment` with SciPy."""
    assignment, non_finite = solve_with_scipy(cost, target_offsets)
    return (assignment, non_finite) if return_non_finite else assignment
