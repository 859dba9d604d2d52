"""The mask codec of SOLQ (section 3.2, mask compression coding): masks to DCT vectors, and back into the image.

    vector = zigzag_n(A · mask · Aᵀ),      A[k, i] = √(2/N) cos(π/N · k (i + ½)),  A[0, i] = √(1/N)
    mask   = Aᵀ · spectrum · A,            spectrum = the n coefficients in zigzag order, zeros elsewhere

Only the corner of the spectrum that holds the first n coefficients is computed: 32 × 32 of 128 × 128 for n = 256.
The kernels compute cosines and zigzag indices where they need them, so that there are no tables to cache, to move to a
device or to keep alive for a CUDA graph.

Full-image masks are cropped as RoIAlign does (aligned, adaptive sampling; Mask R-CNN, https://arxiv.org/abs/1703.06870)
and pasted by bilinear interpolation at pixel centers. Boxes that are inverted, empty or not finite have an empty mask.

The definitions in plain PyTorch stand in dct.py, crop_paste.py and runs.py; the Triton kernels in encode_kernels.py,
decode_kernels.py and paste_kernel.py; launch.py launches these, operators.py registers the operators.
"""

import torch
from torch import Tensor

from ..runtime import backend_for
from . import dct, operators, runs
from .checks import (
    check_boxes,
    check_coefficients,
    check_image_size,
    check_masks,
    check_num_coefficients,
    check_paste,
    check_size,
    check_square,
)
from .dct import binarize as binarize
from .runs import mask_runs as mask_runs


def dct_encode(masks: Tensor, num_coefficients: int = 256) -> Tensor:
    """Compute the first n coefficients, in zigzag order, of the orthonormal two-dimensional DCT-II of each mask.

    Args:
        masks: (K, N, N) bool, uint8 or any float dtype; N a multiple of 16 up to 256.
        num_coefficients: n, in 1..N².

    Returns:
        (K, n) float32. Differentiable with respect to float masks.

    Raises:
        ValueError: if masks are not square or of another size or dtype, or n is larger than N².
    """
    check_masks(masks, "(K, N, N)")
    check_square(masks)
    check_size(masks.shape[2], "the side of masks")
    check_num_coefficients(num_coefficients, masks.shape[2])
    return operators.dct_encode(masks, num_coefficients)


def dct_decode(coefficients: Tensor, size: int = 128) -> Tensor:
    """Compute the masks whose DCT begins with the given coefficients and is zero after them: the inverse of encoding.

    Args:
        coefficients: (K, n) any float dtype, in zigzag order.
        size: N, the side of the masks, a multiple of 16 up to 256.

    Returns:
        (K, N, N) float32. Differentiable.

    Raises:
        ValueError: if `coefficients` has another shape or dtype, N is another number, or n is larger than N².
    """
    check_coefficients(coefficients, size)
    if backend_for(coefficients) == "triton" or torch.is_autocast_enabled(coefficients.device.type):
        return operators.dct_decode(coefficients, size)
    return dct.dct_decode(coefficients, size)  # two products: an exported model needs no operator


def dct_decode_binary(coefficients: Tensor, size: int = 128) -> Tensor:
    """Decode vectors and threshold each mask at the middle between its own minimum and maximum.

    Args:
        coefficients: (K, n) any float dtype, in zigzag order.
        size: N, the side of the masks, a multiple of 16 up to 256.

    Returns:
        (K, N, N) bool. Vectors that are zero or not finite give empty masks. Has no gradient.

    Raises:
        ValueError: as for `dct_decode`.
    """
    check_coefficients(coefficients, size)
    return operators.dct_decode_binary(coefficients.detach(), size)


def crop_dct_encode(masks: Tensor, boxes: Tensor, size: int = 128, num_coefficients: int = 256) -> Tensor:
    """Crop full-image masks by their boxes with RoIAlign, threshold the crops at ≥ 0.5 and encode them.

    RoIAlign is torchvision's ``roi_align(…, size, aligned=True)`` with adaptive sampling.

    Args:
        masks: (K, H, W) bool, uint8 or any float dtype.
        boxes: (K, 4) x0 y0 x1 y1 in pixels. Boxes that are inverted, empty or not finite give zero vectors.
        size: N, the side of the cropped masks, a multiple of 16 up to 256.
        num_coefficients: n, in 1..N².

    Returns:
        (K, n) float32. Has no gradient.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or n is larger than N².
    """
    check_masks(masks, "(K, H, W)")
    if masks.shape[1] < 1 or masks.shape[2] < 1:
        raise ValueError(f"masks has shape {tuple(masks.shape)}, must be (K, H, W) with H and W at least 1")
    check_boxes(boxes, masks, "masks")
    check_size(size)
    check_num_coefficients(num_coefficients, size)
    return operators.crop_dct_encode(masks.detach(), boxes.detach(), size, num_coefficients)


def paste_masks(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Stretch masks over their boxes in an image: bilinear at pixel centers, zero around a mask, True where ≥ 0.5.

    Args:
        masks: (K, N, N) bool, uint8 of zeros and ones, or floats, such as probabilities; any N.
        boxes: (K, 4) x0 y0 x1 y1 in pixels. Boxes that are inverted, empty or not finite give empty masks; of those
            that leave the image the visible part is pasted.
        image_size: (H, W).

    Returns:
        (K, H, W) bool. Has no gradient.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
    """
    check_paste(masks, boxes, image_size)
    return operators.paste_masks(masks.detach(), boxes.detach(), image_size)


def dct_decode_paste(coefficients: Tensor, boxes: Tensor, image_size: tuple[int, int], size: int = 128) -> Tensor:
    """Decode vectors to masks of the whole image: `dct_decode_binary`, then `paste_masks`.

    Args:
        coefficients: (K, n) any float dtype, in zigzag order.
        boxes: (K, 4) x0 y0 x1 y1 in pixels.
        image_size: (H, W).
        size: N, the side of the decoded masks, a multiple of 16 up to 256.

    Returns:
        (K, H, W) bool. Has no gradient.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or n is larger than N².
    """
    check_coefficients(coefficients, size)
    check_boxes(boxes, coefficients, "coefficients")
    check_image_size(image_size)
    return operators.dct_decode_paste(coefficients.detach(), boxes.detach(), image_size, size)


def paste_runs(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Find the `mask_runs` of pasted masks: where the images of `paste_masks` change from 0 to 1 or back.

    On a CPU the images are never made, on a GPU they never leave it. The number of changes depends on the values, so
    the host waits for a GPU, and `torch.export` cannot trace this function.

    Args:
        masks: (K, N, N) bool, uint8 of zeros and ones, or floats, such as probabilities; any N.
        boxes: (K, 4) x0 y0 x1 y1 in pixels.
        image_size: (H, W).

    Returns:
        Numbers x·H + y (R,) int64 of the pixels that differ from the one before them; how many each mask has (K,)
        int64. Both are those of `mask_runs`.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
    """
    check_paste(masks, boxes, image_size)
    if backend_for(masks) == "triton":
        return mask_runs(operators.paste_masks(masks.detach(), boxes.detach(), image_size))
    return runs.paste_runs(masks.detach(), boxes.detach(), image_size)
