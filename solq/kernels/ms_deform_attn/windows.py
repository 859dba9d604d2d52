"""An experiment that no GPU has judged yet: sum the gradient of `value` in windows before adding it to memory.

In an encoder, where queries are the pixels themselves, the atomic additions of the direct backward kernel are far more
bytes than all else. Here a program takes 64 queries, 8 × 8 pixels, whose samples of one level lie close together: row
by row of a window of 16 × 16 pixels around their mean, the gradient is a matrix product, hat functions (pixels,
queries) times output gradients (queries, channels), on tensor cores, with operands split in two so that nothing is
rounded. One atomic addition per pixel of the window remains. Samples outside the window are added corner by corner.
The result is correct for any queries; S = Q only suggests that neighboring ones belong together.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime import INTERPRETED, LAUNCH_OPTIONS, architecture
from . import configuration
from .configuration import LAUNCH_TABLE, Problem, has_vector_atomics
from .rows import add_to_gradient
from .sampling import hat, load_level, load_sample, pixel_transform, program_tile, softmax_terms

MAX_WINDOW_CHANNELS = {torch.bfloat16: 128, torch.float16: 64, torch.float32: 64}


@triton.jit
def pixel_in_strips(position, levels_ptr, L: tl.constexpr, STRIP: tl.constexpr):
    """Return the pixel number `position` when each level is read in strips of STRIP rows, a strip column by column."""
    pixel = position
    start = 0
    for level in range(L):
        height, width, _start = load_level(levels_ptr, level, L)
        inside = (position >= start) & (position < start + height * width)
        within = tl.where(inside, position - start, 0)
        top = within // (STRIP * width) * STRIP
        within -= top * width
        rows = tl.minimum(height - top, STRIP)
        pixel = tl.where(inside, start + (top + within % rows) * width + within // rows, pixel)
        start += height * width
    return pixel


@triton.jit
def load_sample_inside(
    coordinates_ptr, weights_ptr, sample, first_sample, softmax, transform, in_queries, height, width,
    REFERENCE_SIZE: tl.constexpr,
):  # fmt: skip
    """Load position and weight of a sample of each query: (-2, -2), outside all windows, and 0 if it meets no pixel."""
    _offset_x, _offset_y, x, y, weight = load_sample(
        coordinates_ptr, weights_ptr, sample, first_sample, softmax, transform, REFERENCE_SIZE, tl.float32
    )
    meets = in_queries & (x > -1.0) & (x < width) & (y > -1.0) & (y < height)
    return tl.where(meets, x, -2.0), tl.where(meets, y, -2.0), tl.where(meets, weight, 0.0)


@triton.jit
def expand_all(tensors, AXIS: tl.constexpr):
    """Give each one-dimensional tensor a second axis, of size 1."""
    expanded = ()
    for i in tl.static_range(len(tensors)):
        expanded += (tl.expand_dims(tensors[i], AXIS),)  # type: ignore[assignment]
    return expanded


@triton.jit
def is_in_window(x, y, left, top, WINDOW: tl.constexpr):
    """Return whether all pixels that a sample meets are inside the window."""
    return (x >= left) & (x < left + (WINDOW - 1)) & (y >= top) & (y < top + (WINDOW - 1))


@triton.jit
def add_positions(x, y, count, other_x, other_y, other_count):
    """Combine two sums of positions: for `tl.reduce`."""
    return x + other_x, y + other_y, count + other_count


@triton.jit
def join_extents(above, below, outside, other_above, other_below, other_outside):
    """Combine two ranges of rows, and the bits of points outside: for `tl.reduce`."""
    return tl.maximum(above, other_above), tl.maximum(below, other_below), outside | other_outside


@triton.jit
def split_exactly(x, DTYPE: tl.constexpr):
    """Split x into a sum of two numbers that a tensor core multiplies exactly: bfloat16, or float32 cut to TF32."""
    if DTYPE == tl.float32:  # noqa: SIM108, SIM300
        high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    else:
        high = x.to(DTYPE)
    return high, (x - high.to(tl.float32)).to(DTYPE)


@triton.jit
def multiply_exactly(weights, grads, PRECISION: tl.constexpr):
    """Compute weights @ the sum of `grads`, in products that tensor cores compute exactly."""
    high, low = split_exactly(weights, grads[0].dtype)
    product = tl.dot(low, grads[0], input_precision=PRECISION)
    if len(grads) == 2:
        product = tl.dot(high, grads[1], product, input_precision=PRECISION)
    return tl.dot(high, grads[0], product, input_precision=PRECISION)


@triton.jit
def add_samples_outside(
    grad_value_ptr, scale_ptr, grad_output_ptr, coordinates_ptr, weights_ptr, query, in_queries, softmax, transform,
    level, window, outside,
    REFERENCE_SIZE: tl.constexpr, P: tl.constexpr, SAMPLES: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Add the samples outside the window corner by corner, for the points whose bit is set in `outside`.

    `level` is its height, width and first pixel, `window` the column and row of its first pixel.
    """
    height, width, start = level
    left, top = window
    for point in range(P):
        if (outside >> point) & 1:
            x, y, weight = load_sample_inside(
                coordinates_ptr, weights_ptr, point, query * SAMPLES, softmax, transform, in_queries, height, width,
                REFERENCE_SIZE,
            )  # fmt: skip
            weight = tl.where(is_in_window(x, y, left, top, WINDOW), 0.0, weight)
            for first in range(0, D, 16):
                channel = first + tl.arange(0, 16)[None, :]
                grads = tl.load(grad_output_ptr + query * STRIDE + channel, mask=in_queries & (channel < D), other=0.0)
                for corner in range(4):
                    column = tl.floor(x).to(tl.int32) + corner % 2
                    row = tl.floor(y).to(tl.int32) + corner // 2
                    share = weight * hat(x - column) * hat(y - row)
                    exists = (column >= 0) & (column < width) & (row >= 0) & (row < height) & (share != 0.0)
                    pixel_ptr = grad_value_ptr + (start + row * width + column).to(tl.int64) * STRIDE + channel
                    add_to_gradient(pixel_ptr, scale_ptr, grads * share, exists & (channel < D))


@triton.jit(do_not_specialize=["num_rows"])
def window_kernel(
    grad_value_ptr, scale_ptr, grad_output_ptr, levels_ptr, reference_ptr, coordinates_ptr, weights_ptr,
    num_rows,
    M: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, REFERENCE_SIZE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr, STRIP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add up the gradient of `value` in one window per level, for 64 queries and one head of one image."""
    K: tl.constexpr = L * P
    image, head, tile = program_tile(num_rows, M, BLOCK_QUERIES)
    position = tile + tl.arange(0, BLOCK_QUERIES)
    in_queries = position < num_rows
    query = pixel_in_strips(tl.minimum(position, num_rows - 1), levels_ptr, L, STRIP)
    first_query = image * num_rows
    grad_value_ptr += (first_query * M + head) * D
    coordinates_ptr += (first_query * M + head) * (2 * K)
    weights_ptr += (first_query * M + head) * K
    reference_ptr += first_query * (L * REFERENCE_SIZE)

    softmax = ()
    if REFERENCE_SIZE > 0:
        softmax = softmax_terms(weights_ptr + query * (M * K), tl.zeros_like(query), K, BLOCK_K, 1, tl.float32)
    channel = tl.arange(0, BLOCK_D)[None, :]
    grad_output_ptr += (first_query * M + head) * D
    grad_ptr = grad_output_ptr + query[:, None] * (M * D) + channel
    grads = (tl.load(grad_ptr, mask=in_queries[:, None] & (channel < D), other=0.0).to(OPERAND),)
    if grad_output_ptr.dtype.element_ty == tl.float32:
        grads = split_exactly(grads[0], tl.float32)

    for level in range(L):
        height, width, start = load_level(levels_ptr, level, L)
        transform = pixel_transform(
            reference_ptr, query[None, :], level, height, width, L, P, REFERENCE_SIZE, tl.float32
        )
        xs = ()
        ys = ()
        weights = ()
        sum_x = tl.zeros([1, BLOCK_QUERIES], tl.float32)
        sum_y = tl.zeros([1, BLOCK_QUERIES], tl.float32)
        count = tl.zeros([1, BLOCK_QUERIES], tl.float32)
        for point in tl.static_range(P):
            x, y, weight = load_sample_inside(
                coordinates_ptr, weights_ptr, level * P + point, query[None, :] * (M * K), expand_all(softmax, 0),
                transform, in_queries[None, :], height, width, REFERENCE_SIZE,
            )  # fmt: skip
            xs += (x,)  # type: ignore[assignment]
            ys += (y,)  # type: ignore[assignment]
            weights += (weight,)  # type: ignore[assignment]
            sum_x += tl.where(weight != 0.0, x, 0.0)
            sum_y += tl.where(weight != 0.0, y, 0.0)
            count += tl.where(weight != 0.0, 1.0, 0.0)

        # The window is put around the mean of the samples, so that few are outside.
        sum_x, sum_y, count = tl.reduce((tl.ravel(sum_x), tl.ravel(sum_y), tl.ravel(count)), 0, add_positions)
        left = tl.maximum(tl.floor(sum_x / tl.maximum(count, 1.0)).to(tl.int32) - (WINDOW // 2 - 1), -1)
        top = tl.maximum(tl.floor(sum_y / tl.maximum(count, 1.0)).to(tl.int32) - (WINDOW // 2 - 1), -1)
        column = (left + tl.arange(0, WINDOW))[:, None]
        along_x = ()  # the hat functions of each point, (WINDOW, queries)
        in_window = ()
        above = tl.full([1, BLOCK_QUERIES], -(1 << 30), tl.int32)  # minus the first row that a sample meets
        below = tl.full([1, BLOCK_QUERIES], -1, tl.int32)  # the last row that a sample meets
        outside = tl.zeros([1, BLOCK_QUERIES], tl.int32)  # a bit for each point with samples outside
        for point in tl.static_range(P):
            inside = is_in_window(xs[point], ys[point], left, top, WINDOW)
            upper = tl.floor(ys[point]).to(tl.int32)
            above = tl.maximum(above, tl.where(inside, -upper, -(1 << 30)))
            below = tl.maximum(below, tl.where(inside, upper + 1, -1))
            outside |= tl.where(inside | (weights[point] == 0.0), 0, 1 << point)
            along_x += (hat(xs[point] - column.to(tl.float32)),)  # type: ignore[assignment]
            in_window += (tl.where(inside, weights[point], 0.0),)  # type: ignore[assignment]
        above, below, outside = tl.reduce((tl.ravel(above), tl.ravel(below), tl.ravel(outside)), 0, join_extents)

        first_row = tl.maximum(-above, 0)
        # The loop starts from 0, or the compiler does not see that the rows' addresses are multiples of 16 bytes.
        for step in range(0, tl.minimum(below + 1, height) - first_row):
            row = first_row + step
            window = tl.zeros([WINDOW, BLOCK_QUERIES], tl.float32)
            for point in tl.static_range(P):
                window += in_window[point] * hat(ys[point] - row) * along_x[point]
            pixel_ptr = grad_value_ptr + (start + row * width + column).to(tl.int64) * (M * D) + channel
            exists = (column >= 0) & (column < width) & (channel < D)
            add_to_gradient(pixel_ptr, scale_ptr, multiply_exactly(window, grads, PRECISION), exists)

        if outside > 0:
            # Load the size again: kept from above, it would take registers from the loop over the rows.
            level_height, level_width, level_start = load_level(levels_ptr, level, L)
            column_transform = pixel_transform(
                reference_ptr, query[:, None], level, level_height, level_width, L, P, REFERENCE_SIZE, tl.float32
            )
            add_samples_outside(
                grad_value_ptr, scale_ptr, grad_output_ptr, coordinates_ptr + 2 * level * P, weights_ptr + level * P,
                query[:, None], in_queries[:, None], expand_all(softmax, 1), column_transform,
                (level_height, level_width, level_start), (left, top), outside,
                REFERENCE_SIZE, P, M * K, M * D, D, WINDOW,
            )  # fmt: skip


def window_configuration(architecture: str, D: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the queries and the warps of a program; no queries at all mean that windows do not pay.

    64 queries are 8 × 8 pixels, and 16 queries per warp leave it the registers of `max_window_registers`.
    """
    return LAUNCH_TABLE.get(("windows", architecture, D, dtype.itemsize), (64, 4))


def max_window_registers(architecture: str, D: int, dtype: torch.dtype) -> int:
    """Return the registers that a thread may use on NVIDIA.

    Windows hold a hat function per point for 16 pixels: 128 registers in bfloat16 (a quarter of all warps are
    resident), 168 in float32 (19 %). They wait for tensor cores and barriers, not for scattered rows.
    """
    if not has_vector_atomics(architecture):
        return 255
    return 128 if dtype == torch.bfloat16 and D <= 64 else 168


def uses_windows(value: Tensor, coordinates: Tensor) -> bool:
    """Return whether value's gradient is summed in windows: in an encoder, whose queries are the pixels themselves."""
    B, S, M, D = value.shape
    _, Q, _, _, P, _ = coordinates.shape
    if Q != S or B * Q * M <= configuration.FEW_ROWS or P > 4 or MAX_WINDOW_CHANNELS.get(value.dtype, 0) < D:
        return False
    if max(value.numel(), coordinates.numel()) >= B << 31:  # offsets inside an image have 32 bits
        return False
    return window_configuration(architecture(value.device), D, value.dtype)[0] > 0


def window_constants(problem: Problem, queries: int) -> dict[str, Any]:
    """Return the compile-time arguments of `window_kernel`."""
    dtype, M, L, P, D, reference_size = problem
    # Two float16 numbers have not the range of the weights, and the interpreter multiplies bfloat16 wrongly.
    operand = tl.bfloat16 if dtype == torch.bfloat16 and not INTERPRETED else tl.float32
    return {
        "M": M,
        "L": L,
        "P": P,
        "D": D,
        "REFERENCE_SIZE": reference_size,
        "OPERAND": operand,
        "PRECISION": "ieee" if torch.version.hip else "tf32",
        "BLOCK_QUERIES": queries,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "WINDOW": 16,
        "STRIP": 8,
        "BLOCK_K": min(64, triton.next_power_of_2(L * P)),
    }


def launch_windows(tensors: list[Tensor], value: Tensor, problem: Problem) -> None:
    """Add to the gradient of `value`, the first of `tensors`, which are the kernel's arguments in order."""
    B, S, M, D = value.shape
    target = architecture(value.device)
    queries, num_warps = window_configuration(target, D, value.dtype)
    options: dict[str, Any] = dict(LAUNCH_OPTIONS)
    if target.startswith("sm_"):
        options["maxnreg"] = max_window_registers(target, D, value.dtype)
    programs = triton.cdiv(S, queries) * B * M
    with torch.cuda.device_of(value):
        window_kernel[(programs,)](*tensors, S, **window_constants(problem, queries), num_warps=num_warps, **options)
