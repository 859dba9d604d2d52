"""The operators of SOLQ: tensors in, tensors out. Imports torch and triton only.

CUDA and HIP tensors are served by Triton, CPU tensors by :mod:`solq.kernels.reference`, the plain PyTorch
definitions of the same names. :func:`use_backend` forces one of the two.
"""

from solq.kernels.mask_codec.encode_kernels import (
    crop_dct_encode,
    dct_decode,
    dct_decode_binary,
    dct_decode_paste,
    dct_encode,
    paste_masks,
    paste_runs,
)
from solq.kernels.matching.assignment_kernel import linear_assignment
from solq.kernels.matching.cost_kernel import matching_cost
from solq.kernels.ms_deform_attn.kernels import ms_deform_attn, ms_deform_attn_fused
from solq.kernels.ms_deform_attn.module import MSDeformAttn
from solq.kernels.runtime import use_backend

__all__ = [
    "MSDeformAttn",
    "crop_dct_encode",
    "dct_decode",
    "dct_decode_binary",
    "dct_decode_paste",
    "dct_encode",
    "linear_assignment",
    "matching_cost",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "paste_masks",
    "paste_runs",
    "use_backend",
]
