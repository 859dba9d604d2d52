"""The operators: tensors in, tensors out.

Triton serves CUDA and HIP tensors, and :mod:`.reference`, functions of the same names in PyTorch, serves all others.
:func:`use_backend` forces one of the two. Importing this package imports torch only: Triton is imported by the first
launch, and SciPy and torchvision by the functions that need them.
"""

from .dynamic_conv import dynamic_conv
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
from .ms_deform_attn import ms_deform_attn, ms_deform_attn_fused
from .ms_deform_attn.module import MSDeformAttn
from .roi_align import multiscale_roi_align
from .runtime import use_backend

__all__ = [
    "MSDeformAttn",
    "binarize",
    "crop_dct_encode",
    "dct_decode",
    "dct_decode_binary",
    "dct_decode_paste",
    "dct_encode",
    "dynamic_conv",
    "linear_assignment",
    "mask_runs",
    "matching_cost",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "multiscale_roi_align",
    "paste_masks",
    "paste_runs",
    "use_backend",
]
