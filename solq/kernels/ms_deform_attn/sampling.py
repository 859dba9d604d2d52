"""Compute where the samples of deformable attention lie, and what they weigh: functions that all kernels share.

A lane computes the position and the four weights of a sample for itself. Of the two pixels along an axis the lower one
is moved inside the level first, and hat functions give the weights, which are zero for pixels outside. So no index is
out of bounds, no corner needs a mask, and the rows of the other three corners follow from the first by two additions.

`coordinates` are sampling locations and `weights` attention weights where REFERENCE_SIZE is 0 (the plain form). In the
fused form REFERENCE_SIZE is the number of coordinates of a reference point, 2 or 4; the two are offsets and logits.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def program_tile(num_queries, M: tl.constexpr, BLOCK_QUERIES: tl.constexpr):
    """Return the image (int64) and head that this program serves, and the first query of its tile."""
    tiles = tl.cdiv(num_queries, BLOCK_QUERIES)
    image_and_head = tl.program_id(0) // tiles
    return (image_and_head // M).to(tl.int64), image_and_head % M, tl.program_id(0) % tiles * BLOCK_QUERIES


@triton.jit
def load_pairs(ptr, index):
    """Load x and y of the pairs number `index`, in one load where a pair has at most 8 bytes."""
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
def store_pairs(ptr, index, x, y, mask):
    """Store x and y as the pairs number `index`, in one store where a pair has at most 8 bytes."""
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
def load_level(levels_ptr, level, L: tl.constexpr):
    """Load the height, the width and the first pixel of a level."""
    height = tl.load(levels_ptr + level).to(tl.int32)
    width = tl.load(levels_ptr + L + level).to(tl.int32)
    start = tl.load(levels_ptr + 2 * L + level).to(tl.int32)
    return height, width, start


@triton.jit
def pixel_transform(
    reference_ptr, query, level, height, width,
    L: tl.constexpr, P: tl.constexpr, REFERENCE_SIZE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Return (scale_x, scale_y, shift_x, shift_y), which turn the coordinates of each query's samples into pixels."""
    scale_x = tl.zeros_like(query).to(COMPUTE) + width
    scale_y = tl.zeros_like(query).to(COMPUTE) + height
    shift_x = tl.zeros_like(query).to(COMPUTE) - 0.5
    shift_y = shift_x
    if REFERENCE_SIZE > 0:
        point_ptr = reference_ptr + level * REFERENCE_SIZE + query * (L * REFERENCE_SIZE)
        shift_x += tl.load(point_ptr).to(COMPUTE) * scale_x
        shift_y += tl.load(point_ptr + 1).to(COMPUTE) * scale_y
        if REFERENCE_SIZE == 4:
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
    return scale_x, scale_y, shift_x, shift_y


@triton.jit
def load_sample(
    coordinates_ptr, weights_ptr, sample, first_sample, softmax, transform,
    REFERENCE_SIZE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Load a sample of each query: its coordinates, its position in pixels, and its weight.

    `softmax` and `transform` are as `softmax_terms` and `pixel_transform` return them.
    """
    scale_x, scale_y, shift_x, shift_y = transform
    x, y = load_pairs(coordinates_ptr + 2 * sample, first_sample)
    x = x.to(COMPUTE)
    y = y.to(COMPUTE)
    weight = tl.load(weights_ptr + sample + first_sample).to(COMPUTE)
    if REFERENCE_SIZE > 0:
        max_logit, log2_sum = softmax
        weight = tl.exp2((weight - max_logit) * LOG2_E - log2_sum)
    return x, y, x * scale_x + shift_x, y * scale_y + shift_y, weight


@triton.jit
def hat(distance):
    """Weigh a pixel by its distance from a sample: 1 at the sample, falling to 0 at a distance of one pixel."""
    return tl.maximum(1.0 - tl.abs(distance), 0.0)


@triton.jit
def corners(position, size):
    """Return the lower of two neighboring pixels along an axis, the distance of `position` from it, and both weights.

    The pixels are always inside: near the ends and beyond, they are the last two, with the weights of their own hat
    functions, which are zero a pixel or more outside, and for infinity and NaN. A lone pixel has no upper neighbor.
    """
    last = tl.maximum(size - 2, 0).to(position.dtype)
    index = tl.maximum(tl.minimum(position, last), 0.0).to(tl.int32)
    distance = position - index.to(position.dtype)
    end = tl.where(size > 1, 2.0, -1.0).to(position.dtype)
    high_weight = tl.maximum(tl.minimum(distance, end - distance), 0.0)
    return index, distance, hat(distance), high_weight


@triton.jit
def weight_slopes(distance, low_weight, size):
    """Differentiate the two weights that `corners` returns by the position."""
    above = distance >= 0.0
    end = tl.where(size > 1, 2.0, -1.0).to(distance.dtype)
    low = tl.where(low_weight > 0.0, tl.where(above, -1.0, 1.0), 0.0)
    high = tl.where(above & (distance < end), tl.where(distance < 1.0, 1.0, -1.0), 0.0)
    return low, high


@triton.jit
def softmax_terms(
    logits_ptr, lane, K: tl.constexpr, BLOCK_K: tl.constexpr, LANES: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """Return the largest of the K logits of each lane's query, and log2 Σ exp(logit - largest).

    In powers of two, a weight costs one addition and one multiply-add, which keep their digits whatever the logits.
    """
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
    return spread_over_lanes(largest, LANES), spread_over_lanes(tl.log2(total), LANES)


@triton.jit
def spread_over_lanes(x, LANES: tl.constexpr):
    """Give each lane the number (queries, 1) of its query."""
    return x.broadcast_to([x.shape[0], LANES]).reshape([x.shape[0] * LANES])
