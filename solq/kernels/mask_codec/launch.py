"""Launch the mask codec's Triton kernels: choose blocks and grids, allocate the results.

The functions have the names and arguments of the operators that they serve.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..runtime import LAUNCH_OPTIONS
from .dct import kept_rows
from .decode_kernels import decode_binary_kernel, decode_kernel
from .encode_kernels import crop_encode_kernel, encode_kernel
from .paste_kernel import paste_kernel

# AMD's matrix cores multiply float32; on NVIDIA three TF32 products make one of float32.
PRECISION = "ieee" if torch.version.hip else "tf32x3"
# Two encoding programs fill a multiprocessor's registers. Unless told to use them, NVIDIA's assembler spills.
ENCODE_REGISTERS = {"maxnreg": 255}

DECODE_PIXELS, BINARY_PIXELS = 8192, 16384  # pixels of a tile; a binary mask of 128 × 128 is one tile: decoded once
PASTE_BLOCK = {"BLOCK_Y": 16, "BLOCK_X": 64}


def _corner_side(size: int, num_coefficients: int) -> int:
    """Return the side of the corner of the spectrum to compute, a power of two for the matrix products."""
    return max(16, triton.next_power_of_2(kept_rows(size, num_coefficients)))


def encode_blocks(size: int, num_coefficients: int, pairs: bool) -> dict[str, int]:
    """Return blocks and warps of `encode_kernel`, for masks of bytes (`pairs`) or floats."""
    block = min(_corner_side(size, num_coefficients), 32)
    side = triton.next_power_of_2(size)
    blocks = {"PAIRS": pairs, "SIZE": size, "BLOCK_ROWS": block, "BLOCK_COLUMNS": block}
    if not pairs:
        return blocks | {"BLOCK_Y": min(side, 32), "BLOCK_X": min(side, 32), "num_warps": 8}
    # A whole mask of up to 128 × 128 bytes is in flight while the one before it is transformed. Tensor cores ask for
    # 16 pairs of pixels or more at a time.
    return blocks | {"BLOCK_Y": min(side, 128), "BLOCK_X": max(side, 32) if side <= 128 else 64, "num_warps": 4}


def crop_blocks(size: int, num_coefficients: int) -> dict[str, int]:
    """Return blocks and warps of `crop_encode_kernel`."""
    corner = _corner_side(size, num_coefficients)
    return {
        "SIZE": size,
        "CORNER": corner,
        "BLOCK_ROWS": min(corner, 32),
        "BLOCK_COLUMNS": min(corner, 32),
        "BLOCK_Y": 16,
        "BLOCK_X": min(triton.next_power_of_2(size), 128),
        "num_warps": 8,
    }


def decode_blocks(size: int, num_coefficients: int, pixels: int) -> dict[str, int]:
    """Return blocks and warps of the decoding kernels, for tiles of `pixels` pixels that span all rows of a mask."""
    corner = _corner_side(size, num_coefficients)
    side = triton.next_power_of_2(size)
    return {
        "SIZE": size,
        "SIDE": side,
        "CORNER": corner,
        "BLOCK": min(corner, 32),
        "BLOCK_X": min(side, pixels // side),
        "num_warps": 8,
    }


def _multiprocessors(tensor: Tensor) -> int:
    if tensor.device.type == "cpu":  # the interpreter
        return 1
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def _as_bytes(masks: Tensor) -> Tensor:
    return masks.view(torch.uint8) if masks.dtype == torch.bool else masks


def _as_pairs(masks: Tensor) -> Tensor:
    """View each two bytes as a number of 16 bits."""
    masks = masks.contiguous()
    return (masks.clone() if masks.data_ptr() % 2 else masks).view(torch.int16)


def dct_encode(masks: Tensor, num_coefficients: int) -> Tensor:
    K, size = masks.shape[0], masks.shape[-1]
    vectors = masks.new_empty(K, num_coefficients, dtype=torch.float32)
    if K:
        pairs = not masks.is_floating_point()
        blocks = encode_blocks(size, num_coefficients, pairs)
        corner = triton.cdiv(_corner_side(size, num_coefficients), blocks["BLOCK_ROWS"])
        # No more programs than fit on a multiprocessor: each computes its cosines once.
        programs = triton.cdiv((4 if size <= 64 else 2) * _multiprocessors(masks), corner**2)
        grid = (min(K, programs), corner, corner)
        with torch.cuda.device_of(masks):
            encode_kernel[grid](
                _as_pairs(masks) if pairs else masks.contiguous(),
                vectors,
                K,
                num_coefficients,
                **blocks,
                PRECISION=PRECISION,
                **LAUNCH_OPTIONS,
                **({} if torch.version.hip else ENCODE_REGISTERS),
            )
    return vectors


def crop_dct_encode(masks: Tensor, boxes: Tensor, size: int, num_coefficients: int) -> Tensor:
    K, H, W = masks.shape
    if not K:
        return masks.new_empty(0, num_coefficients, dtype=torch.float32)
    blocks = crop_blocks(size, num_coefficients)
    grid = (K, triton.cdiv(size, blocks["BLOCK_Y"]), triton.cdiv(size, blocks["BLOCK_X"]))
    # The transform is linear: the vectors of the blocks of a crop add up to that of the crop.
    partial = masks.new_empty(K, grid[1] * grid[2], num_coefficients, dtype=torch.float32)
    with torch.cuda.device_of(masks):
        crop_encode_kernel[grid](
            _as_bytes(masks),
            boxes.float().contiguous(),
            partial,
            *masks.stride(),
            H,
            W,
            num_coefficients,
            **blocks,
            PRECISION=PRECISION,
            enable_fp_fusion=False,  # sampling positions round as in torchvision
        )
    return partial.sum(1)


def dct_decode(coefficients: Tensor, size: int) -> Tensor:
    K, n = coefficients.shape
    masks = coefficients.new_empty(K, size, size, dtype=torch.float32)
    if K:
        blocks = decode_blocks(size, n, DECODE_PIXELS)
        with torch.cuda.device_of(coefficients):
            decode_kernel[(K, triton.cdiv(size, blocks["BLOCK_X"]))](
                coefficients.contiguous(), masks, n, **blocks, **LAUNCH_OPTIONS
            )
    return masks


def dct_decode_binary(coefficients: Tensor, size: int) -> Tensor:
    K, n = coefficients.shape
    masks = coefficients.new_empty(K, size, size, dtype=torch.bool)
    if K:
        blocks = decode_blocks(size, n, BINARY_PIXELS)
        with torch.cuda.device_of(coefficients):
            decode_binary_kernel[(K,)](coefficients.contiguous(), _as_bytes(masks), n, **blocks, **LAUNCH_OPTIONS)
    return masks


def paste_masks(masks: Tensor, boxes: Tensor, image_size: Sequence[int]) -> Tensor:
    K, size = masks.shape[0], masks.shape[-1]
    height, width = image_size
    images = masks.new_zeros(K, height, width, dtype=torch.bool)
    if images.numel():
        tiles = triton.cdiv(height, PASTE_BLOCK["BLOCK_Y"]) * triton.cdiv(width, PASTE_BLOCK["BLOCK_X"])
        grid = (K, min(tiles, triton.cdiv(16 * _multiprocessors(masks), K)))
        with torch.cuda.device_of(masks):
            paste_kernel[grid](
                _as_bytes(masks).contiguous(),
                boxes.float().contiguous(),
                _as_bytes(images),
                height,
                width,
                SIZE=size,
                **PASTE_BLOCK,
                num_warps=4,
                **LAUNCH_OPTIONS,
            )
    return images


def dct_decode_paste(coefficients: Tensor, boxes: Tensor, image_size: Sequence[int], size: int) -> Tensor:
    return paste_masks(dct_decode_binary(coefficients, size), boxes, image_size)
