"""The Triton kernel that pastes masks into images: bilinear interpolation at the pixels of each box."""

import triton
import triton.language as tl

from .kernel_math import load_box


@triton.jit
def _pixel_range(start, end, extent):
    """Find the pixels from first to last (exclusive) whose centers can lie inside a box, along one axis."""
    # Farther out the zeros around a mask are closer than its pixels.
    first = tl.minimum(tl.maximum(start - 1, 0.0), extent * 1.0)
    last = tl.minimum(tl.maximum(end + 1, 0.0), extent * 1.0)
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit
def paste_kernel(
    masks_ptr,  # (K, N, N) bytes or floats
    boxes_ptr,  # (K, 4)
    images_ptr,  # (K, H, W) bytes, zeros
    height,
    width,
    SIZE: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Paste one mask; several programs share the tiles of its box."""
    number = tl.program_id(0).to(tl.int64)
    x0, y0, x1, y1 = load_box(boxes_ptr, number)
    valid = (x1 > x0) & (y1 > y0) & ((x1 - x0) * 0 + (y1 - y0) * 0 == 0)
    left, right = _pixel_range(tl.where(valid, x0, 0.0), tl.where(valid, x1, 0.0), width)
    top, bottom = _pixel_range(tl.where(valid, y0, 0.0), tl.where(valid, y1, 0.0), height)
    left = left // 16 * 16  # whole vectors
    tiles_x = tl.cdiv(right - left, BLOCK_X)
    tiles = tl.where(valid, tl.cdiv(bottom - top, BLOCK_Y) * tiles_x, 0)
    scale_x = SIZE / (x1 - x0)
    scale_y = SIZE / (y1 - y0)
    mask_ptr = masks_ptr + number * SIZE * SIZE
    image_ptr = images_ptr + number * height * width

    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        x = left + tile % tiles_x * BLOCK_X + tl.arange(0, BLOCK_X)
        y = top + tile // tiles_x * BLOCK_Y + tl.arange(0, BLOCK_Y)
        position_x = (x + 0.5 - x0) * scale_x - 0.5
        position_y = (y + 0.5 - y0) * scale_y - 0.5
        # Farther out than one cell all four neighbors are outside; the limits keep the integers small.
        cell_x = tl.floor(tl.minimum(tl.maximum(position_x, -2.0), SIZE + 1.0))
        cell_y = tl.floor(tl.minimum(tl.maximum(position_y, -2.0), SIZE + 1.0))
        weight_x = (position_x - cell_x)[None, :]
        weight_y = (position_y - cell_y)[:, None]
        column = cell_x.to(tl.int32)[None, :]
        row = cell_y.to(tl.int32)[:, None]
        column_in, next_column_in = (column >= 0) & (column < SIZE), (column >= -1) & (column < SIZE - 1)
        row_in, next_row_in = (row >= 0) & (row < SIZE), (row >= -1) & (row < SIZE - 1)
        cell_ptr = mask_ptr + row * SIZE + column
        above_left = tl.load(cell_ptr, mask=row_in & column_in, other=0).to(tl.float32)
        above_right = tl.load(cell_ptr + 1, mask=row_in & next_column_in, other=0).to(tl.float32)
        below_left = tl.load(cell_ptr + SIZE, mask=next_row_in & column_in, other=0).to(tl.float32)
        below_right = tl.load(cell_ptr + SIZE + 1, mask=next_row_in & next_column_in, other=0).to(tl.float32)
        upper = above_left + weight_x * (above_right - above_left)
        lower = below_left + weight_x * (below_right - below_left)
        pasted = upper + weight_y * (lower - upper) >= 0.5
        inside = (y < bottom)[:, None] & (x < right)[None, :]
        tl.store(image_ptr + y[:, None].to(tl.int64) * width + x[None, :], pasted.to(tl.uint8), mask=inside)
