"""The mask codec of SOLQ (section 3.2, mask compression coding): masks to DCT vectors, and back into the image.

    vector = zigzag_n(A · mask · Aᵀ),      A[k, i] = √(2/N) cos(π/N · k (i + ½)),  A[0, i] = √(1/N)
    mask   = Aᵀ · spectrum · A,            spectrum = the n coefficients at their places, zeros elsewhere

Only the corner of the spectrum that holds the first n coefficients is computed: 32 × 32 of 128 × 128 for n = 256. Both
directions are two small matrix products per mask on tensor cores. Cosines and zigzag places are computed where they
are needed, so there are no tables to cache, to move to a device or to keep alive for a CUDA graph.

Precision. Masks of bytes are exact in float16; whatever multiplies them is split into two float16 parts, whose products
are exact and are summed in float32. Float masks are multiplied in float32 (three TF32 products on NVIDIA); vectors are
divided by their largest coefficient and split, too. The error is below 1e-6 of a mask's largest coefficient.

Full-image masks are cropped as RoIAlign does (aligned, adaptive sampling; Mask R-CNN, https://arxiv.org/abs/1703.06870)
and pasted by bilinear interpolation at pixel centres. Boxes that are inverted, empty or not finite have an empty mask.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from solq.kernels.mask_codec import dct as reference
from solq.kernels.runtime import LAUNCH_OPTIONS, backend_for

LARGEST_CORNER = tl.constexpr(reference.LARGEST_CORNER)

# ---------------------------------------------------------------------------------------------------------------------
# Cosines and places
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _cosines(frequency, position, SIZE: tl.constexpr):
    """cos(π/N · frequency (position + ½)), float32, to 2e-7."""
    QUARTER_TURN: tl.constexpr = 1.5707963267948966 / SIZE
    angle = (frequency * (2 * position + 1)) % (4 * SIZE)  # in units of π / 2N: exact
    angle = tl.minimum(angle, 4 * SIZE - angle)
    x = (SIZE - angle).to(tl.float32) * QUARTER_TURN  # cos(angle) = sin(x), −π/2 ≤ x ≤ π/2
    square = x * x
    polynomial = -1.9800897e-4 + square * 2.5904885e-6
    polynomial = -0.16666648 + square * (0.0083329 + square * polynomial)
    return x + x * square * polynomial


@triton.jit
def _scale(row, column):
    """What makes products of two cosines orthonormal, but for the factor 2/N."""
    ROOT: tl.constexpr = 0.7071067811865476
    return tl.where(row == 0, ROOT, 1.0) * tl.where(column == 0, ROOT, 1.0)


@triton.jit
def _zigzag_index(row, column, SIZE: tl.constexpr):
    """The place of a coefficient in JPEG's zigzag order; past every one for rows and columns beyond the spectrum."""
    # Past the longest diagonal the order is that of the beginning, mirrored.
    mirrored = row + column >= SIZE
    row_ = tl.where(mirrored, SIZE - 1 - row, row)
    column_ = tl.where(mirrored, SIZE - 1 - column, column)
    diagonal = row_ + column_
    index = diagonal * (diagonal + 1) // 2 + tl.where(diagonal % 2 == 0, column_, row_)
    index = tl.where(mirrored, SIZE * SIZE - 1 - index, index)
    return tl.where((row < SIZE) & (column < SIZE), index, SIZE * SIZE)


# ---------------------------------------------------------------------------------------------------------------------
# Encode
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _left_pixels(pairs):
    """0x6400 + byte is the float16 number 1024 + byte: cheaper than to convert integers."""
    return (pairs & 0xFF | 0x6400).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def _right_pixels(pairs):
    return (pairs >> 8 | 0x6400).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def _split(values):
    """Two float16 parts of float32 `values`, together exact to 22 bits."""
    high = values.to(tl.float16)
    return high, (values - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _dot(a, b, total):
    """total + a @ b of float32 below 65,504 in absolute value: three float16 products, exact to 22 bits."""
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    total = tl.dot(a_high, b_high, total)
    total = tl.dot(a_high, b_low, total)
    return tl.dot(a_low, b_high, total)


@triton.jit
def _transform_rows(half, tile, columns, x, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """Add `tile` (y, x) @ cosines (x, columns) to `half` (y, columns)."""
    cosines = _cosines(columns[None, :], x[:, None], SIZE)
    if tile.dtype == tl.float16:
        high, low = _split(cosines)
        half = tl.dot(tile, high, half)
        half = tl.dot(tile, low, half)
    else:
        half = tl.dot(tile, cosines, half, input_precision=PRECISION)
    return half


@triton.jit
def _transform_columns(spectrum, half, rows, y, SIZE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """Add cosines (rows, y) @ `half` (y, columns) to `spectrum` (rows, columns)."""
    cosines = _cosines(rows[:, None], y[None, :], SIZE)
    if EXACT:  # noqa: SIM108  # `half` are sums of at most 256 bytes
        spectrum = _dot(cosines, half, spectrum)
    else:
        spectrum = tl.dot(cosines, half, spectrum, input_precision=PRECISION)
    return spectrum


@triton.jit
def _store_coefficients(vector_ptr, spectrum, rows, columns, num_coefficients, SIZE: tl.constexpr):
    index = _zigzag_index(rows[:, None], columns[None, :], SIZE)
    coefficients = spectrum * _scale(rows[:, None], columns[None, :]) * (2.0 / SIZE)
    tl.store(vector_ptr + index, coefficients, mask=index < num_coefficients)


@triton.jit
def _encode_kernel(
    masks_ptr,  # (K, N, N) floats, or (K, N, N / 2) pairs of bytes
    vectors_ptr,  # (K, n)
    num_masks,
    num_coefficients,
    PAIRS: tl.constexpr,  # of bytes, which float16 holds exactly: 16-bit words are unpacked two at a time
    SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(2) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    for number in range(tl.program_id(0), num_masks, tl.num_programs(0)):
        mask_ptr = masks_ptr + tl.cast(number, tl.int64) * (SIZE * SIZE // (2 if PAIRS else 1))
        spectrum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for first_y in tl.range(0, SIZE, BLOCK_Y):
            y = first_y + tl.arange(0, BLOCK_Y)
            half = tl.zeros((BLOCK_Y, BLOCK_COLUMNS), tl.float32)
            for first_x in tl.range(0, SIZE, BLOCK_X):
                if PAIRS:
                    pair = first_x // 2 + tl.arange(0, BLOCK_X // 2)
                    inside = (y < SIZE)[:, None] & (pair < SIZE // 2)[None, :]
                    pairs = tl.load(mask_ptr + y[:, None] * (SIZE // 2) + pair[None, :], mask=inside, other=0)
                    pairs = pairs.to(tl.uint16, bitcast=True)
                    half = _transform_rows(half, _left_pixels(pairs), columns, 2 * pair, SIZE, PRECISION)
                    half = _transform_rows(half, _right_pixels(pairs), columns, 2 * pair + 1, SIZE, PRECISION)
                else:
                    x = first_x + tl.arange(0, BLOCK_X)
                    inside = (y < SIZE)[:, None] & (x < SIZE)[None, :]
                    tile = tl.load(mask_ptr + y[:, None] * SIZE + x[None, :], mask=inside, other=0)
                    half = _transform_rows(half, tile.to(tl.float32), columns, x, SIZE, PRECISION)
            spectrum = _transform_columns(spectrum, half, rows, y, SIZE, PAIRS, PRECISION)
        vector_ptr = vectors_ptr + tl.cast(number, tl.int64) * num_coefficients
        _store_coefficients(vector_ptr, spectrum, rows, columns, num_coefficients, SIZE)


# ---------------------------------------------------------------------------------------------------------------------
# Crop + encode
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _bins(start, end, valid, SIZE: tl.constexpr):
    """RoIAlign along one axis: where the first of N bins starts, the size of a bin, samples per bin."""
    start = tl.where(valid, tl.minimum(tl.maximum(start, -LARGEST_CORNER), LARGEST_CORNER), 0.0) - 0.5
    end = tl.where(valid, tl.minimum(tl.maximum(end, -LARGEST_CORNER), LARGEST_CORNER), 0.0) - 0.5
    bin_size = tl.div_rn(end - start, SIZE * 1.0)
    return start, bin_size, tl.maximum(tl.ceil(bin_size), 0.0)


@triton.jit
def _samples_near(start, bin_size, count, index, extent):
    """The first sample of each bin that may lie inside the image, and how many there may be from that one on."""
    spacing = bin_size / tl.maximum(count, 1.0)
    offset = start + index * bin_size
    spacing = tl.where(spacing > 0, spacing, 1.0)
    first = tl.minimum(tl.maximum(tl.floor((-1 - offset) / spacing) - 1, 0.0), count)
    last = tl.minimum(tl.maximum(tl.ceil((extent - offset) / spacing) + 1, first), count)
    return first, (last - first).to(tl.int32)


@triton.jit
def _sample(start, bin_size, count, index, step, extent):
    """The pixel before sample `step` of each bin, the one after, the share of the latter, whether it is inside."""
    position = start + index * bin_size + tl.div_rn((step + 0.5) * bin_size, count)
    inside = (position >= -1) & (position <= extent)
    position = tl.minimum(tl.maximum(position, 0.0), extent - 1.0)
    pixel = position.to(tl.int32)
    return pixel, tl.minimum(pixel + 1, extent - 1), position - pixel.to(tl.float32), inside


@triton.jit
def _crop_encode_kernel(
    masks_ptr,  # (K, H, W)
    boxes_ptr,  # (K, 4)
    partial_ptr,  # (K, blocks of the crop, n)
    stride_mask,
    stride_y,
    stride_x,
    height,
    width,
    num_coefficients,
    SIZE: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    PRECISION: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    x0 = tl.load(boxes_ptr + number * 4)
    y0 = tl.load(boxes_ptr + number * 4 + 1)
    x1 = tl.load(boxes_ptr + number * 4 + 2)
    y1 = tl.load(boxes_ptr + number * 4 + 3)
    valid = x0 * 0 + y0 * 0 + x1 * 0 + y1 * 0 == 0  # finite
    start_x, bin_x, count_x = _bins(x0, x1, valid, SIZE)
    start_y, bin_y, count_y = _bins(y0, y1, valid, SIZE)

    x = tl.program_id(2) * BLOCK_X + tl.arange(0, BLOCK_X)
    y = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    first_x, near_x = _samples_near(start_x, bin_x, count_x, x.to(tl.float32), width)
    first_y, near_y = _samples_near(start_y, bin_y, count_y, y.to(tl.float32), height)
    near_x = tl.where(x < SIZE, near_x, 0)
    near_y = tl.where(y < SIZE, near_y, 0)
    mask_ptr = masks_ptr + number * stride_mask

    total = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    for step_y in range(tl.max(near_y)):
        above, below, share_below, inside_y = _sample(
            start_y, bin_y, count_y, y.to(tl.float32), first_y + step_y, height
        )
        inside_y &= step_y < near_y
        above_ptr = mask_ptr + above[:, None].to(tl.int64) * stride_y
        below_ptr = mask_ptr + below[:, None].to(tl.int64) * stride_y
        for step_x in range(tl.max(near_x)):
            left, right, share_right, inside_x = _sample(
                start_x, bin_x, count_x, x.to(tl.float32), first_x + step_x, width
            )
            inside = inside_y[:, None] & (inside_x & (step_x < near_x))[None, :]
            left = left[None, :].to(tl.int64) * stride_x
            right = right[None, :].to(tl.int64) * stride_x
            above_left = tl.load(above_ptr + left, mask=inside, other=0).to(tl.float32)
            above_right = tl.load(above_ptr + right, mask=inside, other=0).to(tl.float32)
            below_left = tl.load(below_ptr + left, mask=inside, other=0).to(tl.float32)
            below_right = tl.load(below_ptr + right, mask=inside, other=0).to(tl.float32)
            right_ = share_right[None, :]
            below_ = share_below[:, None]
            total += (1 - below_) * ((1 - right_) * above_left + right_ * above_right) + below_ * (
                (1 - right_) * below_left + right_ * below_right
            )
    crop = (total >= 0.5 * count_y * count_x) & (total > 0)  # without samples nothing
    tile = crop.to(tl.float16)  # exact

    block = (number * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    vector_ptr = partial_ptr + block * num_coefficients
    for first_column in tl.range(0, KEPT, BLOCK_COLUMNS):
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        half = tl.zeros((BLOCK_Y, BLOCK_COLUMNS), tl.float32)
        half = _transform_rows(half, tile, columns, x, SIZE, PRECISION)
        for first_row in tl.range(0, KEPT, BLOCK_ROWS):
            rows = first_row + tl.arange(0, BLOCK_ROWS)
            spectrum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            spectrum = _transform_columns(spectrum, half, rows, y, SIZE, True, PRECISION)
            _store_coefficients(vector_ptr, spectrum, rows, columns, num_coefficients, SIZE)


# ---------------------------------------------------------------------------------------------------------------------
# Decode
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _largest(vector_ptr, num_coefficients):
    """The largest coefficient's absolute value; decoding divides by it, so that float16 can hold everything."""
    SMALLEST: tl.constexpr = 1e-30  # zero vectors stay zero
    largest = tl.full((1024,), SMALLEST, tl.float32)
    for first in tl.range(0, num_coefficients, 1024):
        index = first + tl.arange(0, 1024)
        coefficients = tl.load(vector_ptr + index, mask=index < num_coefficients, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(coefficients))
    return tl.max(largest)


@triton.jit
def _decode_tile(
    vector_ptr,
    largest,
    y,
    x,
    num_coefficients,
    SIZE: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pixels (y, x) of a decoded mask."""
    values = tl.zeros((y.shape[0], x.shape[0]), tl.float32)
    for first_row in tl.range(0, KEPT, BLOCK):
        rows = first_row + tl.arange(0, BLOCK)
        half = tl.zeros((BLOCK, x.shape[0]), tl.float32)
        for first_column in tl.range(0, KEPT, BLOCK):
            columns = first_column + tl.arange(0, BLOCK)
            index = _zigzag_index(rows[:, None], columns[None, :], SIZE)
            spectrum = tl.load(vector_ptr + index, mask=index < num_coefficients, other=0).to(tl.float32) / largest
            spectrum *= _scale(rows[:, None], columns[None, :])
            half = _dot(spectrum, _cosines(columns[:, None], x[None, :], SIZE), half)
        values = _dot(_cosines(rows[None, :], y[:, None], SIZE), half, values)
    return values * (2.0 / SIZE * largest)


@triton.jit
def _decode_kernel(
    vectors_ptr,  # (K, n)
    masks_ptr,  # (K, N, N)
    num_coefficients,
    SIZE: tl.constexpr,
    SIDE: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    vector_ptr = vectors_ptr + number * num_coefficients
    y = tl.arange(0, SIDE)
    x = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    largest = _largest(vector_ptr, num_coefficients)
    values = _decode_tile(vector_ptr, largest, y, x, num_coefficients, SIZE, KEPT, BLOCK)
    inside = (y < SIZE)[:, None] & (x < SIZE)[None, :]
    tl.store(masks_ptr + number * SIZE * SIZE + y[:, None] * SIZE + x[None, :], values, mask=inside)


@triton.jit
def _decode_binary_kernel(
    vectors_ptr,  # (K, n)
    masks_ptr,  # (K, N, N) bytes
    num_coefficients,
    SIZE: tl.constexpr,
    SIDE: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    # Masks of several tiles are decoded twice, for the extremes and for the bits: cheaper than to store the floats.
    number = tl.program_id(0).to(tl.int64)
    vector_ptr = vectors_ptr + number * num_coefficients
    y = tl.arange(0, SIDE)
    largest = _largest(vector_ptr, num_coefficients)
    lowest, highest, finite = float("inf"), float("-inf"), 1
    for first_x in tl.range(0, SIZE, BLOCK_X):
        x = first_x + tl.arange(0, BLOCK_X)
        values = _decode_tile(vector_ptr, largest, y, x, num_coefficients, SIZE, KEPT, BLOCK)
        inside = (y < SIZE)[:, None] & (x < SIZE)[None, :]
        finite = tl.minimum(finite, tl.min((values * 0 == 0).to(tl.int32)))
        lowest = tl.minimum(lowest, tl.min(tl.where(inside, values, float("inf"))))
        highest = tl.maximum(highest, tl.max(tl.where(inside, values, float("-inf"))))
    middle = (lowest + highest) / 2
    middle = tl.where(finite == 1, middle, float("nan"))  # nothing is above NaN: an empty mask

    mask_ptr = masks_ptr + number * SIZE * SIZE
    for first_x in tl.range(0, SIZE, BLOCK_X):
        x = first_x + tl.arange(0, BLOCK_X)
        values = _decode_tile(vector_ptr, largest, y, x, num_coefficients, SIZE, KEPT, BLOCK)
        inside = (y < SIZE)[:, None] & (x < SIZE)[None, :]
        tl.store(mask_ptr + y[:, None] * SIZE + x[None, :], (values > middle).to(tl.uint8), mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# Paste
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _reach(start, end, extent):
    """The pixels first … last whose centres can lie inside a box. Farther out the zeros around a mask are closer."""
    first = tl.minimum(tl.maximum(start - 1, 0.0), extent * 1.0)
    last = tl.minimum(tl.maximum(end + 1, 0.0), extent * 1.0)
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit
def _paste_kernel(
    masks_ptr,  # (K, N, N) bytes
    boxes_ptr,  # (K, 4)
    images_ptr,  # (K, H, W) bytes, zeros
    height,
    width,
    SIZE: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    x0 = tl.load(boxes_ptr + number * 4)
    y0 = tl.load(boxes_ptr + number * 4 + 1)
    x1 = tl.load(boxes_ptr + number * 4 + 2)
    y1 = tl.load(boxes_ptr + number * 4 + 3)
    valid = (x1 > x0) & (y1 > y0) & ((x1 - x0) * 0 + (y1 - y0) * 0 == 0)
    left, right = _reach(tl.where(valid, x0, 0.0), tl.where(valid, x1, 0.0), width)
    top, bottom = _reach(tl.where(valid, y0, 0.0), tl.where(valid, y1, 0.0), height)
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
        # Farther out than one cell all four neighbours are outside; the limits keep the integers small.
        cell_x = tl.floor(tl.minimum(tl.maximum(position_x, -2.0), SIZE + 1.0))
        cell_y = tl.floor(tl.minimum(tl.maximum(position_y, -2.0), SIZE + 1.0))
        share_x = (position_x - cell_x)[None, :]
        share_y = (position_y - cell_y)[:, None]
        column = cell_x.to(tl.int32)[None, :]
        row = cell_y.to(tl.int32)[:, None]
        column_in, next_column_in = (column >= 0) & (column < SIZE), (column >= -1) & (column < SIZE - 1)
        row_in, next_row_in = (row >= 0) & (row < SIZE), (row >= -1) & (row < SIZE - 1)
        cell_ptr = mask_ptr + row * SIZE + column
        here = tl.load(cell_ptr, mask=row_in & column_in, other=0).to(tl.float32)
        right_of = tl.load(cell_ptr + 1, mask=row_in & next_column_in, other=0).to(tl.float32)
        below = tl.load(cell_ptr + SIZE, mask=next_row_in & column_in, other=0).to(tl.float32)
        across = tl.load(cell_ptr + SIZE + 1, mask=next_row_in & next_column_in, other=0).to(tl.float32)
        upper = here + share_x * (right_of - here)
        lower = below + share_x * (across - below)
        pasted = upper + share_y * (lower - upper) >= 0.5
        inside = (y < bottom)[:, None] & (x < right)[None, :]
        tl.store(image_ptr + y[:, None].to(tl.int64) * width + x[None, :], pasted.to(tl.uint8), mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------------------------

# AMD's matrix cores multiply float32; on NVIDIA three TF32 products make one of float32.
PRECISION = "ieee" if torch.version.hip else "tf32x3"
# Two encoding programs fill a multiprocessor's registers; NVIDIA's assembler rather spills than uses so many unasked.
ENCODE_REGISTERS = {"maxnreg": 255}

DECODE_PIXELS, BINARY_PIXELS = 8192, 16384  # a binary mask of 128 × 128 is one tile: decoded once


def _kept(size: int, num_coefficients: int) -> int:
    """The side of the corner of the spectrum to compute, as matrix products like it."""
    return max(16, triton.next_power_of_2(reference.kept_rows(size, num_coefficients)))


def _encode_blocks(size: int, num_coefficients: int, pairs: bool) -> dict[str, int]:
    block = min(_kept(size, num_coefficients), 32)
    side = triton.next_power_of_2(size)
    blocks = {"PAIRS": pairs, "SIZE": size, "BLOCK_ROWS": block, "BLOCK_COLUMNS": block}
    if not pairs:
        return blocks | {"BLOCK_Y": min(side, 32), "BLOCK_X": min(side, 32), "num_warps": 8}
    # A whole mask of up to 128 × 128 bytes is in flight while the one before it is transformed. Pairs of pixels are
    # multiplied 16 or more at a time, which tensor cores ask for.
    return blocks | {"BLOCK_Y": min(side, 128), "BLOCK_X": max(side, 32) if side <= 128 else 64, "num_warps": 4}


def _crop_blocks(size: int, num_coefficients: int) -> dict[str, int]:
    kept = _kept(size, num_coefficients)
    return {
        "SIZE": size,
        "KEPT": kept,
        "BLOCK_ROWS": min(kept, 32),
        "BLOCK_COLUMNS": min(kept, 32),
        "BLOCK_Y": 16,
        "BLOCK_X": min(triton.next_power_of_2(size), 128),
        "num_warps": 8,
    }


def _decode_blocks(size: int, num_coefficients: int, pixels: int) -> dict[str, int]:
    """The blocks for tiles of so many pixels, over all rows of a mask."""
    kept = _kept(size, num_coefficients)
    side = triton.next_power_of_2(size)
    return {
        "SIZE": size,
        "SIDE": side,
        "KEPT": kept,
        "BLOCK": min(kept, 32),
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
    """Two bytes in one number of 16 bits."""
    masks = masks.contiguous()
    return (masks.clone() if masks.data_ptr() % 2 else masks).view(torch.int16)


def _launch_encode(masks: Tensor, num_coefficients: int) -> Tensor:
    K, size = masks.shape[0], masks.shape[-1]
    vectors = masks.new_empty(K, num_coefficients, dtype=torch.float32)
    if K:
        pairs = not masks.is_floating_point()
        blocks = _encode_blocks(size, num_coefficients, pairs)
        corner = triton.cdiv(_kept(size, num_coefficients), blocks["BLOCK_ROWS"])
        # No more programs than fit on a multiprocessor: each computes its cosines once.
        programs = triton.cdiv((4 if size <= 64 else 2) * _multiprocessors(masks), corner**2)
        grid = (min(K, programs), corner, corner)
        with torch.cuda.device_of(masks):
            _encode_kernel[grid](
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


def _launch_crop_encode(masks: Tensor, boxes: Tensor, size: int, num_coefficients: int) -> Tensor:
    K, H, W = masks.shape
    if not K:
        return masks.new_empty(0, num_coefficients, dtype=torch.float32)
    blocks = _crop_blocks(size, num_coefficients)
    grid = (K, triton.cdiv(size, blocks["BLOCK_Y"]), triton.cdiv(size, blocks["BLOCK_X"]))
    # The transform is linear: each block of the crop adds its part to the vector.
    partial = masks.new_empty(K, grid[1] * grid[2], num_coefficients, dtype=torch.float32)
    with torch.cuda.device_of(masks):
        _crop_encode_kernel[grid](
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


def _launch_decode(coefficients: Tensor, size: int) -> Tensor:
    K, n = coefficients.shape
    masks = coefficients.new_empty(K, size, size, dtype=torch.float32)
    if K:
        blocks = _decode_blocks(size, n, DECODE_PIXELS)
        with torch.cuda.device_of(coefficients):
            _decode_kernel[(K, triton.cdiv(size, blocks["BLOCK_X"]))](
                coefficients.contiguous(), masks, n, **blocks, **LAUNCH_OPTIONS
            )
    return masks


def _launch_decode_binary(coefficients: Tensor, size: int) -> Tensor:
    K, n = coefficients.shape
    masks = coefficients.new_empty(K, size, size, dtype=torch.bool)
    if K:
        blocks = _decode_blocks(size, n, BINARY_PIXELS)
        with torch.cuda.device_of(coefficients):
            _decode_binary_kernel[(K,)](coefficients.contiguous(), _as_bytes(masks), n, **blocks, **LAUNCH_OPTIONS)
    return masks


PASTE_BLOCK = {"BLOCK_Y": 16, "BLOCK_X": 64}


def _launch_paste(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    K, size = masks.shape[0], masks.shape[-1]
    images = masks.new_zeros(K, height, width, dtype=torch.bool)
    if images.numel():
        tiles = triton.cdiv(height, PASTE_BLOCK["BLOCK_Y"]) * triton.cdiv(width, PASTE_BLOCK["BLOCK_X"])
        grid = (K, min(tiles, triton.cdiv(16 * _multiprocessors(masks), K)))
        with torch.cuda.device_of(masks):
            _paste_kernel[grid](
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


# ---------------------------------------------------------------------------------------------------------------------
# Operators
# ---------------------------------------------------------------------------------------------------------------------
# Their definitions loop over masks and boxes, which no tracer should unroll: that is why these operators run on the CPU
# too, and choose the backend themselves. Autocast must not round the products of the definitions to bfloat16.


@torch.library.custom_op("solq::dct_encode", mutates_args=())
def _dct_encode(masks: Tensor, num_coefficients: int) -> Tensor:
    if backend_for(masks) == "triton":
        return _launch_encode(masks, num_coefficients)
    with torch.autocast(masks.device.type, enabled=False):
        return reference.dct_encode(masks, num_coefficients)


@torch.library.custom_op("solq::dct_decode", mutates_args=())
def _dct_decode(coefficients: Tensor, size: int) -> Tensor:
    if backend_for(coefficients) == "triton":
        return _launch_decode(coefficients, size)
    with torch.autocast(coefficients.device.type, enabled=False):
        return reference.dct_decode(coefficients, size)


@torch.library.custom_op("solq::dct_decode_binary", mutates_args=())
def _dct_decode_binary(coefficients: Tensor, size: int) -> Tensor:
    if backend_for(coefficients) == "triton":
        return _launch_decode_binary(coefficients, size)
    with torch.autocast(coefficients.device.type, enabled=False):
        return reference.dct_decode_binary(coefficients, size)


@torch.library.custom_op("solq::crop_dct_encode", mutates_args=())
def _crop_dct_encode(masks: Tensor, boxes: Tensor, size: int, num_coefficients: int) -> Tensor:
    if backend_for(masks) == "triton":
        return _launch_crop_encode(masks, boxes, size, num_coefficients)
    with torch.autocast(masks.device.type, enabled=False):
        return reference.crop_dct_encode(masks, boxes, size, num_coefficients)


@torch.library.custom_op("solq::paste_masks", mutates_args=())
def _paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    if backend_for(masks) == "triton":
        return _launch_paste(masks, boxes, height, width)
    with torch.autocast(masks.device.type, enabled=False):
        return reference.paste_masks(masks, boxes, (height, width))


@torch.library.custom_op("solq::dct_decode_paste", mutates_args=())
def _dct_decode_paste(coefficients: Tensor, boxes: Tensor, height: int, width: int, size: int) -> Tensor:
    if backend_for(coefficients) == "triton":
        return _launch_paste(_launch_decode_binary(coefficients, size), boxes, height, width)
    with torch.autocast(coefficients.device.type, enabled=False):
        return reference.dct_decode_paste(coefficients, boxes, (height, width), size)


@_dct_encode.register_fake
def _(masks: Tensor, num_coefficients: int) -> Tensor:
    return masks.new_empty(masks.shape[0], num_coefficients, dtype=torch.float32)


@_dct_decode.register_fake
def _(coefficients: Tensor, size: int) -> Tensor:
    return coefficients.new_empty(coefficients.shape[0], size, size, dtype=torch.float32)


@_dct_decode_binary.register_fake
def _(coefficients: Tensor, size: int) -> Tensor:
    return coefficients.new_empty(coefficients.shape[0], size, size, dtype=torch.bool)


@_crop_dct_encode.register_fake
def _(masks: Tensor, boxes: Tensor, size: int, num_coefficients: int) -> Tensor:
    return masks.new_empty(masks.shape[0], num_coefficients, dtype=torch.float32)


@_paste_masks.register_fake
def _(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    return masks.new_empty(masks.shape[0], height, width, dtype=torch.bool)


@_dct_decode_paste.register_fake
def _(coefficients: Tensor, boxes: Tensor, height: int, width: int, size: int) -> Tensor:
    return coefficients.new_empty(coefficients.shape[0], height, width, dtype=torch.bool)


# Encode and decode are linear, and the matrix of one is the transpose of the other's.


def _save_masks(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.size, ctx.dtype = inputs[0].shape[-1], inputs[0].dtype


def _save_coefficients(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.num_coefficients, ctx.dtype = inputs[0].shape[-1], inputs[0].dtype


_dct_encode.register_autograd(
    lambda ctx, grad: (_dct_decode(grad, ctx.size).to(ctx.dtype), None), setup_context=_save_masks
)
_dct_decode.register_autograd(
    lambda ctx, grad: (_dct_encode(grad, ctx.num_coefficients).to(ctx.dtype), None), setup_context=_save_coefficients
)

# ---------------------------------------------------------------------------------------------------------------------
# Public functions
# ---------------------------------------------------------------------------------------------------------------------


def _check_size(size: int, name: str = "size") -> None:
    if isinstance(size, float) or size % 16 or not 16 <= size <= 256:
        raise ValueError(f"{name} is {size}, must be a multiple of 16 from 16 to 256")


def _check_count(num_coefficients: int, size: int, name: str = "num_coefficients") -> None:
    if isinstance(num_coefficients, float) or not 1 <= num_coefficients <= size * size:
        raise ValueError(
            f"{name} is {num_coefficients}, must be a whole number in 1..{size * size} for masks of {size} × {size}"
        )


def _check_masks(masks: Tensor, shape: str) -> None:
    if masks.ndim != 3:
        raise ValueError(f"masks has shape {tuple(masks.shape)}, must be {shape}")
    if masks.dtype not in (torch.bool, torch.uint8) and not masks.is_floating_point():
        raise ValueError(f"masks is {masks.dtype}, must be bool, uint8 or floating-point")


def _check_coefficients(coefficients: Tensor, size: int) -> None:
    _check_size(size)
    if coefficients.ndim != 2:
        raise ValueError(f"coefficients has shape {tuple(coefficients.shape)}, must be (K, n)")
    if not coefficients.is_floating_point():
        raise ValueError(f"coefficients is {coefficients.dtype}, must be a floating-point tensor")
    _check_count(coefficients.shape[1], size, "the length of coefficients")


def _check_boxes(boxes: Tensor, others: Tensor, name: str) -> None:
    if boxes.ndim != 2 or boxes.shape[0] != others.shape[0] or boxes.shape[1] != 4:
        raise ValueError(
            f"boxes has shape {tuple(boxes.shape)}, must be {(others.shape[0], 4)}: one x0 y0 x1 y1 for each of {name}"
        )
    if boxes.is_complex() or boxes.dtype == torch.bool:
        raise ValueError(f"boxes is {boxes.dtype}, must be real numbers")
    if boxes.device != others.device:
        raise ValueError(f"boxes is on {boxes.device} but {name} on {others.device}: move them to one device")


def _check_paste(masks: Tensor, boxes: Tensor) -> None:
    if masks.ndim != 3 or masks.shape[1] != masks.shape[2]:
        raise ValueError(f"masks has shape {tuple(masks.shape)}, must be square: (K, N, N)")
    if masks.dtype not in (torch.bool, torch.uint8):
        raise ValueError(f"masks is {masks.dtype}, must be bool or uint8")
    _check_boxes(boxes, masks, "masks")


def _check_image_size(image_size: tuple[int, int]) -> tuple[int, int]:
    if len(image_size) != 2 or min(image_size) < 1 or any(isinstance(side, float) for side in image_size):
        raise ValueError(f"image_size is {tuple(image_size)}, must be (H, W), whole numbers from 1 on")
    return image_size[0], image_size[1]


def dct_encode(masks: Tensor, num_coefficients: int = 256) -> Tensor:
    """The first n coefficients, in zigzag order, of the orthonormal two-dimensional DCT-II of each mask.

    Args:
        masks: (K, N, N) bool, uint8 or any float dtype; N a multiple of 16 up to 256.
        num_coefficients: n, in 1..N².

    Returns:
        (K, n) float32. Differentiable with respect to float masks.

    Raises:
        ValueError: if masks are not square or of another size or dtype, or n is larger than N².
    """
    _check_masks(masks, "(K, N, N)")
    if masks.shape[1] != masks.shape[2]:
        raise ValueError(f"masks has shape {tuple(masks.shape)}, must be square: (K, N, N)")
    _check_size(masks.shape[2], "the side of masks")
    _check_count(num_coefficients, masks.shape[2])
    return _dct_encode(masks, num_coefficients)


def dct_decode(coefficients: Tensor, size: int = 128) -> Tensor:
    """The masks whose first DCT coefficients are given, the others being zero: the inverse of `dct_encode`.

    Args:
        coefficients: (K, n) any float dtype.
        size: N, the side of the masks, a multiple of 16 up to 256.

    Returns:
        (K, N, N) float32. Differentiable.

    Raises:
        ValueError: if N is another number or n is larger than N².
    """
    _check_coefficients(coefficients, size)
    if backend_for(coefficients) == "triton" or torch.is_autocast_enabled(coefficients.device.type):
        return _dct_decode(coefficients, size)
    return reference.dct_decode(coefficients, size)  # two products: exports of a model carry them as they are


def dct_decode_binary(coefficients: Tensor, size: int = 128) -> Tensor:
    """`dct_decode`, True above the middle between each mask's own minimum and maximum.

    Arguments and errors are those of `dct_decode`.

    Returns:
        (K, N, N) bool. Vectors that are not finite, or zero, give empty masks. Has no gradient.
    """
    _check_coefficients(coefficients, size)
    return _dct_decode_binary(coefficients.detach(), size)


def crop_dct_encode(masks: Tensor, boxes: Tensor, size: int = 128, num_coefficients: int = 256) -> Tensor:
    """`dct_encode` of full-image masks cropped by their boxes with RoIAlign and thresholded at ≥ 0.5.

    RoIAlign is torchvision's ``roi_align(…, size, aligned=True)`` with adaptive sampling.

    Args:
        masks: (K, H, W) bool, uint8 or any float dtype.
        boxes: (K, 4) x0 y0 x1 y1 in pixels. Inverted, empty and not finite boxes give zero vectors.
        size: N, the side of the cropped masks, a multiple of 16 up to 256.
        num_coefficients: n, in 1..N².

    Returns:
        (K, n) float32. Has no gradient.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or n is larger than N².
    """
    _check_masks(masks, "(K, H, W)")
    if masks.shape[1] < 1 or masks.shape[2] < 1:
        raise ValueError(f"masks has shape {tuple(masks.shape)}, must be (K, H, W) with H and W at least 1")
    _check_boxes(boxes, masks, "masks")
    _check_size(size)
    _check_count(num_coefficients, size)
    return _crop_dct_encode(masks.detach(), boxes.detach(), size, num_coefficients)


def paste_masks(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Masks stretched over their boxes in an image: bilinear at pixel centres, zero around a mask, True where ≥ 0.5.

    Args:
        masks: (K, N, N) bool, or uint8 of zeros and ones; any N.
        boxes: (K, 4) x0 y0 x1 y1 in pixels. Inverted, empty and not finite boxes give empty masks, those that leave
            the image their visible part.
        image_size: (H, W).

    Returns:
        (K, H, W) bool. Has no gradient.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit.
    """
    _check_paste(masks, boxes)
    return _paste_masks(masks, boxes.detach(), *_check_image_size(image_size))


def dct_decode_paste(coefficients: Tensor, boxes: Tensor, image_size: tuple[int, int], size: int = 128) -> Tensor:
    """`dct_decode_binary`, then `paste_masks`: from vectors to masks of the whole image.

    Args:
        coefficients: (K, n) any float dtype.
        boxes: (K, 4) x0 y0 x1 y1 in pixels.
        image_size: (H, W).
        size: N, the side of the decoded masks, a multiple of 16 up to 256.

    Returns:
        (K, H, W) bool. Has no gradient.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or n is larger than N².
    """
    _check_coefficients(coefficients, size)
    _check_boxes(boxes, coefficients, "coefficients")
    return _dct_decode_paste(coefficients.detach(), boxes.detach(), *_check_image_size(image_size), size)


def paste_runs(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where the images of `paste_masks` change from 0 to 1 or back, column by column: COCO's run lengths, summed up.

    On a CPU the images are never made, on a GPU they never leave it. How many changes there are depends on the values,
    so that the host waits for a GPU; not for `torch.export`.

    Arguments and errors are those of `paste_masks`.

    Returns:
        Places x·H + y (R,) int64 where a pixel differs from the one before it, 0 standing before the first: those of
        the first mask, of the second, …; how many each mask has (K,) int64.
    """
    _check_paste(masks, boxes)
    image_size = _check_image_size(image_size)
    if backend_for(masks) == "triton":
        return reference.mask_runs(_paste_masks(masks, boxes.detach(), *image_size))
    return reference.paste_runs(masks, boxes.detach(), image_size)


# ---------------------------------------------------------------------------------------------------------------------
# What benchmarks/compile_report.py compiles
# ---------------------------------------------------------------------------------------------------------------------


def compile_cases() -> Iterator[tuple[Any, ...]]:
    for precision, targets in (("tf32x3", ("sm_80", "sm_90", "sm_100")), ("ieee", ("gfx942",))):

        def case(
            label: str, kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], **expectations: Any
        ) -> tuple[Any, ...]:
            constexprs = dict(constexprs)
            num_warps = constexprs.pop("num_warps", 4)
            if "PRECISION" in kernel.arg_names:
                constexprs["PRECISION"] = precision  # noqa: B023
            pointers = [name for name in signature if name.endswith("_ptr")]
            return label, kernel, signature, constexprs, pointers, num_warps, 3, {**expectations, "targets": targets}  # noqa: B023

        for size, n in ((128, 256), (256, 400), (64, 64), (256, 65536), (16, 256)):
            shape = f"N={size} n={n}"
            for label, dtype in (("bytes", "i16"), ("fp32", "fp32")):
                yield case(
                    f"dct_encode {label} {shape}",
                    _encode_kernel,
                    {"masks_ptr": f"*{dtype}", "vectors_ptr": "*fp32", "num_masks": "i32", "num_coefficients": "i32"},
                    _encode_blocks(size, n, pairs=label == "bytes"),
                    load=0 if size == 16 else 16 if label == "bytes" else 8,
                    options={} if precision == "ieee" else ENCODE_REGISTERS,
                )
            decode = {"vectors_ptr": "*fp32", "masks_ptr": "*fp32", "num_coefficients": "i32"}
            yield case(f"dct_decode {shape}", _decode_kernel, decode, _decode_blocks(size, n, DECODE_PIXELS))
            decode["masks_ptr"] = "*u8"
            yield case(
                f"dct_decode_binary {shape}", _decode_binary_kernel, decode, _decode_blocks(size, n, BINARY_PIXELS)
            )
            yield case(
                f"crop_dct_encode u8 {shape}",
                _crop_encode_kernel,
                {"masks_ptr": "*u8", "boxes_ptr": "*fp32", "partial_ptr": "*fp32"}
                | dict.fromkeys(("stride_mask", "stride_y", "stride_x", "height", "width", "num_coefficients"), "i32"),
                _crop_blocks(size, n),
            )
        yield case(
            "paste_masks N=128",
            _paste_kernel,
            {"masks_ptr": "*u8", "boxes_ptr": "*fp32", "images_ptr": "*u8", "height": "i32", "width": "i32"},
            {"SIZE": 128, **PASTE_BLOCK},
        )
