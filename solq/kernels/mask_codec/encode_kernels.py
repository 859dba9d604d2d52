"""The Triton kernels that encode masks: of N × N pixels, and full-image masks cropped by their boxes.

Encoding is A · mask · Aᵀ: two small products per mask on tensor cores. Masks of bytes are exact in float16; whatever
multiplies them is split into two float16 parts, so that all products are exact and are summed in float32. Float masks
are multiplied in float32 (three TF32 products on NVIDIA). The error is below 1e-6 of a mask's largest coefficient.
"""

import triton
import triton.language as tl

from .crop_paste import LARGEST_CORNER as _LARGEST_CORNER
from .kernel_math import cosines, dot_float32, load_box, orthonormal_scale, split_float32, zigzag_index

LARGEST_CORNER = tl.constexpr(_LARGEST_CORNER)


@triton.jit
def _low_bytes(pairs):
    """Convert the lower byte of each pair to float16."""
    # 0x6400 + byte is the float16 number 1024 + byte: cheaper than a conversion of integers.
    return (pairs & 0xFF | 0x6400).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def _high_bytes(pairs):
    """Convert the higher byte of each pair to float16."""
    return (pairs >> 8 | 0x6400).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def _transform_rows(half, tile, columns, x, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """Add `tile` (y, x) @ cosines (x, columns) to `half` (y, columns)."""
    factors = cosines(columns[None, :], x[:, None], SIZE)
    if tile.dtype == tl.float16:
        high, low = split_float32(factors)
        half = tl.dot(tile, high, half)
        half = tl.dot(tile, low, half)
    else:
        half = tl.dot(tile, factors, half, input_precision=PRECISION)
    return half


@triton.jit
def _transform_columns(spectrum, half, rows, y, SIZE: tl.constexpr, IN_PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """Add cosines (rows, y) @ `half` (y, columns) to `spectrum` (rows, columns)."""
    factors = cosines(rows[:, None], y[None, :], SIZE)
    if IN_PARTS:  # `half` are sums of at most 256 bytes, which float16 parts can hold
        spectrum = dot_float32(factors, half, spectrum)
    else:
        spectrum = tl.dot(factors, half, spectrum, input_precision=PRECISION)
    return spectrum


@triton.jit
def _store_coefficients(vector_ptr, spectrum, rows, columns, num_coefficients, SIZE: tl.constexpr):
    """Store the first coefficients of `spectrum` (rows, columns) in zigzag order."""
    index = zigzag_index(rows[:, None], columns[None, :], SIZE)
    coefficients = spectrum * orthonormal_scale(rows[:, None], columns[None, :]) * (2.0 / SIZE)
    tl.store(vector_ptr + index, coefficients, mask=index < num_coefficients)


@triton.jit
def encode_kernel(
    masks_ptr,  # (K, N, N) floats, or (K, N, N / 2) pairs of bytes
    vectors_ptr,  # (K, n)
    num_masks,
    num_coefficients,
    PAIRS: tl.constexpr,  # whether masks are of bytes: 16-bit words are unpacked two pixels at a time
    SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Encode masks of N × N pixels; a program computes the same block of the spectra of several masks."""
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
                    half = _transform_rows(half, _low_bytes(pairs), columns, 2 * pair, SIZE, PRECISION)
                    half = _transform_rows(half, _high_bytes(pairs), columns, 2 * pair + 1, SIZE, PRECISION)
                else:
                    x = first_x + tl.arange(0, BLOCK_X)
                    inside = (y < SIZE)[:, None] & (x < SIZE)[None, :]
                    tile = tl.load(mask_ptr + y[:, None] * SIZE + x[None, :], mask=inside, other=0)
                    half = _transform_rows(half, tile.to(tl.float32), columns, x, SIZE, PRECISION)
            spectrum = _transform_columns(spectrum, half, rows, y, SIZE, PAIRS, PRECISION)
        vector_ptr = vectors_ptr + tl.cast(number, tl.int64) * num_coefficients
        _store_coefficients(vector_ptr, spectrum, rows, columns, num_coefficients, SIZE)


# RoIAlign: each pixel of the crop is a bin, the average of samples that are spread evenly over it.


@triton.jit
def _bins(start, end, valid, SIZE: tl.constexpr):
    """Divide a box along one axis into N bins: where the first one starts, the size of a bin, samples per bin."""
    start = tl.where(valid, tl.minimum(tl.maximum(start, -LARGEST_CORNER), LARGEST_CORNER), 0.0) - 0.5
    end = tl.where(valid, tl.minimum(tl.maximum(end, -LARGEST_CORNER), LARGEST_CORNER), 0.0) - 0.5
    bin_size = tl.div_rn(end - start, SIZE * 1.0)
    return start, bin_size, tl.maximum(tl.ceil(bin_size), 0.0)


@triton.jit
def _samples_in_image(start, bin_size, count, index, extent):
    """Find the first sample of each bin that may lie inside the image, and how many may do so from that one on."""
    spacing = bin_size / tl.maximum(count, 1.0)
    offset = start + index * bin_size
    spacing = tl.where(spacing > 0, spacing, 1.0)
    first = tl.minimum(tl.maximum(tl.floor((-1 - offset) / spacing) - 1, 0.0), count)
    last = tl.minimum(tl.maximum(tl.ceil((extent - offset) / spacing) + 1, first), count)
    return first, (last - first).to(tl.int32)


@triton.jit
def _neighbors(start, bin_size, count, index, step, extent):
    """Find the pixels before and after sample `step` of each bin, the weight of the latter, and if it is inside."""
    position = start + index * bin_size + tl.div_rn((step + 0.5) * bin_size, count)
    inside = (position >= -1) & (position <= extent)
    position = tl.minimum(tl.maximum(position, 0.0), extent - 1.0)
    pixel = position.to(tl.int32)
    return pixel, tl.minimum(pixel + 1, extent - 1), position - pixel.to(tl.float32), inside


@triton.jit
def crop_encode_kernel(
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
    CORNER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Crop one block of a mask's box with RoIAlign, threshold it, and encode it as if all other pixels were zero."""
    number = tl.program_id(0).to(tl.int64)
    x0, y0, x1, y1 = load_box(boxes_ptr, number)
    valid = x0 * 0 + y0 * 0 + x1 * 0 + y1 * 0 == 0  # finite
    start_x, bin_x, count_x = _bins(x0, x1, valid, SIZE)
    start_y, bin_y, count_y = _bins(y0, y1, valid, SIZE)

    x = tl.program_id(2) * BLOCK_X + tl.arange(0, BLOCK_X)
    y = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    first_x, steps_x = _samples_in_image(start_x, bin_x, count_x, x.to(tl.float32), width)
    first_y, steps_y = _samples_in_image(start_y, bin_y, count_y, y.to(tl.float32), height)
    steps_x = tl.where(x < SIZE, steps_x, 0)
    steps_y = tl.where(y < SIZE, steps_y, 0)
    mask_ptr = masks_ptr + number * stride_mask

    total = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    for step_y in range(tl.max(steps_y)):
        above, below, weight_below, inside_y = _neighbors(
            start_y, bin_y, count_y, y.to(tl.float32), first_y + step_y, height
        )
        inside_y &= step_y < steps_y
        above_ptr = mask_ptr + above[:, None].to(tl.int64) * stride_y
        below_ptr = mask_ptr + below[:, None].to(tl.int64) * stride_y
        for step_x in range(tl.max(steps_x)):
            left, right, weight_right, inside_x = _neighbors(
                start_x, bin_x, count_x, x.to(tl.float32), first_x + step_x, width
            )
            inside = inside_y[:, None] & (inside_x & (step_x < steps_x))[None, :]
            left = left[None, :].to(tl.int64) * stride_x
            right = right[None, :].to(tl.int64) * stride_x
            above_left = tl.load(above_ptr + left, mask=inside, other=0).to(tl.float32)
            above_right = tl.load(above_ptr + right, mask=inside, other=0).to(tl.float32)
            below_left = tl.load(below_ptr + left, mask=inside, other=0).to(tl.float32)
            below_right = tl.load(below_ptr + right, mask=inside, other=0).to(tl.float32)
            right_ = weight_right[None, :]
            below_ = weight_below[:, None]
            total += (1 - below_) * ((1 - right_) * above_left + right_ * above_right) + below_ * (
                (1 - right_) * below_left + right_ * below_right
            )
    crop = (total >= 0.5 * count_y * count_x) & (total > 0)  # empty without samples
    tile = crop.to(tl.float16)  # exact

    block = (number * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    vector_ptr = partial_ptr + block * num_coefficients
    for first_column in tl.range(0, CORNER, BLOCK_COLUMNS):
        columns = first_column + tl.arange(0, BLOCK_COLUMNS)
        half = tl.zeros((BLOCK_Y, BLOCK_COLUMNS), tl.float32)
        half = _transform_rows(half, tile, columns, x, SIZE, PRECISION)
        for first_row in tl.range(0, CORNER, BLOCK_ROWS):
            rows = first_row + tl.arange(0, BLOCK_ROWS)
            spectrum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            spectrum = _transform_columns(spectrum, half, rows, y, SIZE, True, PRECISION)
            _store_coefficients(vector_ptr, spectrum, rows, columns, num_coefficients, SIZE)
