"""The Triton kernels that decode vectors: to floats, and straight to binary masks.

Decoding is Aᵀ · spectrum · A: two small products per mask on tensor cores. A vector is divided by its largest
coefficient, so that two float16 parts can hold it; the products of the parts are exact and are summed in float32.
"""

import triton
import triton.language as tl

from .kernel_math import cosines, dot_float32, orthonormal_scale, zigzag_index


@triton.jit
def _largest_magnitude(vector_ptr, num_coefficients):
    """Find the largest absolute value of a vector's coefficients."""
    SMALLEST: tl.constexpr = 1e-30  # a vector of zeros stays zero when divided by it
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
    CORNER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Decode the pixels (y, x) of a mask."""
    values = tl.zeros((y.shape[0], x.shape[0]), tl.float32)
    for first_row in tl.range(0, CORNER, BLOCK):
        rows = first_row + tl.arange(0, BLOCK)
        half = tl.zeros((BLOCK, x.shape[0]), tl.float32)
        for first_column in tl.range(0, CORNER, BLOCK):
            columns = first_column + tl.arange(0, BLOCK)
            index = zigzag_index(rows[:, None], columns[None, :], SIZE)
            spectrum = tl.load(vector_ptr + index, mask=index < num_coefficients, other=0).to(tl.float32) / largest
            spectrum *= orthonormal_scale(rows[:, None], columns[None, :])
            half = dot_float32(spectrum, cosines(columns[:, None], x[None, :], SIZE), half)
        values = dot_float32(cosines(rows[None, :], y[:, None], SIZE), half, values)
    return values * (2.0 / SIZE * largest)


@triton.jit
def decode_kernel(
    vectors_ptr,  # (K, n)
    masks_ptr,  # (K, N, N)
    num_coefficients,
    SIZE: tl.constexpr,
    SIDE: tl.constexpr,  # N rounded up to a power of two
    CORNER: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Decode one tile of a mask: all rows, BLOCK_X columns."""
    number = tl.program_id(0).to(tl.int64)
    vector_ptr = vectors_ptr + number * num_coefficients
    y = tl.arange(0, SIDE)
    x = tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X)
    largest = _largest_magnitude(vector_ptr, num_coefficients)
    values = _decode_tile(vector_ptr, largest, y, x, num_coefficients, SIZE, CORNER, BLOCK)
    inside = (y < SIZE)[:, None] & (x < SIZE)[None, :]
    tl.store(masks_ptr + number * SIZE * SIZE + y[:, None] * SIZE + x[None, :], values, mask=inside)


@triton.jit
def decode_binary_kernel(
    vectors_ptr,  # (K, n)
    masks_ptr,  # (K, N, N) bytes
    num_coefficients,
    SIZE: tl.constexpr,
    SIDE: tl.constexpr,  # N rounded up to a power of two
    CORNER: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Decode a mask and compare its pixels with the middle between their minimum and maximum."""
    # A mask of several tiles is decoded twice, for the extremes and for the bits: cheaper than to store the floats.
    number = tl.program_id(0).to(tl.int64)
    vector_ptr = vectors_ptr + number * num_coefficients
    y = tl.arange(0, SIDE)
    largest = _largest_magnitude(vector_ptr, num_coefficients)
    lowest, highest, finite = float("inf"), float("-inf"), 1
    for first_x in tl.range(0, SIZE, BLOCK_X):
        x = first_x + tl.arange(0, BLOCK_X)
        values = _decode_tile(vector_ptr, largest, y, x, num_coefficients, SIZE, CORNER, BLOCK)
        inside = (y < SIZE)[:, None] & (x < SIZE)[None, :]
        finite = tl.minimum(finite, tl.min((values * 0 == 0).to(tl.int32)))
        lowest = tl.minimum(lowest, tl.min(tl.where(inside, values, float("inf"))))
        highest = tl.maximum(highest, tl.max(tl.where(inside, values, float("-inf"))))
    middle = (lowest + highest) / 2
    middle = tl.where(finite == 1, middle, float("nan"))  # nothing is above NaN: an empty mask

    mask_ptr = masks_ptr + number * SIZE * SIZE
    for first_x in tl.range(0, SIZE, BLOCK_X):
        x = first_x + tl.arange(0, BLOCK_X)
        values = _decode_tile(vector_ptr, largest, y, x, num_coefficients, SIZE, CORNER, BLOCK)
        inside = (y < SIZE)[:, None] & (x < SIZE)[None, :]
        tl.store(mask_ptr + y[:, None] * SIZE + x[None, :], (values > middle).to(tl.uint8), mask=inside)
