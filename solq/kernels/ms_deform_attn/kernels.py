"""Multi-scale deformable attention (Deformable DETR, https://arxiv.org/abs/2010.04159, section 4.1).

    output[b, q, m] = Σ_lp  weight[b, q, m, l, p] · sample(level l of value[b, :, m], location[b, q, m, l, p])

`sample` is bilinear; pixel (i, j) of an H × W level lies at ((j + ½) / W, (i + ½) / H); everything outside is zero.
In the fused form the weights are softmax(logits) over all L·P, and the locations are reference + offset / (W, H) for
reference points, and centre + offset · size / 2P for reference boxes; neither of the two ever exists in memory.

How the kernels work
    A program serves a tile of neighbouring queries of one head of one image: their samples lie close together, so most
    of the 4·L·P rows of D channels that each query reads are found in L1. The lanes of a warp are dealt out in order,
    LANES to a query; a lane reads 16 bytes of a row, so that a query's lanes read it all at once. What does not fit in
    a power of two is a second, narrower block: D = 48 is 32 + 16 channels and no lane is idle. Per sample, every lane
    computes the position and the four weights for itself, in one-dimensional tiles, which all Triton versions lay out
    alike; nothing in the loop over the points goes through shared memory, and there are no barriers in it.
    Of the two pixels along an axis the lower one is moved inside first, and hat functions give the weights: of what is
    outside they are zero. So no index is out of bounds, nothing is compared or masked per corner, and the rows of the
    other three corners follow from the first by two additions. The softmax is in powers of two: one addition
    and one multiply-add, that keep their digits whatever the size of the logits.
    Two half-precision channels are read as one 32-bit word: two bfloat16 become float32 by one shift and one mask, and
    even and odd channels are separate float32 tiles, so that loads are 16 bytes per lane and so are the reductions of
    the backward pass, without exchange between lanes.
    The backward pass reads the same rows again instead of keeping anything. Each lane makes its part of the gradients
    to x, y and weight before the lanes are summed, three sums per sample. The sum Σ p·∂p in the
    softmax's gradient is output · ∂output, so that gradient needs no second pass.

The gradient of `value`
    Each sample adds to four rows of it, by reductions in float32 (float64 for float64) that are vectorised, and skipped
    where a weight is zero; a half-precision gradient is rounded once, at the end, which costs 10 bytes of traffic per
    element of `value` (clear, read, write) and spares half the digits. The reductions have a loop of their own, after
    the other gradients of a level: it computes the positions again, and needs other registers.
    In an encoder, where queries are the pixels themselves and reductions are far more bytes than all else, another
    kernel adds up what neighbours share first. A program takes 64 queries, 8 × 8 pixels, whose samples of one level
    lie close together: row by row of a window of 16 × 16 pixels around their mean, the gradient is a matrix product,
    hat functions (pixels, queries) times output gradients (queries, channels), on tensor cores, with operands split in
    two so that nothing is rounded; one reduction per pixel of the window remains. What lies outside the window is added
    corner by corner. Which 64 queries belong together is only a guess from S = Q, on which no result depends.

Determinism
    All but the gradient of `value` is always bit-reproducible. Under `torch.use_deterministic_algorithms(True)` that
    one is accumulated in 64-bit fixed point, whose sums do not depend on their order. The cost: 64-bit reductions,
    which are twice the bytes and not vectorised, and a buffer of 8 bytes per element of `value`. The unit is 2⁻⁶¹ of
    the largest sum possible, about 2⁻⁴⁰ of the largest output gradient at encoder shapes.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from solq.kernels.ms_deform_attn import cpu as reference
from solq.kernels.runtime import INTERPRETED, LAUNCH_OPTIONS, architecture, backend_for, require_triton, warp_size

SpatialShapes = Tensor | Sequence[tuple[int, int]]
LevelStartIndex = Tensor | Sequence[int]

LOG2_E = tl.constexpr(1.4426950408889634)

# ---------------------------------------------------------------------------------------------------------------------
# Kernels. In the plain form REFERENCE is 0, `coordinates` are sampling locations and `weights` attention weights. In
# the fused form it is the number of coordinates of a reference point, 2 or 4, and the two are offsets and logits.
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _place(num_queries, M: tl.constexpr, BLOCK_QUERIES: tl.constexpr):
    """The image (int64) and head of this program, and the first query of its tile."""
    tiles = tl.cdiv(num_queries, BLOCK_QUERIES)
    place = tl.program_id(0) // tiles
    return (place // M).to(tl.int64), place % M, tl.program_id(0) % tiles * BLOCK_QUERIES


@triton.jit
def _lanes(queries_left, BLOCK_QUERIES: tl.constexpr, LANES: tl.constexpr):
    """Each lane's number within its query, and its query in the tile; past the last query that one is repeated."""
    lane = tl.arange(0, BLOCK_QUERIES * LANES) % LANES
    query = tl.arange(0, BLOCK_QUERIES * LANES) // LANES
    return lane, tl.minimum(query, queries_left - 1), query < queries_left


@triton.jit
def _load_pairs(ptr, index):
    """x and y of the pairs number `index`, read in one load where a pair has at most 8 bytes."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    if dtype.primitive_bitwidth == 64:
        x = tl.load(ptr + 2 * index)
        y = tl.load(ptr + 2 * index + 1)
    elif dtype.primitive_bitwidth == 32:
        pair = tl.load(ptr.to(tl.pointer_type(tl.int64)) + index)
        x = pair.to(tl.int32).to(dtype, bitcast=True)
        y = (pair >> 32).to(tl.int32).to(dtype, bitcast=True)
    else:
        pair = tl.load(ptr.to(tl.pointer_type(tl.int32)) + index)
        x = pair.to(tl.int16).to(dtype, bitcast=True)
        y = (pair >> 16).to(tl.int16).to(dtype, bitcast=True)
    return x, y


@triton.jit
def _store_pairs(ptr, index, x, y, mask):
    """The counterpart of `_load_pairs`."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    x = x.to(dtype)
    y = y.to(dtype)
    if dtype.primitive_bitwidth == 64:
        tl.store(ptr + 2 * index, x, mask=mask)
        tl.store(ptr + 2 * index + 1, y, mask=mask)
    elif dtype.primitive_bitwidth == 32:
        low = x.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        high = y.to(tl.int32, bitcast=True).to(tl.int64) << 32
        tl.store(ptr.to(tl.pointer_type(tl.int64)) + index, low | high, mask=mask)
    else:
        low = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        high = y.to(tl.int16, bitcast=True).to(tl.int32) << 16
        tl.store(ptr.to(tl.pointer_type(tl.int32)) + index, low | high, mask=mask)


@triton.jit
def _level(
    shapes_ptr, starts_ptr, reference_ptr, query, level,
    L: tl.constexpr, P: tl.constexpr, REFERENCE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Size and first row of a level, and the scales and shifts that make pixel positions of its coordinates."""
    height = tl.load(shapes_ptr + 2 * level).to(tl.int32)
    width = tl.load(shapes_ptr + 2 * level + 1).to(tl.int32)
    start = tl.load(starts_ptr + level).to(tl.int32)
    scale_x = tl.zeros_like(query).to(COMPUTE) + width
    scale_y = tl.zeros_like(query).to(COMPUTE) + height
    shift_x = tl.zeros_like(query).to(COMPUTE) - 0.5
    shift_y = shift_x
    if REFERENCE > 0:
        point_ptr = reference_ptr + level * REFERENCE + query * (L * REFERENCE)
        shift_x += tl.load(point_ptr).to(COMPUTE) * scale_x
        shift_y += tl.load(point_ptr + 1).to(COMPUTE) * scale_y
        if REFERENCE == 4:
            scale_x *= tl.load(point_ptr + 2).to(COMPUTE) * (0.5 / P)
            scale_y *= tl.load(point_ptr + 3).to(COMPUTE) * (0.5 / P)
            # All is outside a box whose size is not finite. A scale of 0 then keeps gradients from being 0 * infinity.
            shift_x = tl.where(tl.abs(scale_x) < float("inf"), shift_x, float("-inf"))
            shift_y = tl.where(tl.abs(scale_y) < float("inf"), shift_y, float("-inf"))
            scale_x = tl.where(tl.abs(scale_x) < float("inf"), scale_x, 0.0)
            scale_y = tl.where(tl.abs(scale_y) < float("inf"), scale_y, 0.0)
        else:
            scale_x = tl.full(query.shape, 1.0, COMPUTE)
            scale_y = scale_x
    return height, width, start, scale_x, scale_y, shift_x, shift_y


@triton.jit
def _load_sample(
    coordinates_ptr, weights_ptr, sample, first_sample, softmax, level, REFERENCE: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """A sample of each query in a level of `_level`: its coordinates, its pixel position, and its weight."""
    _height, _width, _start, scale_x, scale_y, shift_x, shift_y = level
    x, y = _load_pairs(coordinates_ptr + 2 * sample, first_sample)
    x = x.to(COMPUTE)
    y = y.to(COMPUTE)
    weight = tl.load(weights_ptr + sample + first_sample).to(COMPUTE)
    if REFERENCE > 0:
        weight = tl.exp2((weight - softmax[0]) * LOG2_E - softmax[1])
    return x, y, x * scale_x + shift_x, y * scale_y + shift_y, weight


@triton.jit
def _hat(distance):
    return tl.maximum(1.0 - tl.abs(distance), 0.0)


@triton.jit
def _corners(position, size):
    """Along an axis: the lower of two neighbouring pixels, the distance of `position` from it, and both weights.

    The pixels are always inside: near the ends and beyond, they are the last two, with the weights of their own hat
    functions, which are zero a pixel or more outside, and for infinity and NaN. A lone pixel has no upper neighbour.
    """
    last = tl.maximum(size - 2, 0).to(position.dtype)
    index = tl.maximum(tl.minimum(position, last), 0.0).to(tl.int32)
    distance = position - index.to(position.dtype)
    end = tl.where(size > 1, 2.0, -1.0).to(position.dtype)
    high_weight = tl.maximum(tl.minimum(distance, end - distance), 0.0)
    return index, distance, _hat(distance), high_weight


@triton.jit
def _slopes(distance, low_weight, size):
    """The derivatives of the two weights of `_corners` to the position."""
    above = distance >= 0.0
    end = tl.where(size > 1, 2.0, -1.0).to(distance.dtype)
    low = tl.where(low_weight > 0.0, tl.where(above, -1.0, 1.0), 0.0)
    high = tl.where(above & (distance < end), tl.where(distance < 1.0, 1.0, -1.0), 0.0)
    return low, high


@triton.jit
def _block(
    lane, FIRST: tl.constexpr, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, LAST_BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Each lane's words (lanes, n) of the block from FIRST on: of BLOCK_WORDS, or LAST_BLOCK where fewer are left."""
    SIZE: tl.constexpr = BLOCK_WORDS if FIRST + BLOCK_WORDS <= WORDS else LAST_BLOCK
    EACH: tl.constexpr = SIZE // LANES
    return FIRST + (lane * EACH)[:, None] + tl.arange(0, EACH)[None, :]


@triton.jit
def _load_channels(word_ptr, mask, DTYPE: tl.constexpr, PACK: tl.constexpr, COMPUTE: tl.constexpr):
    """Channels by words: a tuple with one tile, or with the even and the odd channels where a word holds two."""
    word = tl.load(word_ptr, mask=mask, other=None if mask is None else 0)
    if PACK == 1:
        channels = (word.to(COMPUTE),)
    elif DTYPE == tl.bfloat16:  # noqa: SIM300 (the upper half of a float32)
        channels = ((word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True))  # type: ignore[assignment]
    else:
        low = word.to(tl.int16).to(DTYPE, bitcast=True)
        high = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        channels = (low.to(COMPUTE), high.to(COMPUTE))  # type: ignore[assignment]
    return channels


@triton.jit
def _words(ptr, PACK: tl.constexpr):
    return ptr.to(tl.pointer_type(tl.int32)) if PACK == 2 else ptr


@triton.jit
def _sum_lanes(parts, LANES: tl.constexpr):
    """The sum over the lanes of each query (queries, 1)."""
    return tl.sum(parts.reshape([parts.shape[0] // LANES, LANES]), axis=1, keep_dims=True)


@triton.jit
def _to_lanes(x, LANES: tl.constexpr):
    """What each query (queries, 1) has, for each of its lanes."""
    return x.broadcast_to([x.shape[0], LANES]).reshape([x.shape[0] * LANES])


@triton.jit
def _softmax_terms(
    logits_ptr, lane, K: tl.constexpr, BLOCK_K: tl.constexpr, LANES: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """Of the K logits of each lane's query: the largest, and log2 Σ exp(logit - largest)."""
    EACH: tl.constexpr = BLOCK_K // LANES if BLOCK_K > LANES else 1
    largest = tl.full([lane.shape[0] // LANES, 1], float("-inf"), COMPUTE)
    total = tl.zeros_like(largest)
    for start in range(0, K, LANES * EACH):
        k = start + (lane * EACH)[:, None] + tl.arange(0, EACH)[None, :]
        logits = tl.load(logits_ptr[:, None] + k, mask=k < K, other=0.0).to(COMPUTE)
        logits = tl.where(k < K, logits, float("-inf")).reshape([largest.shape[0], LANES * EACH])
        larger = tl.maximum(largest, tl.max(logits, axis=1, keep_dims=True))
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        total *= tl.exp2((largest - finite) * LOG2_E)
        total += tl.sum(tl.exp2((logits - finite) * LOG2_E), axis=1, keep_dims=True)
        largest = larger
    return _to_lanes(largest, LANES), _to_lanes(tl.log2(total), LANES)


@triton.jit
def _add_row(
    accumulators, value_ptr, lane, row, weight,
    STRIDE: tl.constexpr, LANES: tl.constexpr, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, LAST_BLOCK: tl.constexpr,
    DTYPE: tl.constexpr, PACK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Add one corner of each query's sample, `weight` times its row."""
    updated = ()
    for first in tl.static_range(0, WORDS, BLOCK_WORDS):
        word = _block(lane, first, WORDS, BLOCK_WORDS, LAST_BLOCK, LANES)
        mask = None if first + LANES * word.shape[1] <= WORDS else word < WORDS
        word_ptr = value_ptr + row.to(tl.int64)[:, None] * STRIDE + word
        channels = _load_channels(word_ptr, mask, DTYPE, PACK, COMPUTE)
        for half in tl.static_range(PACK):
            updated += (accumulators[first // BLOCK_WORDS * PACK + half] + weight[:, None] * channels[half],)  # type: ignore[assignment]
    return updated


@triton.jit(do_not_specialize=["num_rows", "num_queries"])
def _forward_kernel(
    output_ptr, value_ptr, shapes_ptr, starts_ptr, reference_ptr, coordinates_ptr, weights_ptr,
    num_rows, num_queries, channel_start,
    M: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    CHANNELS: tl.constexpr,  # of the D of each head, from channel_start on, that this launch computes
    REFERENCE: tl.constexpr, COMPUTE: tl.constexpr, PACK: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, LANES: tl.constexpr, BLOCK_WORDS: tl.constexpr, LAST_BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = value_ptr.dtype.element_ty
    K: tl.constexpr = L * P
    WORDS: tl.constexpr = CHANNELS // PACK
    STRIDE: tl.constexpr = M * D // PACK
    image, head, tile = _place(num_queries, M, BLOCK_QUERIES)
    lane, query, in_queries = _lanes(num_queries - tile, BLOCK_QUERIES, LANES)
    first_query = image * num_queries + tile
    value_ptr = _words(value_ptr, PACK) + image * num_rows * STRIDE + (head * D + channel_start) // PACK
    coordinates_ptr += (first_query * M + head) * (2 * K)
    weights_ptr += (first_query * M + head) * K
    reference_ptr += first_query * (L * REFERENCE)
    output_ptr += (first_query * M + head) * D + channel_start

    softmax = ()
    if REFERENCE > 0:
        softmax = _softmax_terms(weights_ptr + query * (M * K), lane, K, BLOCK_K, LANES, COMPUTE)
    accumulators = ()
    for first in tl.static_range(0, WORDS, BLOCK_WORDS):
        word = _block(lane, first, WORDS, BLOCK_WORDS, LAST_BLOCK, LANES)
        for _half in tl.static_range(PACK):
            accumulators += (tl.zeros(word.shape, COMPUTE),)  # type: ignore[assignment]

    for index in range(L):
        level = _level(shapes_ptr, starts_ptr, reference_ptr, query, index, L, P, REFERENCE, COMPUTE)
        height, width, start = level[0], level[1], level[2]
        right = (width > 1).to(tl.int32)
        down = (height > 1).to(tl.int32) * width
        for point in range(P):
            _offset_x, _offset_y, x, y, weight = _load_sample(
                coordinates_ptr, weights_ptr, index * P + point, query * (M * K), softmax, level, REFERENCE, COMPUTE
            )
            left, _x, weight_l, weight_r = _corners(x, width)
            top, _y, weight_t, weight_b = _corners(y, height)
            weight_t *= weight
            weight_b *= weight
            row = start + top * width + left
            accumulators = _add_row(
                accumulators, value_ptr, lane, row, weight_t * weight_l,
                STRIDE, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, DTYPE, PACK, COMPUTE,
            )  # fmt: skip
            accumulators = _add_row(
                accumulators, value_ptr, lane, row + right, weight_t * weight_r,
                STRIDE, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, DTYPE, PACK, COMPUTE,
            )  # fmt: skip
            accumulators = _add_row(
                accumulators, value_ptr, lane, row + down, weight_b * weight_l,
                STRIDE, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, DTYPE, PACK, COMPUTE,
            )  # fmt: skip
            accumulators = _add_row(
                accumulators, value_ptr, lane, row + down + right, weight_b * weight_r,
                STRIDE, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, DTYPE, PACK, COMPUTE,
            )  # fmt: skip

    for first in tl.static_range(0, WORDS, BLOCK_WORDS):
        sums = accumulators[first // BLOCK_WORDS * PACK]  # type: ignore[var-annotated]
        if PACK == 2:
            sums = tl.interleave(sums, accumulators[first // BLOCK_WORDS * PACK + 1])
        channel = _block(lane, first * PACK, CHANNELS, BLOCK_WORDS * PACK, LAST_BLOCK * PACK, LANES)
        mask = in_queries[:, None] & (channel < CHANNELS)
        tl.store(output_ptr + query[:, None] * (M * D) + channel, sums, mask=mask)


@triton.jit
def _dot(grads, channels, BLOCK: tl.constexpr, PACK: tl.constexpr):
    """The output's gradient · a block of a row: each lane's part."""
    product = grads[BLOCK * PACK] * channels[0]
    if PACK == 2:
        product += grads[BLOCK * PACK + 1] * channels[1]
    return tl.sum(product, axis=1)


@triton.jit
def _dot_row(
    grads, value_ptr, lane, row,
    STRIDE: tl.constexpr, LANES: tl.constexpr, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, LAST_BLOCK: tl.constexpr,
    DTYPE: tl.constexpr, PACK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The output's gradient · a row: each lane's part."""
    total = 0.0
    for first in tl.static_range(0, WORDS, BLOCK_WORDS):
        word = _block(lane, first, WORDS, BLOCK_WORDS, LAST_BLOCK, LANES)
        mask = None if first + LANES * word.shape[1] <= WORDS else word < WORDS
        word_ptr = value_ptr + row.to(tl.int64)[:, None] * STRIDE + word
        part = _dot(grads, _load_channels(word_ptr, mask, DTYPE, PACK, COMPUTE), first // BLOCK_WORDS, PACK)
        total = part if first == 0 else total + part
    return total


@triton.jit
def _reduce(pixel_ptr, scale_ptr, contribution, mask):
    """Add to value's gradient, in fixed point if it is one of integers."""
    if pixel_ptr.dtype.element_ty == tl.int64:
        contribution = (contribution * tl.load(scale_ptr).to(contribution.dtype)).to(tl.int64)
    tl.atomic_add(pixel_ptr, contribution, mask=mask, sem="relaxed")


@triton.jit
def _add_gradient(
    grad_value_ptr, scale_ptr, lane, row, weight, grads,
    STRIDE: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    LAST_BLOCK: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Add `weight` times the output's gradient to a row of value's gradient, odd channels HALF after even ones."""
    for first in tl.static_range(0, WORDS, BLOCK_WORDS):
        word = _block(lane, first, WORDS, BLOCK_WORDS, LAST_BLOCK, LANES)
        counts = (weight != 0.0)[:, None]
        if first + LANES * word.shape[1] > WORDS:
            counts = counts & (word < WORDS)
        word_ptr = grad_value_ptr + row.to(tl.int64)[:, None] * STRIDE + word
        for half in tl.static_range(PACK):
            _reduce(
                word_ptr + half * HALF, scale_ptr, grads[first // BLOCK_WORDS * PACK + half] * weight[:, None], counts
            )


@triton.jit(do_not_specialize=["num_rows", "num_queries"])
def _backward_kernel(
    grad_value_ptr, grad_reference_ptr, grad_coordinates_ptr, grad_weights_ptr, scale_ptr, grad_output_ptr, output_ptr,
    value_ptr, shapes_ptr, starts_ptr, reference_ptr, coordinates_ptr, weights_ptr,
    num_rows, num_queries, channel_start,
    M: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr,
    REFERENCE: tl.constexpr, GRAD_REFERENCE: tl.constexpr, GRAD_VALUE: tl.constexpr, COMPUTE: tl.constexpr,
    PACK: tl.constexpr, BLOCK_QUERIES: tl.constexpr, LANES: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    LAST_BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = value_ptr.dtype.element_ty
    K: tl.constexpr = L * P
    WORDS: tl.constexpr = CHANNELS // PACK
    STRIDE: tl.constexpr = M * D // PACK
    GRAD_HALF: tl.constexpr = D // PACK  # the gradient of value has a head's even channels before its odd ones
    image, head, tile = _place(num_queries, M, BLOCK_QUERIES)
    lane, query, in_queries = _lanes(num_queries - tile, BLOCK_QUERIES, LANES)
    first_query = image * num_queries + tile
    value_ptr = _words(value_ptr, PACK) + image * num_rows * STRIDE + (head * D + channel_start) // PACK
    grad_value_ptr += image * num_rows * (STRIDE * PACK) + head * D + channel_start // PACK
    output_ptr = _words(output_ptr, PACK) + ((first_query * M + head) * D + channel_start) // PACK
    grad_output_ptr = _words(grad_output_ptr, PACK) + ((first_query * M + head) * D + channel_start) // PACK
    coordinates_ptr += (first_query * M + head) * (2 * K)
    grad_coordinates_ptr += (first_query * M + head) * (2 * K)
    weights_ptr += (first_query * M + head) * K
    grad_weights_ptr += (first_query * M + head) * K
    reference_ptr += first_query * (L * REFERENCE)
    grad_reference_ptr += (first_query * M + head) * (L * REFERENCE)

    softmax = ()
    if REFERENCE > 0:
        softmax = _softmax_terms(weights_ptr + query * (M * K), lane, K, BLOCK_K, LANES, COMPUTE)
    expected = tl.zeros(query.shape, COMPUTE)  # Σ weight · its gradient: each lane's part
    grads = ()
    for first in tl.static_range(0, WORDS, BLOCK_WORDS):
        word = _block(lane, first, WORDS, BLOCK_WORDS, LAST_BLOCK, LANES)
        offset = query[:, None] * STRIDE + word
        grads += _load_channels(grad_output_ptr + offset, word < WORDS, DTYPE, PACK, COMPUTE)
        if REFERENCE > 0:
            outputs = _load_channels(output_ptr + offset, word < WORDS, DTYPE, PACK, COMPUTE)
            expected += _dot(grads, outputs, first // BLOCK_WORDS, PACK)

    rows = tl.arange(0, BLOCK_QUERIES)[:, None]  # once per query, what is stored
    points = tl.arange(0, BLOCK_P)[None, :]
    in_rows = rows < num_queries - tile
    for index in range(L):
        level = _level(shapes_ptr, starts_ptr, reference_ptr, query, index, L, P, REFERENCE, COMPUTE)
        height, width, start, scale_x, scale_y = level[0], level[1], level[2], level[3], level[4]
        right = (width > 1).to(tl.int32)
        down = (height > 1).to(tl.int32) * width
        # Gradients of this level's points, collected: stored one by one, each would cost two barriers.
        grad_x = tl.zeros([BLOCK_QUERIES, BLOCK_P], COMPUTE)
        grad_y = tl.zeros([BLOCK_QUERIES, BLOCK_P], COMPUTE)
        grad_weight = tl.zeros([BLOCK_QUERIES, BLOCK_P], COMPUTE)
        centre_x = tl.zeros(query.shape, COMPUTE)  # gradients of the reference: each lane's part
        centre_y = tl.zeros(query.shape, COMPUTE)
        extent_x = tl.zeros(query.shape, COMPUTE)
        extent_y = tl.zeros(query.shape, COMPUTE)
        for point in range(P):
            offset_x, offset_y, x, y, weight = _load_sample(
                coordinates_ptr, weights_ptr, index * P + point, query * (M * K), softmax, level, REFERENCE, COMPUTE
            )
            left, distance_x, weight_l, weight_r = _corners(x, width)
            top, distance_y, weight_t, weight_b = _corners(y, height)
            row = start + top * width + left
            dot_tl = _dot_row(
                grads, value_ptr, lane, row,
                STRIDE, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, DTYPE, PACK, COMPUTE,
            )  # fmt: skip
            dot_tr = _dot_row(
                grads, value_ptr, lane, row + right,
                STRIDE, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, DTYPE, PACK, COMPUTE,
            )  # fmt: skip
            dot_bl = _dot_row(
                grads, value_ptr, lane, row + down,
                STRIDE, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, DTYPE, PACK, COMPUTE,
            )  # fmt: skip
            dot_br = _dot_row(
                grads, value_ptr, lane, row + down + right,
                STRIDE, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, DTYPE, PACK, COMPUTE,
            )  # fmt: skip

            # The gradients of the sample come before the reductions to value's gradient: registers are then free.
            along_top = weight_l * dot_tl + weight_r * dot_tr
            along_bottom = weight_l * dot_bl + weight_r * dot_br
            along_left = weight_t * dot_tl + weight_b * dot_bl
            along_right = weight_t * dot_tr + weight_b * dot_br
            slope_l, slope_r = _slopes(distance_x, weight_l, width)
            slope_t, slope_b = _slopes(distance_y, weight_t, height)
            point_x = weight * (slope_l * along_left + slope_r * along_right)
            point_y = weight * (slope_t * along_top + slope_b * along_bottom)
            point_weight = weight_t * along_top + weight_b * along_bottom
            if REFERENCE > 0:
                point_weight = weight * (point_weight - expected)
            if GRAD_REFERENCE:
                centre_x += point_x
                centre_y += point_y
                if REFERENCE == 4:  # outside, offsets may be infinite
                    extent_x += tl.where(point_x == 0.0, 0.0, point_x * offset_x)
                    extent_y += tl.where(point_y == 0.0, 0.0, point_y * offset_y)
            here = points == point
            grad_x = tl.where(here, _sum_lanes(point_x * scale_x, LANES), grad_x)
            grad_y = tl.where(here, _sum_lanes(point_y * scale_y, LANES), grad_y)
            grad_weight = tl.where(here, _sum_lanes(point_weight, LANES), grad_weight)

        if GRAD_VALUE:  # in a loop of its own, which needs other registers
            for point in range(P):
                _offset_x, _offset_y, x, y, weight = _load_sample(
                    coordinates_ptr, weights_ptr, index * P + point, query * (M * K), softmax, level, REFERENCE,
                    COMPUTE,
                )  # fmt: skip
                weight = tl.where(in_queries, weight, 0.0)
                left, _x, weight_l, weight_r = _corners(x, width)
                top, _y, weight_t, weight_b = _corners(y, height)
                weight_t *= weight
                weight_b *= weight
                row = start + top * width + left
                _add_gradient(
                    grad_value_ptr, scale_ptr, lane, row, weight_t * weight_l, grads,
                    STRIDE * PACK, GRAD_HALF, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, PACK,
                )  # fmt: skip
                _add_gradient(
                    grad_value_ptr, scale_ptr, lane, row + right, weight_t * weight_r, grads,
                    STRIDE * PACK, GRAD_HALF, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, PACK,
                )  # fmt: skip
                _add_gradient(
                    grad_value_ptr, scale_ptr, lane, row + down, weight_b * weight_l, grads,
                    STRIDE * PACK, GRAD_HALF, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, PACK,
                )  # fmt: skip
                _add_gradient(
                    grad_value_ptr, scale_ptr, lane, row + down + right, weight_b * weight_r, grads,
                    STRIDE * PACK, GRAD_HALF, LANES, WORDS, BLOCK_WORDS, LAST_BLOCK, PACK,
                )  # fmt: skip

        sample = rows * (M * K) + points
        mask = in_rows & (points < P)
        _store_pairs(grad_coordinates_ptr + index * (2 * P), sample, grad_x, grad_y, mask)
        tl.store(grad_weights_ptr + index * P + sample, grad_weight, mask=mask)
        if GRAD_REFERENCE:  # of this head; the launcher adds the heads
            point_ptr = grad_reference_ptr + index * REFERENCE + rows * (M * L * REFERENCE)
            tl.store(point_ptr, _sum_lanes(centre_x, LANES) * width, mask=in_rows)
            tl.store(point_ptr + 1, _sum_lanes(centre_y, LANES) * height, mask=in_rows)
            if REFERENCE == 4:
                tl.store(point_ptr + 2, _sum_lanes(extent_x, LANES) * width * (0.5 / P), mask=in_rows)
                tl.store(point_ptr + 3, _sum_lanes(extent_y, LANES) * height * (0.5 / P), mask=in_rows)


@triton.jit
def _strips(position, shapes_ptr, L: tl.constexpr, STRIP: tl.constexpr):
    """The pixel number `position` when each level is read in strips of STRIP rows, a strip column by column."""
    pixel = position
    start = 0
    for level in range(L):
        height = tl.load(shapes_ptr + 2 * level).to(tl.int32)
        width = tl.load(shapes_ptr + 2 * level + 1).to(tl.int32)
        inside = (position >= start) & (position < start + height * width)
        within = tl.where(inside, position - start, 0)
        top = within // (STRIP * width) * STRIP
        within -= top * width
        rows = tl.minimum(height - top, STRIP)
        pixel = tl.where(inside, start + (top + within % rows) * width + within // rows, pixel)
        start += height * width
    return pixel


@triton.jit
def _load_meeting(
    coordinates_ptr, weights_ptr, sample, first_sample, softmax, in_queries, level, REFERENCE: tl.constexpr
):  # fmt: skip
    """Position and weight of a sample of each query; where it meets no pixel -2, -2, outside all windows, and 0."""
    height, width = level[0], level[1]
    _offset_x, _offset_y, x, y, weight = _load_sample(
        coordinates_ptr, weights_ptr, sample, first_sample, softmax, level, REFERENCE, tl.float32
    )
    meets = in_queries & (x > -1.0) & (x < width) & (y > -1.0) & (y < height)
    return tl.where(meets, x, -2.0), tl.where(meets, y, -2.0), tl.where(meets, weight, 0.0)


@triton.jit
def _expand(tensors, AXIS: tl.constexpr):
    """Each of some one-dimensional tensors with a second axis, of one."""
    expanded = ()
    for i in tl.static_range(len(tensors)):
        expanded += (tl.expand_dims(tensors[i], AXIS),)  # type: ignore[assignment]
    return expanded


@triton.jit
def _is_inside(x, y, left, top, WINDOW: tl.constexpr):
    """Whether all pixels that a sample meets are inside the window."""
    return (x >= left) & (x < left + (WINDOW - 1)) & (y >= top) & (y < top + (WINDOW - 1))


@triton.jit
def _sum(x, y, count, other_x, other_y, other_count):
    return x + other_x, y + other_y, count + other_count


@triton.jit
def _extent(above, below, outside, other_above, other_below, other_outside):
    return tl.maximum(above, other_above), tl.maximum(below, other_below), outside | other_outside


@triton.jit
def _split(x, DTYPE: tl.constexpr):
    """x as the sum of two numbers that a tensor core multiplies exactly: of bfloat16, or of float32 cut to TF32."""
    if DTYPE == tl.float32:  # noqa: SIM108, SIM300
        high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    else:
        high = x.to(DTYPE)
    return high, (x - high.to(tl.float32)).to(DTYPE)


@triton.jit
def _multiply(weights, grads, PRECISION: tl.constexpr):
    """weights @ the sum of the grads, which tensor cores multiply exactly."""
    high, low = _split(weights, grads[0].dtype)
    product = tl.dot(low, grads[0], input_precision=PRECISION)
    if len(grads) == 2:
        product = tl.dot(high, grads[1], product, input_precision=PRECISION)
    return tl.dot(high, grads[0], product, input_precision=PRECISION)


@triton.jit
def _add_outside(
    grad_value_ptr, scale_ptr, grad_output_ptr, query, coordinates_ptr, weights_ptr, softmax, in_queries,
    level, left, top, outside,
    REFERENCE: tl.constexpr, P: tl.constexpr, SAMPLES: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """The samples outside the window, corner by corner, of those points whose bit is set in `outside`."""
    height, width, start = level[0], level[1], level[2]
    for point in range(P):
        if (outside >> point) & 1:
            x, y, weight = _load_meeting(
                coordinates_ptr, weights_ptr, point, query * SAMPLES, softmax, in_queries, level, REFERENCE
            )
            weight = tl.where(_is_inside(x, y, left, top, WINDOW), 0.0, weight)
            for first in range(0, D, 16):
                place = first + tl.arange(0, 16)[None, :]
                grads = tl.load(grad_output_ptr + query * STRIDE + place, mask=in_queries & (place < D), other=0.0)
                for corner in range(4):
                    column = tl.floor(x).to(tl.int32) + corner % 2
                    row = tl.floor(y).to(tl.int32) + corner // 2
                    share = weight * _hat(x - column) * _hat(y - row)
                    exists = (column >= 0) & (column < width) & (row >= 0) & (row < height) & (share != 0.0)
                    pixel_ptr = grad_value_ptr + (start + row * width + column).to(tl.int64) * STRIDE + place
                    _reduce(pixel_ptr, scale_ptr, grads * share, exists & (place < D))


@triton.jit(do_not_specialize=["num_rows"])
def _window_kernel(
    grad_value_ptr, scale_ptr, grad_output_ptr, shapes_ptr, starts_ptr, reference_ptr, coordinates_ptr, weights_ptr,
    num_rows,
    M: tl.constexpr, L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, REFERENCE: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr, STRIP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = L * P
    image, head, tile = _place(num_rows, M, BLOCK_QUERIES)
    position = tile + tl.arange(0, BLOCK_QUERIES)
    in_queries = position < num_rows
    query = _strips(tl.minimum(position, num_rows - 1), shapes_ptr, L, STRIP)
    first_query = image * num_rows
    grad_value_ptr += (first_query * M + head) * D
    coordinates_ptr += (first_query * M + head) * (2 * K)
    weights_ptr += (first_query * M + head) * K
    reference_ptr += first_query * (L * REFERENCE)

    softmax = ()
    if REFERENCE > 0:
        softmax = _softmax_terms(weights_ptr + query * (M * K), tl.zeros_like(query), K, BLOCK_K, 1, tl.float32)
    place = tl.arange(0, BLOCK_D)[None, :]
    grad_output_ptr += (first_query * M + head) * D
    grad_ptr = grad_output_ptr + query[:, None] * (M * D) + place
    grads = (tl.load(grad_ptr, mask=in_queries[:, None] & (place < D), other=0.0).to(OPERAND),)
    if grad_output_ptr.dtype.element_ty == tl.float32:
        grads = _split(grads[0], tl.float32)

    for index in range(L):
        level = _level(shapes_ptr, starts_ptr, reference_ptr, query[None, :], index, L, P, REFERENCE, tl.float32)
        height, width, start = level[0], level[1], level[2]
        xs = ()
        ys = ()
        weights = ()
        sum_x = tl.zeros([1, BLOCK_QUERIES], tl.float32)
        sum_y = tl.zeros([1, BLOCK_QUERIES], tl.float32)
        count = tl.zeros([1, BLOCK_QUERIES], tl.float32)
        for point in tl.static_range(P):
            x, y, weight = _load_meeting(
                coordinates_ptr, weights_ptr, index * P + point, query[None, :] * (M * K), _expand(softmax, 0),
                in_queries[None, :], level, REFERENCE,
            )  # fmt: skip
            xs += (x,)  # type: ignore[assignment]
            ys += (y,)  # type: ignore[assignment]
            weights += (weight,)  # type: ignore[assignment]
            sum_x += tl.where(weight != 0.0, x, 0.0)
            sum_y += tl.where(weight != 0.0, y, 0.0)
            count += tl.where(weight != 0.0, 1.0, 0.0)

        # The window is put around the mean of the samples, so that few are outside.
        sum_x, sum_y, count = tl.reduce((tl.ravel(sum_x), tl.ravel(sum_y), tl.ravel(count)), 0, _sum)
        left = tl.maximum(tl.floor(sum_x / tl.maximum(count, 1.0)).to(tl.int32) - (WINDOW // 2 - 1), -1)
        top = tl.maximum(tl.floor(sum_y / tl.maximum(count, 1.0)).to(tl.int32) - (WINDOW // 2 - 1), -1)
        column = (left + tl.arange(0, WINDOW))[:, None]
        along_x = ()  # of each point, the hat functions (WINDOW, queries)
        in_window = ()
        above = tl.full([1, BLOCK_QUERIES], -(1 << 30), tl.int32)  # minus the first row that is met
        below = tl.full([1, BLOCK_QUERIES], -1, tl.int32)  # the last one
        outside = tl.zeros([1, BLOCK_QUERIES], tl.int32)  # a bit for each point with samples outside
        for point in tl.static_range(P):
            inside = _is_inside(xs[point], ys[point], left, top, WINDOW)
            upper = tl.floor(ys[point]).to(tl.int32)
            above = tl.maximum(above, tl.where(inside, -upper, -(1 << 30)))
            below = tl.maximum(below, tl.where(inside, upper + 1, -1))
            outside |= tl.where(inside | (weights[point] == 0.0), 0, 1 << point)
            along_x += (_hat(xs[point] - column.to(tl.float32)),)  # type: ignore[assignment]
            in_window += (tl.where(inside, weights[point], 0.0),)  # type: ignore[assignment]
        above, below, outside = tl.reduce((tl.ravel(above), tl.ravel(below), tl.ravel(outside)), 0, _extent)

        first_row = tl.maximum(-above, 0)
        # From 0, or else the compiler does not see that the rows' addresses are multiples of 16 bytes.
        for step in range(0, tl.minimum(below + 1, height) - first_row):
            row = first_row + step
            window = tl.zeros([WINDOW, BLOCK_QUERIES], tl.float32)
            for point in tl.static_range(P):
                window += in_window[point] * _hat(ys[point] - row) * along_x[point]
            pixel_ptr = grad_value_ptr + (start + row * width + column).to(tl.int64) * (M * D) + place
            exists = (column >= 0) & (column < width) & (place < D)
            _reduce(pixel_ptr, scale_ptr, _multiply(window, grads, PRECISION), exists)

        if outside > 0:
            _add_outside(
                grad_value_ptr, scale_ptr, grad_output_ptr, query[:, None], coordinates_ptr + 2 * index * P,
                weights_ptr + index * P, _expand(softmax, 1), in_queries[:, None],
                _level(shapes_ptr, starts_ptr, reference_ptr, query[:, None], index, L, P, REFERENCE, tl.float32),
                left, top, outside, REFERENCE, P, M * K, M * D, D, WINDOW,
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------------

MAX_CHANNELS = 256  # of a head, per launch; more are computed by several launches
MAX_WINDOW_CHANNELS = {torch.bfloat16: 128, torch.float16: 64, torch.float32: 64}
FEW_ROWS = 32768  # B·Q·M up to which programs have one warp, to spread over all multiprocessors

# What `launch_configuration` gives, as measured by `python -m benchmarks.tune` on the architecture that the key names:
# (direction, architecture, D, bytes per channel). No GPU has been measured yet: the rule of that function decides.
LAUNCH_TABLE: dict[tuple[str, str, int, int], tuple[int, int]] = {}


def _channels_per_word(dtype: torch.dtype, D: int) -> int:
    """Two half-precision channels are read as one 32-bit word, where all rows start at a word."""
    return 2 if dtype.itemsize == 2 and D % 2 == 0 else 1


def launch_configuration(direction: str, architecture: str, D: int, dtype: torch.dtype) -> tuple[int, int]:
    """Words per block and warps of a launch: from the table of measured ones, or else by this rule.

    Backward, a block is the largest power of two of words in a row (at most one row per warp), and the rest is one more
    block: 48 channels are 32 + 16, and a lane loads at most 16 + 8 bytes of each row. Forward, it is 32 channels, or
    half of a row where that is more: narrow blocks repeat the arithmetic of a sample in fewer lanes, and two blocks of
    accumulators fit in the 64 registers that let half of all warps be resident. Four warps share more rows in L1 than
    two, and two need fewer registers in the backward pass. With few queries, and where the backward pass adds to
    value's gradient itself, programs have one warp (`_launch`), which needs fewest.
    `direction` is "forward", "backward" or "windows", whose numbers are queries and warps: 64 queries are 8 × 8 pixels,
    and 16 queries per warp leave it the registers of `max_registers`. No queries at all means that windows do not pay.
    """
    if (direction, architecture, D, dtype.itemsize) in LAUNCH_TABLE:
        return LAUNCH_TABLE[direction, architecture, D, dtype.itemsize]
    if direction == "windows":
        return 64, 4
    pack = _channels_per_word(dtype, D)
    whole_row = 1 << ((min(D, MAX_CHANNELS) // pack).bit_length() - 1)
    channels_of_a_block = 16 if dtype == torch.float64 else 32
    if direction == "forward":
        return min(whole_row, max(channels_of_a_block // pack, whole_row // 2)), 4
    return min(whole_row, 128), 2


def max_registers(
    direction: str, architecture: str, D: int, dtype: torch.dtype, spare: bool = False, reference: int = 0
) -> int | None:
    """The registers that a launch may use per thread on NVIDIA, None for the compiler's choice.

    Left alone, the compiler sometimes spills one register to make room for one more warp, and sometimes takes more than
    it needs. On sm_90, 64 are the most that keep half of all warps resident, and enough for the usual D and dtypes;
    it is 72 (44 %) forward for D 64 in half precision, and backward with gradients of reference points and for an
    encoder of boxes (`spare`). Other D and float64 need more, and so does sm_100 backward in half precision. Where
    reductions are of one float or 64-bit integer each, the backward pass needs up to 125. Windows hold a hat function
    per point for 16 pixels, 128 registers in bfloat16 (a quarter of all warps), 168 in float32 (19 %): they wait for
    tensor cores and barriers, not for scattered rows.
    With these bounds nothing spills on sm_90 in Triton 3.6, 3.8 or 3.9.
    `direction` is "forward", "backward", "deterministic" (backward, fixed point) or "windows".
    """
    single_reductions = architecture.startswith("sm_") and int(architecture[3:]) < 90
    if direction == "windows":
        return 255 if single_reductions else 128 if dtype == torch.bfloat16 and D <= 64 else 168
    if direction == "forward":
        if dtype == torch.float64 or D % 16 or D > 64:
            return 128
        return 64 if architecture == "sm_90" and not (D == 64 and dtype.itemsize == 2) else 72
    if direction == "deterministic" or dtype == torch.float64 or single_reductions:
        return 255
    if architecture == "sm_90" and D in (32, 48, 64):
        if reference == 4 and D == 48 and dtype == torch.float32 and not spare:
            return None  # Triton 3.8 spills with any bound up to 72, and takes 67 unasked
        return 72 if spare else 64
    if architecture == "sm_100" and dtype.itemsize == 2 and D % 16 == 0:
        return 96
    return None


@lru_cache
def kernel_constants(
    dtype: torch.dtype, M: int, L: int, P: int, D: int, first: int, reference: int,
    configuration: tuple[int, int], lanes: int,
) -> dict[str, Any]:  # fmt: skip
    """The compile-time arguments that both kernels share, for the channels from `first` on and warps of `lanes`."""
    block_words, num_warps = configuration
    channels, pack = min(D - first, MAX_CHANNELS), _channels_per_word(dtype, D)
    lanes_per_query = max(1, block_words * max(dtype.itemsize, 4) // 16)
    return {
        "M": M,
        "L": L,
        "P": P,
        "D": D,
        "CHANNELS": channels,
        "REFERENCE": reference,
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        "PACK": pack,
        "BLOCK_QUERIES": max(1, lanes * num_warps // lanes_per_query),
        "LANES": lanes_per_query,
        "BLOCK_WORDS": block_words,
        "LAST_BLOCK": max(lanes_per_query, triton.next_power_of_2(channels // pack % block_words or block_words)),
        "BLOCK_K": min(64, triton.next_power_of_2(L * P)),
    }


def _launch(
    kernel: Any, direction: str, tensors: list[Tensor], value: Tensor, Q: int, L: int, P: int,
    first: int, reference: int, **extra: Any,
) -> None:  # fmt: skip
    """Launch for the channels from `first` on, at most MAX_CHANNELS, of every head."""
    B, S, M, D = value.shape
    target = architecture(value.device)
    block_words, num_warps = launch_configuration(direction, target, D, value.dtype)
    if B * Q * M <= FEW_ROWS or extra.get("GRAD_VALUE"):
        num_warps = 1
    constants = kernel_constants(
        value.dtype, M, L, P, D, first, reference, (block_words, num_warps), warp_size(value.device)
    )  # fmt: skip
    options: dict[str, Any] = dict(LAUNCH_OPTIONS)
    if target.startswith("sm_"):
        fixed_point = extra.get("GRAD_VALUE") and tensors[0].dtype == torch.int64
        options["maxnreg"] = max_registers(
            "deterministic" if fixed_point else direction,
            target,
            D,
            value.dtype,
            _needs_spare(reference, extra),
            reference,
        )
    programs = triton.cdiv(Q, constants["BLOCK_QUERIES"]) * B * M
    if programs:
        with torch.cuda.device_of(value):
            kernel[(programs,)](*tensors, S, Q, first, **constants, **extra, num_warps=num_warps, **options)


def _needs_spare(reference: int, extra: dict[str, Any]) -> bool:
    """Tell whether a backward pass needs the registers that `max_registers` gives for `spare`."""
    return extra.get("GRAD_REFERENCE", False) or (reference == 4 and not extra.get("GRAD_VALUE", True))


def _in_windows(value: Tensor, coordinates: Tensor) -> bool:
    """Whether value's gradient is summed in windows: in an encoder, whose queries are the pixels themselves."""
    B, S, M, D = value.shape
    _, Q, _, _, P, _ = coordinates.shape
    if Q != S or B * Q * M <= FEW_ROWS or P > 4 or MAX_WINDOW_CHANNELS.get(value.dtype, 0) < D:
        return False
    if max(value.numel(), coordinates.numel()) >= B << 31:  # offsets inside an image have 32 bits
        return False
    return launch_configuration("windows", architecture(value.device), D, value.dtype)[0] > 0


def window_constants(
    dtype: torch.dtype, M: int, L: int, P: int, D: int, reference: int, queries: int
) -> dict[str, Any]:  # fmt: skip
    """The compile-time arguments of the kernel that sums value's gradient in windows."""
    # Two float16 numbers have not the range of the weights, and the interpreter multiplies bfloat16 wrongly.
    operand = tl.bfloat16 if dtype == torch.bfloat16 and not INTERPRETED else tl.float32
    return {
        "M": M,
        "L": L,
        "P": P,
        "D": D,
        "REFERENCE": reference,
        "OPERAND": operand,
        "PRECISION": "ieee" if torch.version.hip else "tf32",
        "BLOCK_QUERIES": queries,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
        "WINDOW": 16,
        "STRIP": 8,
        "BLOCK_K": min(64, triton.next_power_of_2(L * P)),
    }


def _launch_windows(tensors: list[Tensor], value: Tensor, L: int, P: int, reference: int) -> None:
    B, S, M, D = value.shape
    target = architecture(value.device)
    queries, num_warps = launch_configuration("windows", target, D, value.dtype)
    constants = window_constants(value.dtype, M, L, P, D, reference, queries)
    options: dict[str, Any] = dict(LAUNCH_OPTIONS)
    if target.startswith("sm_"):
        options["maxnreg"] = max_registers("windows", target, D, value.dtype)
    programs = triton.cdiv(S, queries) * B * M
    with torch.cuda.device_of(value):
        _window_kernel[(programs,)](*tensors, S, **constants, num_warps=num_warps, **options)


def _dense(tensor: Tensor) -> Tensor:
    """Contiguous and at a multiple of 16 bytes, as the kernels' wide loads need; a copy only where it is not."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _dense_inputs(
    value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, reference_points: Tensor | None,
    coordinates: Tensor, weights: Tensor,
) -> list[Tensor]:  # fmt: skip
    points = coordinates if reference_points is None else reference_points  # the plain form never reads it
    return [_dense(t) for t in (value, spatial_shapes, level_start_index, points, coordinates, weights)]


def _launch_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor | None,
    coordinates: Tensor,
    weights: Tensor,
) -> Tensor:
    require_triton(value)
    B, _, M, D = value.shape
    _, Q, _, L, P, _ = coordinates.shape
    reference = 0 if reference_points is None else reference_points.shape[-1]
    output = value.new_empty(B, Q, M * D)
    inputs = _dense_inputs(value, spatial_shapes, level_start_index, reference_points, coordinates, weights)
    for first in range(0, D, MAX_CHANNELS):
        _launch(_forward_kernel, "forward", [output, *inputs], value, Q, L, P, first, reference)
    return output


def _fixed_point_scale(grad_output: Tensor, weights: Tensor | None, compute: torch.dtype) -> Tensor:
    """The power of two that takes the largest possible sum of contributions to one pixel to at most 2^61."""
    bound = grad_output.abs().amax().double() * grad_output.shape[1]
    if weights is not None:  # of softmax weights, at most one meets a pixel per query
        bound = bound * weights.abs().amax().double() * (weights.shape[3] * weights.shape[4])
    return torch.exp2(61 - torch.ceil(torch.log2(bound.clamp(min=torch.finfo(compute).tiny * 2.0**64))))


def _launch_backward(
    grad_output: Tensor,
    output: Tensor | None,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor | None,
    coordinates: Tensor,
    weights: Tensor,
    grad_reference: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of value, reference points (empty unless asked for), coordinates, and weights."""
    require_triton(value)
    B, S, M, D = value.shape
    _, Q, _, L, P, _ = coordinates.shape
    reference = 0 if reference_points is None else reference_points.shape[-1]
    compute = torch.promote_types(value.dtype, torch.float32)
    grad_output = _dense(grad_output.to(value.dtype))
    inputs = [grad_output, grad_output if output is None else _dense(output)]
    inputs += _dense_inputs(value, spatial_shapes, level_start_index, reference_points, coordinates, weights)

    fixed_point = torch.are_deterministic_algorithms_enabled() and grad_output.numel() > 0
    scale = value.new_empty((), dtype=torch.float64)  # not read without fixed point
    if fixed_point:
        scale = _fixed_point_scale(grad_output, weights if reference == 0 else None, compute)
    grad_value = torch.zeros_like(inputs[2], dtype=torch.int64 if fixed_point else compute)
    # Where D takes several launches, each gives the points and weights a partial gradient.
    chunks = range(0, D, MAX_CHANNELS)
    rounded = len(chunks) == 1 and compute == torch.float32
    grad_coordinates = coordinates.new_empty(len(chunks), *coordinates.shape, dtype=None if rounded else compute)
    grad_weights = weights.new_empty(len(chunks), *weights.shape, dtype=None if rounded else compute)
    grad_points = value.new_empty(len(chunks), B, Q, M, L, reference * grad_reference, dtype=compute)
    in_windows = _in_windows(value, coordinates)
    if in_windows:
        _launch_windows([grad_value, scale, grad_output, *inputs[3:]], value, L, P, reference)
    for chunk, first in enumerate(chunks):
        gradients = [grad_value, grad_points[chunk], grad_coordinates[chunk], grad_weights[chunk], scale]
        _launch(
            _backward_kernel, "backward", [*gradients, *inputs],
            value, Q, L, P, first, reference,
            GRAD_REFERENCE=grad_reference, GRAD_VALUE=not in_windows, BLOCK_P=triton.next_power_of_2(P),
        )  # fmt: skip
    if fixed_point:
        grad_value = (grad_value / scale).to(compute)
    # Where a word holds two channels, lanes add all even channels before all odd ones; windows keep the order.
    pack = 1 if in_windows else _channels_per_word(value.dtype, D)
    grad_value = grad_value.view(B, S, M, pack, D // pack).mT.reshape(B, S, M, D).to(value.dtype)
    total = [g[0] if rounded else g.sum(0) for g in (grad_coordinates, grad_weights)]
    return (
        grad_value,
        grad_points.sum((0, 3)),
        total[0].to(coordinates.dtype),
        total[1].to(weights.dtype),
    )


def compile_cases() -> Iterator[tuple[Any, ...]]:
    """Every kernel in the configurations that launches choose, for `benchmarks.compile_report`.

    Of D and dtypes, those in use: Deformable DETR (32), SOLQ (48), and the ends of the range; M = 8, L = P = 4.
    """
    forms = [
        (D, dtype, dtype, form) for D in (32, 48, 64) for dtype in (torch.float32, torch.bfloat16) for form in (2, 4)
    ]
    forms += [(D, dtype, torch.float32, 0) for D in (32, 48, 64) for dtype in (torch.float32, torch.bfloat16)]
    forms += [
        (48, torch.float16, torch.float16, 2),
        (48, torch.float64, torch.float64, 2),
        (48, torch.float64, torch.float64, 0),
    ]
    forms += [(D, dtype, dtype, 2) for D in (1, 16, 20, 128, 256) for dtype in (torch.float32, torch.bfloat16)]
    for D, dtype, points_dtype, form in forms:
        for direction in ("forward", "backward"):
            for target in ("sm_80", "sm_90", "sm_100", *(["gfx942"] if (D, form) == (48, 2) else [])):
                yield _compile_case(direction, D, dtype, points_dtype, form, target)
    for D, dtype, form in itertools.product((32, 48, 64), (torch.float32, torch.bfloat16), (2, 4)):
        for target in ("sm_80", "sm_90", "sm_100", *(["gfx942"] if (D, form) == (48, 2) else [])):
            yield _compile_case("backward", D, dtype, dtype, form, target, in_windows=True)
            yield _compile_window_case(D, dtype, form, target)
    for D, dtype, form in (
        (20, torch.bfloat16, 2),
        (128, torch.bfloat16, 2),
        (48, torch.float16, 0),
        (64, torch.float16, 2),
    ):
        for target in ("sm_80", "sm_90", "sm_100"):
            yield _compile_window_case(D, dtype, form, target, deterministic=D == 48)
    for dtype in (torch.float32, torch.bfloat16):
        for target in ("sm_80", "sm_90", "sm_100"):
            yield _compile_case("forward", 48, dtype, dtype, 2, target, few_rows=True)
            yield _compile_case("backward", 48, dtype, dtype, 4, target, grad_reference=True)
            yield _compile_case("backward", 48, dtype, dtype, 2, target, grad_reference=True, in_windows=True)
            yield _compile_case("backward", 48, dtype, dtype, 2, target, deterministic=True)


POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}


def _label(form: int, direction: str, D: int, dtype: torch.dtype, remarks: dict[str, bool]) -> str:
    name = {0: "ms_deform_attn", 2: "ms_deform_attn_fused points", 4: "ms_deform_attn_fused boxes"}[form]
    given = [remark for remark, holds in remarks.items() if holds]
    return " ".join([name, direction, f"D={D}", str(dtype).removeprefix("torch."), *given])


def _compile_case(
    direction: str, D: int, dtype: torch.dtype, points_dtype: torch.dtype, form: int, target: str, *,
    few_rows: bool = False, grad_reference: bool = False, deterministic: bool = False, in_windows: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    compute = POINTERS[torch.promote_types(dtype, torch.float32)]
    block_words, num_warps = launch_configuration(direction, target, D, dtype)
    lanes = 64 if target == "gfx942" else 32
    if few_rows or (direction == "backward" and not in_windows):
        num_warps = 1
    constants = kernel_constants(dtype, 8, 4, 4, D, 0, form, (block_words, num_warps), lanes)
    signature = {
        "output_ptr": POINTERS[dtype],
        "value_ptr": POINTERS[dtype],
        "shapes_ptr": "*i64",
        "starts_ptr": "*i64",
        "reference_ptr": "*fp64" if dtype == torch.float64 else "*fp32",
        "coordinates_ptr": POINTERS[points_dtype],
        "weights_ptr": POINTERS[points_dtype],
        "num_rows": "i32",
        "num_queries": "i32",
        "channel_start": "i32",
    }
    if direction == "backward":
        constants = constants | {"GRAD_REFERENCE": grad_reference, "GRAD_VALUE": not in_windows, "BLOCK_P": 4}
        signature |= {
            "grad_value_ptr": "*i64" if deterministic else compute,
            "grad_reference_ptr": compute,
            "grad_coordinates_ptr": POINTERS[points_dtype],
            "grad_weights_ptr": POINTERS[points_dtype],
            "scale_ptr": "*fp64",
            "grad_output_ptr": POINTERS[dtype],
        }
    usual = dtype != torch.float64 and D % 16 == 0 and not deterministic
    expectations: dict[str, Any] = {"targets": (target,)}
    launched = "deterministic" if deterministic else direction
    extra = {"GRAD_REFERENCE": grad_reference, "GRAD_VALUE": not in_windows}
    registers = max_registers(launched, target, D, dtype, _needs_spare(form, extra), form)
    if target != "gfx942":
        expectations["options"] = {"maxnreg": registers}
    if usual:
        expectations["load"] = 16
        expectations["occupancy"] = 0.5 if registers == 64 else 0.25
        expectations["vector_atomics"] = direction == "backward" and not in_windows
    remarks = {
        "few rows": few_rows,
        "with reference": grad_reference,
        "deterministic": deterministic,
        "without value": in_windows,
    }
    label = _label(form, direction, D, dtype, remarks)
    aligned = [name for name in signature if name.endswith("_ptr")] + ["channel_start"]
    kernel = _forward_kernel if direction == "forward" else _backward_kernel
    return label, kernel, signature, constants, aligned, num_warps, 3, expectations


def _compile_window_case(
    D: int, dtype: torch.dtype, form: int, target: str, *, deterministic: bool = False
) -> tuple[Any, ...]:
    points = POINTERS[dtype if form else torch.float32]
    signature = {
        "grad_value_ptr": "*i64" if deterministic else "*fp32",
        "scale_ptr": "*fp64",
        "grad_output_ptr": POINTERS[dtype],
        "shapes_ptr": "*i64",
        "starts_ptr": "*i64",
        "reference_ptr": "*fp32",
        "coordinates_ptr": points,
        "weights_ptr": points,
        "num_rows": "i32",
    }
    queries, num_warps = launch_configuration("windows", target, D, dtype)
    constants = window_constants(dtype, 8, 4, 4, D, form, queries)
    expectations: dict[str, Any] = {"targets": (target,), "vector_atomics": D % 4 == 0 and not deterministic}
    if target != "gfx942":
        expectations["options"] = {"maxnreg": max_registers("windows", target, D, dtype)}
    label = _label(form, "value gradient", D, dtype, {"deterministic": deterministic})
    aligned = [name for name in signature if name.endswith("_ptr")]
    return label, _window_kernel, signature, constants, aligned, num_warps, 3, expectations


# ---------------------------------------------------------------------------------------------------------------------
# Registered operators. Spatial shapes and level starts are tensors here, whatever the caller gave.
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("solq::ms_deform_attn", mutates_args=())
def _op(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    return _launch_forward(value, spatial_shapes, level_start_index, None, sampling_locations, attention_weights)


@torch.library.custom_op("solq::ms_deform_attn_backward", mutates_args=())
def _op_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_value, _, grad_locations, grad_weights = _launch_backward(
        grad_output, None, value, spatial_shapes, level_start_index, None, sampling_locations, attention_weights, False
    )
    return grad_value, grad_locations, grad_weights


@torch.library.custom_op("solq::ms_deform_attn_fused", mutates_args=())
def _fused_op(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    return _launch_forward(
        value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits
    )


@torch.library.custom_op("solq::ms_deform_attn_fused_backward", mutates_args=())
def _fused_op_backward(
    grad_output: Tensor,
    output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    grad_reference: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_value, grad_points, grad_offsets, grad_logits = _launch_backward(
        grad_output, output, value, spatial_shapes, level_start_index,
        reference_points, sampling_offsets, attention_logits, grad_reference,
    )  # fmt: skip
    return grad_value, grad_points.to(reference_points.dtype), grad_offsets, grad_logits


@_op.register_fake
@_fused_op.register_fake
def _(value: Tensor, *others: Tensor) -> Tensor:
    B, _, M, D = value.shape
    return value.new_empty(B, others[-1].shape[1], M * D)


@_op_backward.register_fake
def _(grad_output, value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    return tuple(t.new_empty(t.shape) for t in (value, sampling_locations, attention_weights))


@_fused_op_backward.register_fake
def _(
    grad_output, output, value, spatial_shapes, level_start_index,
    reference_points, sampling_offsets, attention_logits, grad_reference,
):  # fmt: skip
    points = reference_points.new_empty(*reference_points.shape[:3], reference_points.shape[3] if grad_reference else 0)
    others = (t.new_empty(t.shape) for t in (value, sampling_offsets, attention_logits))
    return next(others), points, *others


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _save_with_output(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grad_value, grad_locations, grad_weights = _op_backward(grad_output, *ctx.saved_tensors)
    return grad_value, None, None, grad_locations, grad_weights


def _fused_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grad_reference = ctx.needs_input_grad[3]
    grad_value, grad_points, grad_offsets, grad_logits = _fused_op_backward(
        grad_output, *ctx.saved_tensors, grad_reference
    )
    return grad_value, None, None, grad_points if grad_reference else None, grad_offsets, grad_logits


_op.register_autograd(_backward, setup_context=_save)
_fused_op.register_autograd(_fused_backward, setup_context=_save_with_output)

# Under autocast only `value` becomes half precision: locations in bfloat16 would be wrong by pixels, and weights and
# logits gain nothing.
_library = torch.library.Library("solq", "FRAGMENT")


def _under_autocast(value: Tensor) -> Tensor:
    device_type = value.device.type
    # "meta" has no autocast, and older versions of torch raise when asked for it
    if value.dtype == torch.float64 or value.is_meta or not torch.is_autocast_enabled(device_type):
        return value
    return value.to(torch.get_autocast_dtype(device_type))


def _register_autocast(name: str, device_type: str) -> None:
    operator = getattr(torch.ops.solq, name)

    def under_autocast(value: Tensor, *others: Tensor) -> Tensor:
        value = _under_autocast(value)
        with torch.autocast(device_type, enabled=False):
            return operator(value, *others)

    _library.impl(name, under_autocast, {"cuda": "AutocastCUDA", "cpu": "AutocastCPU"}[device_type])


for _name in ("ms_deform_attn", "ms_deform_attn_fused"):
    for _device_type in ("cuda", "cpu"):
        _register_autocast(_name, _device_type)


# ---------------------------------------------------------------------------------------------------------------------
# Public functions
# ---------------------------------------------------------------------------------------------------------------------

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def _is_readable(given: SpatialShapes | LevelStartIndex) -> bool:
    """Whether its content can be looked at without making the host wait, or a compiler give up."""
    return not isinstance(given, Tensor) or (given.device.type == "cpu" and not torch.compiler.is_compiling())


def _check_integers(name: str, numbers: list[Any]) -> None:
    if not torch.compiler.is_compiling() and not all(hasattr(number, "__index__") for number in numbers):
        raise TypeError(f"{name} has {numbers}, must be integers")


def _check(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: LevelStartIndex,
    points: dict[str, Tensor],
    weights: dict[str, Tensor],
    reference_points: dict[str, Tensor],
) -> None:
    """Raise an error that names the argument; `points`, `weights` and `reference_points` are {name: tensor}."""
    eager = not torch.compiler.is_compiling()
    for name, tensor in {"value": value, **points, **weights, **reference_points}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, must be a tensor")
        if tensor.dtype not in _FLOATING:
            raise TypeError(f"{name} is {tensor.dtype}, must be float16, bfloat16, float32 or float64")
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device} but value is on {value.device}: move one of them")
        if eager and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name} has a forward-mode tangent, which has no formula here: use torch.autograd.grad"
            )

    if value.ndim != 4:
        raise ValueError(f"value has shape {_shape(value)}, must have 4 dimensions (B, S, M, D)")
    B, S, M, _ = value.shape
    ((points_name, point),) = points.items()
    if point.ndim != 6 or point.shape[-1] != 2:
        raise ValueError(f"{points_name} has shape {_shape(point)}, must be (B, Q, M, L, P, 2)")
    if point.shape[0] != B or point.shape[2] != M:
        raise ValueError(f"{points_name} has shape {_shape(point)}, must be (B={B}, Q, M={M}, L, P, 2) as value says")
    Q, L = point.shape[1], point.shape[3]
    if 0 in (*value.shape[1:], *point.shape[2:]):
        raise ValueError(f"value is {_shape(value)} and {points_name} {_shape(point)}, but only B and Q may be 0")
    ((weights_name, weight),) = weights.items()
    if weight.shape != point.shape[:-1]:
        raise ValueError(f"{weights_name} has shape {_shape(weight)}, must be {_shape(point[..., 0])} as {points_name}")
    for name, tensor in reference_points.items():
        if tensor.ndim != 4 or tensor.shape[-1] not in (2, 4):
            raise ValueError(f"{name} has shape {_shape(tensor)}, must be (B, Q, L, 2) or (B, Q, L, 4)")
        if tensor.shape[:3] != (B, Q, L):
            raise ValueError(f"{name} has shape {_shape(tensor)}, must be (B={B}, Q={Q}, L={L}, …) as {points_name}")

    for name, given, ndim in (("spatial_shapes", spatial_shapes, 2), ("level_start_index", level_start_index, 1)):
        if isinstance(given, Tensor):
            if given.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{name} is {given.dtype}, must be int64 or int32")
            if given.device.type != "cpu" and given.device != value.device:
                raise ValueError(f"{name} is on {given.device} but value is on {value.device}: move one of them")
            if given.ndim != ndim or given.shape[1:] not in ((), (2,)):
                raise ValueError(f"{name} has shape {_shape(given)}, must be {'(L, 2)' if ndim == 2 else '(L,)'}")
        elif not isinstance(given, Sequence) or isinstance(given, str):
            raise TypeError(f"{name} is a {type(given).__name__}, must be a tensor or a list")
        if len(given) != L:
            raise ValueError(f"{points_name} has {L} levels but {name} has {len(given)}")
    if not _is_readable(spatial_shapes):
        return
    shapes = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else list(spatial_shapes)
    if any(not isinstance(pair, Sequence) or len(pair) != 2 for pair in shapes):
        raise ValueError(f"spatial_shapes is {shapes}, must be pairs (H, W)")
    _check_integers("spatial_shapes", [size for pair in shapes for size in pair])
    if any(height < 1 or width < 1 for height, width in shapes):
        raise ValueError(f"spatial_shapes is {shapes}, heights and widths must be at least 1")
    sizes = [height * width for height, width in shapes]
    if sum(sizes) != S:
        raise ValueError(f"spatial_shapes {shapes} has {sum(sizes)} pixels but value has {S}")
    if _is_readable(level_start_index):
        starts = level_start_index.tolist() if isinstance(level_start_index, Tensor) else list(level_start_index)
        _check_integers("level_start_index", starts)
        if starts != [sum(sizes[:level]) for level in range(L)]:
            raise ValueError(f"level_start_index is {starts}, must be the sums of the sizes {sizes} before each level")


@lru_cache(maxsize=4096)
def _copied_to(device: torch.device, numbers: tuple[Any, ...]) -> Tensor:
    """Integers on a device. A copy from pinned memory does not make the host wait, and each is made once."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"spatial_shapes or level_start_index {numbers} was not seen before this CUDA graph is captured: "
            "call the operator once before, or give tensors"
        )
    with torch.inference_mode(False):
        host = torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
        return host.to(device, non_blocking=True)


def _on_device(given: SpatialShapes | LevelStartIndex, value: Tensor) -> Tensor:
    if isinstance(given, Tensor):
        if given.device == value.device or not _is_readable(given):
            return given.to(value.device)
        given = given.tolist()
    if torch.compiler.is_compiling() or type(value) not in (Tensor, torch.nn.Parameter):
        # Traced, numbers become part of the graph. Filled in on the device, they need no copy that the host waits for.
        numbers = [n for entry in given for n in (entry if isinstance(entry, Sequence) else [entry])]
        filled = [value.new_full((1,), n, dtype=torch.int32) for n in numbers]
        return torch.cat(filled).view(len(given), *([2] if isinstance(given[0], Sequence) else []))
    return _copied_to(value.device, tuple(tuple(n) if isinstance(n, Sequence) else n for n in given))


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: LevelStartIndex,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention: a weighted sum of bilinear samples per query and head.

    The numbers are those of Deformable DETR's CUDA operator (`align_corners=False`, zeros outside); computed in
    float32, or float64 for a float64 `value`. Source: Deformable DETR, section 4.1. Differentiable, once, to the three
    floating arguments, which may differ in dtype (autocast gives a half-precision `value` and float32 locations).

    Args:
        value: (B, S, M, D), S the pixels of all levels, level after level, row after row.
        spatial_shapes: L rows (H, W): a tensor (L, 2), on the GPU if you have it there, or a list of pairs.
        level_start_index: (L,), the first pixel of each level in S.
        sampling_locations: (B, Q, M, L, P, 2) as (x, y), 0..1 over each level's full (padded) map. What lies outside,
            is infinite or NaN, samples zero.
        attention_weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M·D), of the dtype of `value`.

    Raises:
        TypeError: for other than floating tensors, or levels that are not integers.
        ValueError: for shapes or devices that disagree. The content of `spatial_shapes` on a GPU is not looked at.
        RuntimeError: if Triton was asked for where it cannot run.
    """
    _check(
        value,
        spatial_shapes,
        level_start_index,
        {"sampling_locations": sampling_locations},
        {"attention_weights": attention_weights},
        {},
    )
    if backend_for(value) == "reference":
        return reference.ms_deform_attn(
            _under_autocast(value), spatial_shapes, level_start_index, sampling_locations, attention_weights
        )
    shapes, starts = _on_device(spatial_shapes, value), _on_device(level_start_index, value)
    return torch.ops.solq.ms_deform_attn(value, shapes, starts, sampling_locations, attention_weights)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: LevelStartIndex,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """`ms_deform_attn` of softmaxed weights and of locations around reference points, neither of which is stored.

    The weights are the softmax of the logits over L·P; the locations, always computed in float32 or better, are
    reference + offset / (W, H) for points, and centre + offset · size / 2P for boxes (Deformable DETR, appendix A.4).
    Differentiable, once, to the four floating arguments, which may differ in dtype.

    Args:
        value: (B, S, M, D), S the pixels of all levels, level after level, row after row.
        spatial_shapes: L rows (H, W): a tensor (L, 2), on the GPU if you have it there, or a list of pairs.
        level_start_index: (L,), the first pixel of each level in S.
        reference_points: (B, Q, L, 2) as (x, y) or (B, Q, L, 4) as (cx, cy, w, h), 0..1 over the padded maps.
        sampling_offsets: (B, Q, M, L, P, 2): in pixels of each level for points, of half a box over P for boxes.
        attention_logits: (B, Q, M, L, P).

    Returns:
        (B, Q, M·D), of the dtype of `value`.

    Raises:
        TypeError, ValueError, RuntimeError: as `ms_deform_attn`.
    """
    _check(
        value,
        spatial_shapes,
        level_start_index,
        {"sampling_offsets": sampling_offsets},
        {"attention_logits": attention_logits},
        {"reference_points": reference_points},
    )
    if backend_for(value) == "reference":
        return reference.ms_deform_attn_fused(
            _under_autocast(value),
            spatial_shapes,
            level_start_index,
            reference_points,
            sampling_offsets,
            attention_logits,
        )
    shapes, starts = _on_device(spatial_shapes, value), _on_device(level_start_index, value)
    return torch.ops.solq.ms_deform_attn_fused(
        value, shapes, starts, reference_points, sampling_offsets, attention_logits
    )
