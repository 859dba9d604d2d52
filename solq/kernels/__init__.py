"""The operators of SOLQ: tensors in, tensors out. Imports torch and triton only.

CUDA and HIP tensors are served by Triton, CPU tensors by :mod:`solq.kernels.reference`, the plain PyTorch
definitions of the same names. :func:`use_backend` forces one of the two.
"""

from .mask_codec import (
    binarize,
    crop_dct_encode,
    dct_decode,
    dct_decode_binary,
    dct_decode_paste,
    dct_encode,
    mask_runs,
    paste_masks,
    paste_runs,
)
from .matching import linear_assignment, matching_cost
from .ms_deform_attn.kernels import ms_deform_attn, ms_deform_attn_fused
from .ms_deform_attn.module import MSDeformAttn
from .runtime import use_backend

__all__ = [
    "MSDeformAttn",
    "binarize",
    "crop_dct_encode",
    "dct_decode",
    "dct_decode_binary",
    "dct_decode_paste",
    "dct_encode",
    "linear_assignment",
    "mask_runs",
    "matching_cost",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "paste_masks",
    "paste_runs",
    "use_backend",
]
