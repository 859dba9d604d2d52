"""Triton kernels of multi-level RoIAlign. A program computes several bins of one box, for a block of channels.

All levels are arguments of one launch, and a program chooses its own by the area of its box, so nobody has to sort
boxes by level, and the host need not know how many each level has.
"""

import triton
import triton.language as tl


@triton.jit
def _load_box(boxes_ptr, box_image_ptr, num_images, COMPUTE: tl.constexpr):
    """Load the box of this program, its image and area. A box that cannot be sampled begins at NaN: nowhere inside."""
    region = tl.program_id(0).to(tl.int64)
    x0 = tl.load(boxes_ptr + region * 4).to(COMPUTE)
    y0 = tl.load(boxes_ptr + region * 4 + 1).to(COMPUTE)
    x1 = tl.load(boxes_ptr + region * 4 + 2).to(COMPUTE)
    y1 = tl.load(boxes_ptr + region * 4 + 3).to(COMPUTE)
    image = tl.load(box_image_ptr + region).to(tl.int64)
    area = (x1 - x0) * (y1 - y0)
    is_finite = x0 * 0 + y0 * 0 + x1 * 0 + y1 * 0 == 0
    valid = is_finite & (area >= 0) & (image >= 0) & (image < num_images)
    x0 = tl.where(valid, x0, float("nan"))
    return region, x0, y0, x1, y1, image, area


@triton.jit
def _load_level(levels, sizes, area, SCALES: tl.constexpr, AREAS: tl.constexpr, COMPUTE: tl.constexpr):
    """Choose the level of a box by its area: its pointer, height, width, and pixels per image pixel."""
    level_ptr = levels[0]
    height = tl.full((), sizes[0][0], COMPUTE)
    width = tl.full((), sizes[0][1], COMPUTE)
    scale = tl.full((), SCALES[0], COMPUTE)
    for level in tl.static_range(1, len(SCALES)):
        is_large = area >= AREAS[level - 1]
        level_ptr = tl.where(is_large, levels[level], level_ptr)
        height = tl.where(is_large, sizes[level][0], height)
        width = tl.where(is_large, sizes[level][1], width)
        scale = tl.where(is_large, tl.full((), SCALES[level], COMPUTE), scale)
    return level_ptr, height, width, scale


@triton.jit
def _bins(low, high, scale, BINS: tl.constexpr, ALIGNED: tl.constexpr):
    """Compute along one axis where a box begins, and the size of a bin, in pixels of its level."""
    low *= scale
    high *= scale
    if ALIGNED:
        low -= 0.5
        extent = high - 0.5 - low
    else:
        extent = tl.maximum(high - low, 1.0)
    return low, extent / BINS


@triton.jit
def _neighbors(low, bin_size, bins, step, size, SAMPLES: tl.constexpr):
    """Find for one sample of each bin the pixels before and after, the share of the latter, whether it is inside."""
    position = low + (bins + (step + 0.5) / SAMPLES) * bin_size
    inside = (position >= -1) & (position <= size)  # false for NaN
    position = tl.where(inside, tl.minimum(tl.maximum(position, 0.0), size - 1), 0.0)
    before = position.to(tl.int32)
    after = tl.minimum(before + 1, size.to(tl.int32) - 1)
    return before, after, position - before.to(position.dtype), inside


@triton.jit
def _offsets(row, column, channels, height, width, num_channels, CHANNELS_LAST: tl.constexpr):
    """Compute where the channels of one pixel per bin lie, from the first pixel of the image on.

    The axis along which neighboring lanes read neighboring numbers comes last: channels, or bins of planar features.
    """
    pixel = (row * width.to(tl.int32) + column).to(tl.int64)
    if CHANNELS_LAST:
        offsets = pixel[:, None] * num_channels + channels[None, :]
    else:
        plane = height.to(tl.int64) * width.to(tl.int64)
        offsets = pixel[None, :] + channels[:, None] * plane
    return offsets


@triton.jit
def _per_bin(values, CHANNELS_LAST: tl.constexpr):
    """Spread one value per bin over the channels."""
    return tl.expand_dims(values, 1 if CHANNELS_LAST else 0)


@triton.jit
def _block(num_channels, NUM_BINS: tl.constexpr, BLOCK_BINS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """List the bins and channels of this program, and which of both exist."""
    bins = tl.program_id(1) * BLOCK_BINS + tl.arange(0, BLOCK_BINS)
    channels = tl.program_id(2) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    return bins, channels, bins < NUM_BINS, channels < num_channels


@triton.jit(do_not_specialize=["num_images"])
def forward_kernel(
    features,  # tuple of L pointers: (B, H, W, C), or (B, C, H, W) unless CHANNELS_LAST
    sizes,  # tuple of L pairs (H, W), as floats: integers would be compiled for anew by divisibility
    boxes_ptr,  # (R, 4)
    box_image_ptr,  # (R,)
    output_ptr,  # (R, bins, C)
    num_images,
    num_channels,
    SCALES: tl.constexpr,  # of each level, 1 / stride
    AREAS: tl.constexpr,  # from which on each level but the first is used
    HEIGHT: tl.constexpr,  # of a box, in bins
    WIDTH: tl.constexpr,
    SAMPLES: tl.constexpr,  # per bin and axis
    ALIGNED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    region, x0, y0, x1, y1, image, area = _load_box(boxes_ptr, box_image_ptr, num_images, COMPUTE)
    feature_ptr, height, width, scale = _load_level(features, sizes, area, SCALES, AREAS, COMPUTE)
    feature_ptr += image * height.to(tl.int64) * width.to(tl.int64) * num_channels
    top, bin_height = _bins(y0, y1, scale, HEIGHT, ALIGNED)
    left, bin_width = _bins(x0, x1, scale, WIDTH, ALIGNED)
    bins, channels, bin_exists, channel_exists = _block(num_channels, HEIGHT * WIDTH, BLOCK_BINS, BLOCK_CHANNELS)
    channel_mask = tl.expand_dims(channel_exists, 0 if CHANNELS_LAST else 1)

    if CHANNELS_LAST:
        total = tl.zeros((BLOCK_BINS, BLOCK_CHANNELS), COMPUTE)
    else:
        total = tl.zeros((BLOCK_CHANNELS, BLOCK_BINS), COMPUTE)
    for step_y in tl.static_range(SAMPLES):
        above, below, share_below, inside_y = _neighbors(top, bin_height, bins // WIDTH, step_y, height, SAMPLES)
        for step_x in tl.static_range(SAMPLES):
            before, after, share_after, inside_x = _neighbors(left, bin_width, bins % WIDTH, step_x, width, SAMPLES)
            mask = _per_bin(inside_y & inside_x & bin_exists, CHANNELS_LAST) & channel_mask
            for corner in tl.static_range(4):
                row = below if corner // 2 else above
                column = after if corner % 2 else before
                weight = share_below if corner // 2 else 1 - share_below
                weight *= share_after if corner % 2 else 1 - share_after
                offsets = _offsets(row, column, channels, height, width, num_channels, CHANNELS_LAST)
                pixels = tl.load(feature_ptr + offsets, mask=mask, other=0).to(COMPUTE)
                total += _per_bin(weight, CHANNELS_LAST) * pixels
    total *= 1.0 / (SAMPLES * SAMPLES)

    output_ptr += region * (HEIGHT * WIDTH) * num_channels
    offsets = _per_bin(bins, CHANNELS_LAST) * num_channels + tl.expand_dims(channels, 0 if CHANNELS_LAST else 1)
    mask = _per_bin(bin_exists, CHANNELS_LAST) & channel_mask
    tl.store(output_ptr + offsets, total, mask=mask)


@triton.jit(do_not_specialize=["num_images"])
def backward_kernel(
    grads,  # tuple of L pointers: (B, H, W, C), zeros of the type to sum in
    sizes,  # as in the forward kernel
    boxes_ptr,  # (R, 4)
    box_image_ptr,  # (R,)
    grad_output_ptr,  # (R, bins, C)
    unit_ptr,  # how many units of a fixed-point sum make 1; read with FIXED_POINT only
    num_images,
    num_channels,
    SCALES: tl.constexpr,
    AREAS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr,
    FIXED_POINT: tl.constexpr,  # sums of 64-bit integers are the same in any order
    BLOCK_BINS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    region, x0, y0, x1, y1, image, area = _load_box(boxes_ptr, box_image_ptr, num_images, COMPUTE)
    grad_ptr, height, width, scale = _load_level(grads, sizes, area, SCALES, AREAS, COMPUTE)
    grad_ptr += image * height.to(tl.int64) * width.to(tl.int64) * num_channels
    top, bin_height = _bins(y0, y1, scale, HEIGHT, ALIGNED)
    left, bin_width = _bins(x0, x1, scale, WIDTH, ALIGNED)
    bins, channels, bin_exists, channel_exists = _block(num_channels, HEIGHT * WIDTH, BLOCK_BINS, BLOCK_CHANNELS)

    grad_output_ptr += region * (HEIGHT * WIDTH) * num_channels
    offsets = bins[:, None] * num_channels + channels[None, :]
    mask = bin_exists[:, None] & channel_exists[None, :]
    grad = tl.load(grad_output_ptr + offsets, mask=mask, other=0).to(COMPUTE) * (1.0 / (SAMPLES * SAMPLES))
    for step_y in tl.static_range(SAMPLES):
        above, below, share_below, inside_y = _neighbors(top, bin_height, bins // WIDTH, step_y, height, SAMPLES)
        for step_x in tl.static_range(SAMPLES):
            before, after, share_after, inside_x = _neighbors(left, bin_width, bins % WIDTH, step_x, width, SAMPLES)
            inside = mask & (inside_y & inside_x)[:, None]
            for corner in tl.static_range(4):
                row = below if corner // 2 else above
                column = after if corner % 2 else before
                weight = share_below if corner // 2 else 1 - share_below
                weight *= share_after if corner % 2 else 1 - share_after
                offsets = _offsets(row, column, channels, height, width, num_channels, True)
                part = grad * weight[:, None]
                if FIXED_POINT:
                    part = (part.to(tl.float64) * tl.load(unit_ptr)).to(tl.int64)
                tl.atomic_add(grad_ptr + offsets, part, mask=inside, sem="relaxed")
