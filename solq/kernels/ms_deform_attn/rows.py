"""Read the rows of `value`, and add to those of its gradient: D channels of one pixel and head.

The lanes of a warp are dealt out in order, LANES to a query; a lane reads 16 bytes of a row, so that a query's lanes
read it all at once. A row is read in words of 32 bits (64 for float64). Two half-precision channels share a word
(PACK = 2): two bfloat16 become float32 by one shift and one mask, and even and odd channels are separate float32 tiles,
so that loads are 16 bytes per lane and so are the atomic additions of the backward pass, without exchange between
lanes. What does not fit in a power of two is a second, narrower block: D = 48 is 32 + 16 channels, and no lane is idle.
"""

import triton
import triton.language as tl


@triton.jit
def assign_lanes(queries_left, BLOCK_QUERIES: tl.constexpr, LANES: tl.constexpr):
    """Return each lane's number within its query, its query in the tile (the last one repeated), and if that exists."""
    lane = tl.arange(0, BLOCK_QUERIES * LANES) % LANES
    query = tl.arange(0, BLOCK_QUERIES * LANES) // LANES
    return lane, tl.minimum(query, queries_left - 1), query < queries_left


@triton.jit
def sum_over_lanes(parts, LANES: tl.constexpr):
    """Sum over the lanes of each query, to (queries, 1)."""
    return tl.sum(parts.reshape([parts.shape[0] // LANES, LANES]), axis=1, keep_dims=True)


@triton.jit
def as_words(ptr, PACK: tl.constexpr):
    """Point to the words that hold PACK channels each."""
    return ptr.to(tl.pointer_type(tl.int32)) if PACK == 2 else ptr


@triton.jit
def block_words(
    lane, FIRST: tl.constexpr, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, LAST_BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Number each lane's words (lanes, n) in the block from FIRST, of BLOCK_WORDS, or LAST_BLOCK if fewer are left."""
    SIZE: tl.constexpr = BLOCK_WORDS if FIRST + BLOCK_WORDS <= WORDS else LAST_BLOCK
    EACH: tl.constexpr = SIZE // LANES
    return FIRST + (lane * EACH)[:, None] + tl.arange(0, EACH)[None, :]


@triton.jit
def load_channels(word_ptr, mask, DTYPE: tl.constexpr, PACK: tl.constexpr, COMPUTE: tl.constexpr):
    """Load channels: a tuple with one tile, or with the even and the odd channels where a word holds two."""
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
def accumulate_row(
    accumulators, value_ptr, lane, row, weight,
    STRIDE: tl.constexpr, LANES: tl.constexpr, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, LAST_BLOCK: tl.constexpr,
    DTYPE: tl.constexpr, PACK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Add `weight` times a row: one corner of each query's sample."""
    updated = ()
    for first in tl.static_range(0, WORDS, BLOCK_WORDS):
        word = block_words(lane, first, WORDS, BLOCK_WORDS, LAST_BLOCK, LANES)
        mask = None if first + LANES * word.shape[1] <= WORDS else word < WORDS
        word_ptr = value_ptr + row.to(tl.int64)[:, None] * STRIDE + word
        channels = load_channels(word_ptr, mask, DTYPE, PACK, COMPUTE)
        for half in tl.static_range(PACK):
            updated += (accumulators[first // BLOCK_WORDS * PACK + half] + weight[:, None] * channels[half],)  # type: ignore[assignment]
    return updated


@triton.jit
def dot_block(grads, channels, BLOCK: tl.constexpr, PACK: tl.constexpr):
    """Multiply a block of a row by the output's gradient: each lane's part of the dot product."""
    product = grads[BLOCK * PACK] * channels[0]
    if PACK == 2:
        product += grads[BLOCK * PACK + 1] * channels[1]
    return tl.sum(product, axis=1)


@triton.jit
def dot_row(
    grads, value_ptr, lane, row,
    STRIDE: tl.constexpr, LANES: tl.constexpr, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, LAST_BLOCK: tl.constexpr,
    DTYPE: tl.constexpr, PACK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Multiply a row by the output's gradient: each lane's part of the dot product."""
    total = 0.0
    for first in tl.static_range(0, WORDS, BLOCK_WORDS):
        word = block_words(lane, first, WORDS, BLOCK_WORDS, LAST_BLOCK, LANES)
        mask = None if first + LANES * word.shape[1] <= WORDS else word < WORDS
        word_ptr = value_ptr + row.to(tl.int64)[:, None] * STRIDE + word
        part = dot_block(grads, load_channels(word_ptr, mask, DTYPE, PACK, COMPUTE), first // BLOCK_WORDS, PACK)
        total = part if first == 0 else total + part
    return total


@triton.jit
def add_to_gradient(pixel_ptr, scale_ptr, contribution, mask):
    """Add to the gradient of `value` atomically, in fixed point where that is an integer."""
    if pixel_ptr.dtype.element_ty == tl.int64:
        contribution = (contribution * tl.load(scale_ptr).to(contribution.dtype)).to(tl.int64)
    tl.atomic_add(pixel_ptr, contribution, mask=mask, sem="relaxed")


@triton.jit
def add_row_to_gradient(
    grad_value_ptr, scale_ptr, lane, row, weight, grads,
    STRIDE: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    LAST_BLOCK: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Add `weight` times the output's gradient to a row of value's gradient, odd channels HALF after even ones."""
    for first in tl.static_range(0, WORDS, BLOCK_WORDS):
        word = block_words(lane, first, WORDS, BLOCK_WORDS, LAST_BLOCK, LANES)
        mask = (weight != 0.0)[:, None]
        if first + LANES * word.shape[1] > WORDS:
            mask = mask & (word < WORDS)
        word_ptr = grad_value_ptr + row.to(tl.int64)[:, None] * STRIDE + word
        for half in tl.static_range(PACK):
            add_to_gradient(
                word_ptr + half * HALF, scale_ptr, grads[first // BLOCK_WORDS * PACK + half] * weight[:, None], mask
            )
