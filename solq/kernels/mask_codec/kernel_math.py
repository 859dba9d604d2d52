"""Functions that the encoding, decoding and pasting kernels share: boxes, cosines, zigzag order, exact products."""

import triton
import triton.language as tl


@triton.jit
def load_box(boxes_ptr, index):
    """Load the corners x0, y0, x1, y1 of one box."""
    box_ptr = boxes_ptr + index * 4
    return tl.load(box_ptr), tl.load(box_ptr + 1), tl.load(box_ptr + 2), tl.load(box_ptr + 3)


@triton.jit
def cosines(frequency, position, SIZE: tl.constexpr):
    """Compute cos(π/N · frequency (position + ½)) in float32, with an error below 2e-7."""
    QUARTER_TURN: tl.constexpr = 1.5707963267948966 / SIZE
    angle = (frequency * (2 * position + 1)) % (4 * SIZE)  # in units of π / 2N: exact
    angle = tl.minimum(angle, 4 * SIZE - angle)
    x = (SIZE - angle).to(tl.float32) * QUARTER_TURN  # cos(angle) = sin(x), −π/2 ≤ x ≤ π/2
    square = x * x
    polynomial = -1.9800897e-4 + square * 2.5904885e-6
    polynomial = -0.16666648 + square * (0.0083329 + square * polynomial)
    return x + x * square * polynomial


@triton.jit
def orthonormal_scale(row, column):
    """Compute the factor that, times 2/N, makes products of two cosines orthonormal."""
    SQRT_HALF: tl.constexpr = 0.7071067811865476
    return tl.where(row == 0, SQRT_HALF, 1.0) * tl.where(column == 0, SQRT_HALF, 1.0)


@triton.jit
def zigzag_index(row, column, SIZE: tl.constexpr):
    """Compute the index of a coefficient in JPEG's zigzag order; N² for rows and columns beyond the spectrum."""
    # Past the longest diagonal the order is that of the beginning, mirrored.
    mirrored = row + column >= SIZE
    row_ = tl.where(mirrored, SIZE - 1 - row, row)
    column_ = tl.where(mirrored, SIZE - 1 - column, column)
    diagonal = row_ + column_
    index = diagonal * (diagonal + 1) // 2 + tl.where(diagonal % 2 == 0, column_, row_)
    index = tl.where(mirrored, SIZE * SIZE - 1 - index, index)
    return tl.where((row < SIZE) & (column < SIZE), index, SIZE * SIZE)


@triton.jit
def split_float32(values):
    """Split float32 `values` into two float16 parts, whose sum is exact to 22 bits."""
    high = values.to(tl.float16)
    return high, (values - high.to(tl.float32)).to(tl.float16)


@triton.jit
def dot_float32(a, b, total):
    """Compute total + a @ b to 22 bits, for values below 65,504: three products of float16 parts on tensor cores."""
    a_high, a_low = split_float32(a)
    b_high, b_low = split_float32(b)
    total = tl.dot(a_high, b_high, total)
    total = tl.dot(a_high, b_low, total)
    return tl.dot(a_low, b_high, total)
