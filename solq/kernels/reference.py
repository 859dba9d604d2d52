"""The operators in plain PyTorch, under the names and signatures of :mod:`solq.kernels`."""

from typing import Any

from torch import Tensor

from .mask_codec.crop_paste import crop_dct_encode, crop_masks, dct_decode_paste, paste_masks
from .mask_codec.dct import binarize, dct_decode, dct_decode_binary, dct_encode, dct_matrix, kept_rows, zigzag
from .mask_codec.runs import mask_runs, paste_runs
from .matching.assignment import solve_with_scipy
from .matching.cost import CostOptions, PackedTargets
from .matching.cost import matching_cost as plain_matching_cost
from .ms_deform_attn.cpu import ms_deform_attn, ms_deform_attn_fused

__all__ = [
    "binarize",
    "crop_dct_encode",
    "crop_masks",
    "dct_decode",
    "dct_decode_binary",
    "dct_decode_paste",
    "dct_encode",
    "dct_matrix",
    "kept_rows",
    "linear_assignment",
    "mask_runs",
    "matching_cost",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "paste_masks",
    "paste_runs",
    "zigzag",
]


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
