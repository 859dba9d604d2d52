"""Compute multi-scale deformable attention and its gradients in Triton: the forward and the backward kernel.

A program serves a tile of neighboring queries of one head of one image: their samples lie close together, so most of
the 4·L·P rows of D channels that each query reads are found in L1. All lanes of a query compute the same positions and
weights, in one-dimensional tiles, which all Triton versions lay out alike; nothing in the loop over the points goes
through shared memory, and there are no barriers in it. `sampling.py` has the positions and weights, `rows.py` the rows.

The backward pass reads the rows again and keeps nothing of the forward pass but the output. Each lane makes its part of
the gradients by x, y and weight before the lanes are summed, three sums per sample. The gradient of the softmax needs
Σ weight · its gradient, which is output · ∂output, so it takes no second pass.

The gradient of `value`
    Each sample adds to four rows of it, by atomic additions in float32 (float64 for float64) that are vectorized, and
    skipped where a weight is zero; a half-precision gradient is rounded once, at the end, which costs 10 bytes of
    traffic per element of `value` (clear, read, write) and spares half the digits. The additions have a loop of their
    own, after the other gradients of a level: it computes the positions again, and needs other registers.
    In an encoder `windows.py` computes this gradient instead, and GRAD_VALUE is off.

Determinism
    All but the gradient of `value` is always bit-reproducible. Under `torch.use_deterministic_algorithms(True)` that
    one is accumulated in 64-bit fixed point, whose sums do not depend on their order. The cost: 64-bit additions,
    which are twice the bytes and not vectorized, and a buffer of 8 bytes per element of `value`. The unit is 2⁻⁶¹ of
    the largest sum possible, about 2⁻⁴⁰ of the largest output gradient at encoder shapes.
"""

import triton
import triton.language as tl

from .rows import (
    accumulate_row,
    add_row_to_gradient,
    as_words,
    assign_lanes,
    block_words,
    dot_block,
    dot_row,
    load_channels,
    sum_over_lanes,
)
from .sampling import (
    corners,
    load_level,
    load_sample,
    pixel_transform,
    program_tile,
    softmax_terms,
    store_pairs,
    weight_slopes,
)


@triton.jit(do_not_specialize=["num_rows", "num_queries"])
def forward_kernel(
    output_ptr, value_ptr, levels_ptr, reference_ptr, coordinates_ptr, weights_ptr,
    num_rows, num_queries, channel_start,
    M: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    CHANNELS: tl.constexpr,  # of the D of each head, from channel_start on, that this launch computes
    REFERENCE_SIZE: tl.constexpr, COMPUTE: tl.constexpr, PACK: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, LANES: tl.constexpr, BLOCK_WORDS: tl.constexpr, LAST_BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum the weighted samples of a tile of queries, for one head of one image."""
    DTYPE: tl.constexpr = value_ptr.dtype.element_ty
    K: tl.constexpr = L * P
    WORDS: tl.constexpr = CHANNELS // PACK
    STRIDE: tl.constexpr = M * D // PACK
    image, head, tile = program_tile(num_queries, M, BLOCK_QUERIES)
    lane, query, in_queries = assign_lanes(num_queries - tile, BLOCK_QUERIES, LANES)
    first_query = image * num_queries + tile
    value_ptr = as_words(value_ptr, PACK) + image * num_rows * STRIDE + (head * D + channel_start) // PACK
    coordinates_ptr += (first_query * M + head) * (2 * K)
    weights_ptr += (first_query * M + head) * K
    reference_ptr += first_query * (L * REFERENCE_SIZE)
    output_ptr += (first_query * M + head) * D + channel_start

    softmax = ()
    if REFERENCE_SIZE > 0:
        softmax = softmax_terms(weights_ptr + query * (M * K), lane, K, BLOCK_K, LANES, COMPUTE)
    accumulators = ()
    for first in tl.static_range(0, WORDS, BLOCK_WORDS):
        word = block_words(lane, first, WORDS, BLOCK_WORDS, LAST_BLOCK, LANES)
        for _half in tl.static_range(PACK):
            accumulators += (tl.zeros(word.shape, COMPUTE),)  # type: ignore[assignment]

    for level in range(L):
        height, width, start = load_level(levels_ptr, level, L)
        transform = pixel_transform(reference_ptr, query, level, height, width, L, P, REFERENCE_SIZE, COMPUTE)
        right = (width > 1).to(tl.int32)
        down = (height > 1).to(tl.int32) * width
        for point in range(P):
            _offset_x, _offset_y, x, y, weight = load_sample(
                coordinates_ptr, weights_ptr, level * P + point, query * (M * K), softmax, transform,
                REFERENCE_SIZE, COMPUTE,
            )  # fmt: skip
            left, _x, weight_l, weight_r = corners(x, width)
            top, _y, weight_t, weight_b = corners(y, height)
            weight_t *= weight
            weight_b *= weight
            row = start + top * width + left
            accumulators = accumulate_row(
                accumulators, value_ptr, lane, row, weight_t * weight_l,
                STRIDE, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, DTYPE, PACK, COMPUTE,
            )  # fmt: skip
            accumulators = accumulate_row(
                accumulators, value_ptr, lane, row + right, weight_t * weight_r,
                STRIDE, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, DTYPE, PACK, COMPUTE,
            )  # fmt: skip
            accumulators = accumulate_row(
                accumulators, value_ptr, lane, row + down, weight_b * weight_l,
                STRIDE, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, DTYPE, PACK, COMPUTE,
            )  # fmt: skip
            accumulators = accumulate_row(
                accumulators, value_ptr, lane, row + down + right, weight_b * weight_r,
                STRIDE, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, DTYPE, PACK, COMPUTE,
            )  # fmt: skip

    for first in tl.static_range(0, WORDS, BLOCK_WORDS):
        sums = accumulators[first // BLOCK_WORDS * PACK]  # type: ignore[var-annotated]
        if PACK == 2:
            sums = tl.interleave(sums, accumulators[first // BLOCK_WORDS * PACK + 1])
        channel = block_words(lane, first * PACK, CHANNELS, BLOCK_WORDS * PACK, LAST_BLOCK * PACK, LANES)
        mask = in_queries[:, None] & (channel < CHANNELS)
        tl.store(output_ptr + query[:, None] * (M * D) + channel, sums, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_queries"])
def backward_kernel(
    grad_value_ptr, grad_reference_ptr, grad_coordinates_ptr, grad_weights_ptr, scale_ptr, grad_output_ptr, output_ptr,
    value_ptr, levels_ptr, reference_ptr, coordinates_ptr, weights_ptr,
    num_rows, num_queries, channel_start,
    M: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr,
    REFERENCE_SIZE: tl.constexpr, GRAD_REFERENCE: tl.constexpr, GRAD_VALUE: tl.constexpr, COMPUTE: tl.constexpr,
    PACK: tl.constexpr, BLOCK_QUERIES: tl.constexpr, LANES: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    LAST_BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Differentiate by the samples of a tile of queries, and with GRAD_VALUE add to the gradient of `value`."""
    DTYPE: tl.constexpr = value_ptr.dtype.element_ty
    K: tl.constexpr = L * P
    WORDS: tl.constexpr = CHANNELS // PACK
    STRIDE: tl.constexpr = M * D // PACK
    GRAD_HALF: tl.constexpr = D // PACK  # the gradient of value has a head's even channels before its odd ones
    image, head, tile = program_tile(num_queries, M, BLOCK_QUERIES)
    lane, query, in_queries = assign_lanes(num_queries - tile, BLOCK_QUERIES, LANES)
    first_query = image * num_queries + tile
    value_ptr = as_words(value_ptr, PACK) + image * num_rows * STRIDE + (head * D + channel_start) // PACK
    grad_value_ptr += image * num_rows * (STRIDE * PACK) + head * D + channel_start // PACK
    output_ptr = as_words(output_ptr, PACK) + ((first_query * M + head) * D + channel_start) // PACK
    grad_output_ptr = as_words(grad_output_ptr, PACK) + ((first_query * M + head) * D + channel_start) // PACK
    coordinates_ptr += (first_query * M + head) * (2 * K)
    grad_coordinates_ptr += (first_query * M + head) * (2 * K)
    weights_ptr += (first_query * M + head) * K
    grad_weights_ptr += (first_query * M + head) * K
    reference_ptr += first_query * (L * REFERENCE_SIZE)
    grad_reference_ptr += (first_query * M + head) * (L * REFERENCE_SIZE)

    softmax = ()
    if REFERENCE_SIZE > 0:
        softmax = softmax_terms(weights_ptr + query * (M * K), lane, K, BLOCK_K, LANES, COMPUTE)
    mean_gradient = tl.zeros(query.shape, COMPUTE)  # Σ weight · its gradient: each lane's part
    grads = ()
    for first in tl.static_range(0, WORDS, BLOCK_WORDS):
        word = block_words(lane, first, WORDS, BLOCK_WORDS, LAST_BLOCK, LANES)
        offset = query[:, None] * STRIDE + word
        grads += load_channels(grad_output_ptr + offset, word < WORDS, DTYPE, PACK, COMPUTE)
        if REFERENCE_SIZE > 0:
            outputs = load_channels(output_ptr + offset, word < WORDS, DTYPE, PACK, COMPUTE)
            mean_gradient += dot_block(grads, outputs, first // BLOCK_WORDS, PACK)

    rows = tl.arange(0, BLOCK_QUERIES)[:, None]  # of the results, which are stored once per query
    points = tl.arange(0, BLOCK_P)[None, :]
    in_rows = rows < num_queries - tile
    for level in range(L):
        height, width, start = load_level(levels_ptr, level, L)
        transform = pixel_transform(reference_ptr, query, level, height, width, L, P, REFERENCE_SIZE, COMPUTE)
        right = (width > 1).to(tl.int32)
        down = (height > 1).to(tl.int32) * width
        scale_x, scale_y, _shift_x, _shift_y = transform
        # Collect the gradients of this level's points: stored one by one, each would cost two barriers.
        grad_x = tl.zeros([BLOCK_QUERIES, BLOCK_P], COMPUTE)
        grad_y = tl.zeros([BLOCK_QUERIES, BLOCK_P], COMPUTE)
        grad_weight = tl.zeros([BLOCK_QUERIES, BLOCK_P], COMPUTE)
        center_x = tl.zeros(query.shape, COMPUTE)  # gradients of the reference: each lane's part
        center_y = tl.zeros(query.shape, COMPUTE)
        extent_x = tl.zeros(query.shape, COMPUTE)
        extent_y = tl.zeros(query.shape, COMPUTE)
        for point in range(P):
            offset_x, offset_y, x, y, weight = load_sample(
                coordinates_ptr, weights_ptr, level * P + point, query * (M * K), softmax, transform,
                REFERENCE_SIZE, COMPUTE,
            )  # fmt: skip
            left, distance_x, weight_l, weight_r = corners(x, width)
            top, distance_y, weight_t, weight_b = corners(y, height)
            row = start + top * width + left
            dot_tl = dot_row(
                grads, value_ptr, lane, row,
                STRIDE, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, DTYPE, PACK, COMPUTE,
            )  # fmt: skip
            dot_tr = dot_row(
                grads, value_ptr, lane, row + right,
                STRIDE, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, DTYPE, PACK, COMPUTE,
            )  # fmt: skip
            dot_bl = dot_row(
                grads, value_ptr, lane, row + down,
                STRIDE, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, DTYPE, PACK, COMPUTE,
            )  # fmt: skip
            dot_br = dot_row(
                grads, value_ptr, lane, row + down + right,
                STRIDE, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, DTYPE, PACK, COMPUTE,
            )  # fmt: skip

            # The gradients of the sample come before the reductions to value's gradient: registers are then free.
            along_top = weight_l * dot_tl + weight_r * dot_tr
            along_bottom = weight_l * dot_bl + weight_r * dot_br
            along_left = weight_t * dot_tl + weight_b * dot_bl
            along_right = weight_t * dot_tr + weight_b * dot_br
            slope_l, slope_r = weight_slopes(distance_x, weight_l, width)
            slope_t, slope_b = weight_slopes(distance_y, weight_t, height)
            point_x = weight * (slope_l * along_left + slope_r * along_right)
            point_y = weight * (slope_t * along_top + slope_b * along_bottom)
            point_weight = weight_t * along_top + weight_b * along_bottom
            if REFERENCE_SIZE > 0:
                point_weight = weight * (point_weight - mean_gradient)
            if GRAD_REFERENCE:
                center_x += point_x
                center_y += point_y
                if REFERENCE_SIZE == 4:  # offsets outside may be infinite
                    extent_x += tl.where(point_x == 0.0, 0.0, point_x * offset_x)
                    extent_y += tl.where(point_y == 0.0, 0.0, point_y * offset_y)
            is_point = points == point
            grad_x = tl.where(is_point, sum_over_lanes(point_x * scale_x, LANES), grad_x)
            grad_y = tl.where(is_point, sum_over_lanes(point_y * scale_y, LANES), grad_y)
            grad_weight = tl.where(is_point, sum_over_lanes(point_weight, LANES), grad_weight)

        if GRAD_VALUE:  # in a loop of its own, which needs other registers
            for point in range(P):
                _offset_x, _offset_y, x, y, weight = load_sample(
                    coordinates_ptr, weights_ptr, level * P + point, query * (M * K), softmax, transform,
                    REFERENCE_SIZE, COMPUTE,
                )  # fmt: skip
                weight = tl.where(in_queries, weight, 0.0)
                left, _x, weight_l, weight_r = corners(x, width)
                top, _y, weight_t, weight_b = corners(y, height)
                weight_t *= weight
                weight_b *= weight
                row = start + top * width + left
                add_row_to_gradient(
                    grad_value_ptr, scale_ptr, lane, row, weight_t * weight_l, grads,
                    STRIDE * PACK, GRAD_HALF, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, PACK,
                )  # fmt: skip
                add_row_to_gradient(
                    grad_value_ptr, scale_ptr, lane, row + right, weight_t * weight_r, grads,
                    STRIDE * PACK, GRAD_HALF, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, PACK,
                )  # fmt: skip
                add_row_to_gradient(
                    grad_value_ptr, scale_ptr, lane, row + down, weight_b * weight_l, grads,
                    STRIDE * PACK, GRAD_HALF, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, PACK,
                )  # fmt: skip
                add_row_to_gradient(
                    grad_value_ptr, scale_ptr, lane, row + down + right, weight_b * weight_r, grads,
                    STRIDE * PACK, GRAD_HALF, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, PACK,
                )  # fmt: skip

        sample = rows * (M * K) + points
        mask = in_rows & (points < P)
        store_pairs(grad_coordinates_ptr + level * (2 * P), sample, grad_x, grad_y, mask)
        tl.store(grad_weights_ptr + level * P + sample, grad_weight, mask=mask)
        if GRAD_REFERENCE:  # of this head; the launcher adds the heads
            point_ptr = grad_reference_ptr + level * REFERENCE_SIZE + rows * (M * L * REFERENCE_SIZE)
            tl.store(point_ptr, sum_over_lanes(center_x, LANES) * width, mask=in_rows)
            tl.store(point_ptr + 1, sum_over_lanes(center_y, LANES) * height, mask=in_rows)
            if REFERENCE_SIZE == 4:
                tl.store(point_ptr + 2, sum_over_lanes(extent_x, LANES) * width * (0.5 / P), mask=in_rows)
                tl.store(point_ptr + 3, sum_over_lanes(extent_y, LANES) * height * (0.5 / P), mask=in_rows)
