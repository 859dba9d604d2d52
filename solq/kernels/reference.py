"""The operators in plain PyTorch, under the names and signatures of :mod:`solq.kernels`."""

from solq.kernels.mask_codec.dct import (
    binarize,
    crop_dct_encode,
    crop_masks,
    dct_decode,
    dct_decode_binary,
    dct_decode_paste,
    dct_encode,
    dct_matrix,
    kept_rows,
    mask_runs,
    paste_masks,
    paste_runs,
    zigzag,
)
from solq.kernels.matching.cost import linear_assignment, matching_cost
from solq.kernels.ms_deform_attn.cpu import ms_deform_attn, ms_deform_attn_fused

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
