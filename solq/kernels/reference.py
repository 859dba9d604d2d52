"""The definitions of the operators in plain PyTorch: the specification, the CPU path, and what tests compare with.

Names and signatures are those of :mod:`solq.kernels`. Imports torch only (SciPy where an assignment is solved).
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

# Torch says so once, of what `_dots` does.
warnings.filterwarnings("ignore", "Sparse (CSR tensor support is in beta|invariant checks are implicitly disabled)")

SpatialShapes = Tensor | Sequence[tuple[int, int]]


# ---------------------------------------------------------------------------------------------------------------------
# Multi-scale deformable attention (Deformable DETR, section 4.1)
# ---------------------------------------------------------------------------------------------------------------------


class _Once(torch.autograd.Function):
    """A gradient, as it is. Its own gradient, to `sources` too, on which it depends unseen, is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("multi-scale deformable attention cannot be differentiated twice")


def _sum_corners(
    value: Tensor, first: Tensor, steps: Tensor, left: Tensor, right: Tensor, upper: Tensor, lower: Tensor
) -> Tensor:
    """Weighted sums (bags, D) of rows of `value`: of each sample the row `first`, and those `steps` after it.

    The weights of the four are products of one across and one down. Summed is over the last axis of `first` and of the
    weights, which torch calls an embedding bag: nothing of the size of the samples, B·Q·M·L·P·D, ever exists.
    """
    rows = value.flatten(0, 2)

    def line(y: Tensor, steps: Tensor) -> Tensor:
        index = torch.stack([first + step for step in steps], dim=2)
        weights = torch.stack([y * left, y * right], dim=2)
        index, weights = (bags.flatten(0, 1).flatten(1) for bags in (index, weights))
        return F.embedding_bag(index, rows, mode="sum", per_sample_weights=weights)

    return line(upper, steps[:2]) + line(lower, steps[2:])


class _SumCorners(torch.autograd.Function):
    """`_sum_corners` with gradients of its own: torch's are many times slower, and not reproducible on every device.

    `above` (S,) has the pixel above each one; for the first line of a level, any whose samples have no lower weight.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, first: Tensor, steps: Tensor, above: Tensor, *weights: Tensor) -> Tensor:
        return _sum_corners(value, first, steps, *weights)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        sources = (grad, *ctx.saved_tensors)
        grad, value, first, steps, above, *weights = (tensor.detach() for tensor in sources)
        grad = grad.contiguous()
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if ctx.needs_input_grad[0]:
            grads[0] = _gradient_of_value(grad, value, first, above, *weights)
        if any(ctx.needs_input_grad[4:]):
            grads[4:] = _gradients_of_weights(grad, value, first, steps, weights)
        if not torch.compiler.is_compiling():  # compiled graphs refuse by themselves, and torch 2.11 traces no error
            grads = [None if gradient is None else _Once.apply(gradient, *sources) for gradient in grads]
        return tuple(grads)


def _gradient_of_value(
    grad: Tensor, value: Tensor, first: Tensor, above: Tensor,
    left: Tensor, right: Tensor, upper: Tensor, lower: Tensor,
) -> Tensor:  # fmt: skip
    """Bags again: of each row, the samples that have it as their first, which one sort brings together.

    What a row gets as the second of a sample is in the bag of the pixel before it, so the same bags serve, begun a
    pixel later; at the end of a line no sample begins, or its second weight is zero. What a row gets as one of the
    lower two is in the bags of the pixel `above`.
    """
    B, S, M, D = value.shape
    row, order = first.flatten().sort(stable=True)
    as_first = torch.searchsorted(row, torch.arange(B * S * M, dtype=row.dtype, device=row.device), out_int32=True)
    as_second = F.pad(as_first[:-M], (M, 0))
    bag = order.int() // first.shape[-1]

    def line(y: Tensor) -> Tensor:
        sums = [
            F.embedding_bag(bag, grad, begins, mode="sum", per_sample_weights=(y * x).flatten().index_select(0, order))
            for begins, x in ((as_first, left), (as_second, right))
        ]
        return sums[0].add_(sums[1]).view(B, S, M * D)

    return line(lower).index_select(1, above).add_(line(upper)).view(B, S, M, D)


def _gradients_of_weights(
    grad: Tensor, value: Tensor, first: Tensor, steps: Tensor, weights: list[Tensor]
) -> list[Tensor]:
    """Dot products of `grad` with the four rows of each sample, times the other one of their two weights."""
    rows, (left, right, upper, lower) = value.flatten(0, 2), weights
    dots = [_dots(grad, rows, (first + step).flatten(0, 1)).view_as(first) for step in steps]
    return [
        (dots[0] * upper).addcmul_(dots[2], lower),
        (dots[1] * upper).addcmul_(dots[3], lower),
        (dots[0] * left).addcmul_(dots[1], right),
        (dots[2] * left).addcmul_(dots[3], right),
    ]


def _dots(vectors: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Dot products (N, K) of `vectors` (N, D) with K of the `rows` each: `index` (N, K)."""
    if (
        torch.compiler.is_compiling()  # makes one loop of it
        or rows.device.type != "cpu"
        or index.shape[1] > rows.shape[0]  # a matrix cannot be that full
        or any(torch.func.debug_unwrap(tensor) is not tensor for tensor in (vectors, rows, index))  # in vmap
    ):
        return (rows[index] * vectors[:, None]).sum(-1)
    # The loop that torch has for a CPU: a product of matrices, sampled at the entries of a sparse one. They may repeat.
    # In parts, to save memory.
    dots = []
    for some, places in zip(vectors.split(4096), index.split(4096), strict=True):
        ends = torch.arange(0, places.numel() + 1, places.shape[1], dtype=index.dtype)
        sampled = torch.sparse_csr_tensor(
            ends, places.flatten(), rows.new_zeros(places.numel()), (len(some), len(rows)), check_invariants=False
        )
        dots.append(torch.sparse.sampled_addmm(sampled, some, rows.T, beta=0, out=sampled).values())
    return torch.cat(dots)


def _corners(locations: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Along an axis: the first of two neighbouring pixels, and both weights, of `locations` in 0..1 over `size` pixels.

    The pixels are always inside: near the ends and beyond, they are the first or last two. A lone pixel has no second.
    A location a pixel or more outside, infinite or NaN has the weights zero, and a gradient of zero.
    """
    position = locations * size - 0.5
    position = torch.where((position > -1) & (position < size), position, -1)
    low = position.detach().floor()
    first = low.clamp(min=0).minimum((size - 2).clamp(min=0))
    fraction = position - low
    before, beyond = (first - low).relu(), (low - first).relu()  # 1 if moved: half outside, at either end
    between = 1 - before - beyond
    weight = torch.addcmul(between, fraction, before - between)
    next_weight = torch.addcmul(beyond, fraction, (between - beyond) * (size > 1))
    return first.int(), weight, next_weight


def _as_tensor(numbers: SpatialShapes | Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """What `torch.as_tensor` does, but for sizes that torch.export keeps dynamic, which that would make constants."""
    if isinstance(numbers, Tensor):
        return numbers.to(device, dtype)
    return torch.tensor(numbers, dtype=dtype, device=device)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Tensor | Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sum of bilinear samples of `value`, weighted by `attention_weights`: see `solq.kernels.ms_deform_attn`."""
    B, S, M, D = value.shape
    Q, L, P = sampling_locations.shape[1], sampling_locations.shape[3], sampling_locations.shape[4]
    compute, device = torch.promote_types(value.dtype, torch.float32), value.device

    # Of each sample (l, p) of a query: the size of its level, and that level's first row of each head (M, L·P).
    shapes = _as_tensor(spatial_shapes, torch.int32, device)
    starts = _as_tensor(level_start_index, torch.int32, device)
    levels = torch.cat([shapes.T, starts[None]])
    height, width, start = levels[:, None, :, None].expand(3, M, L, P).flatten(2)
    head = torch.arange(M, dtype=torch.int32, device=device)[:, None]
    image = torch.arange(B, dtype=torch.int32, device=device).repeat_interleave(Q)
    first_row = (image[:, None, None] * S + start) * M + head  # (B·Q, M, L·P)

    x, y = sampling_locations.to(compute).reshape(B * Q, M, L * P, 2).unbind(-1)
    attention = attention_weights.to(compute).reshape(B * Q, M, L * P)
    left, weight_l, weight_r = _corners(x, width.to(compute))
    top, weight_t, weight_b = _corners(y, height.to(compute))
    first = first_row + (top * width + left) * M
    right, below = (width > 1).int() * M, (height > 1).int() * width * M
    steps = torch.stack([torch.zeros_like(right), right, below, below + right])
    weights = weight_l, weight_r, weight_t * attention, weight_b * attention
    dense = value.to(compute).contiguous()
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # a graph has its operators' gradients only
        output = _sum_corners(dense, first, steps, *weights)
    else:
        pixel = torch.arange(S, dtype=torch.int32, device=device)
        level = torch.bucketize(pixel, starts, right=True) - 1
        line = shapes[level, 1]
        # Above the first line of a level, the very last pixel: no sample begins there, or its lower weight is zero.
        above = torch.where(pixel - starts[level] < line, S - 1, pixel - line)
        output = _SumCorners.apply(dense, first, steps, above, *weights)
    return output.view(B, Q, M * D).to(value.dtype)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Tensor | Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """`ms_deform_attn` with softmax over L·P and the sampling locations computed inside."""
    compute = torch.promote_types(value.dtype, torch.float32)
    offsets = sampling_offsets.to(compute)
    centres = reference_points.to(compute)[:, :, None, :, None, :]
    if reference_points.shape[-1] == 2:  # offsets in pixels of each level
        shapes = _as_tensor(spatial_shapes, compute, value.device)
        locations = centres + offsets / shapes.flip(-1)[:, None]
    else:  # offsets in half the box over P; far outside where their product is not finite, for 0 · ∞ is no gradient
        extents = (centres[..., 2:] * (0.5 / sampling_offsets.shape[-2])).expand_as(offsets)
        finite = (offsets * extents).isfinite()
        locations = centres[..., :2] + torch.where(finite, offsets, 1e30) * torch.where(finite, extents, 1)
    weights = attention_logits.to(compute).flatten(-2).softmax(-1).view(attention_logits.shape)
    return ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights)


# ---------------------------------------------------------------------------------------------------------------------
# Mask codec (SOLQ, section 3.2, mask compression coding)
# ---------------------------------------------------------------------------------------------------------------------

CHUNK = 128  # masks at a time: what is computed of them stays in the processor's cache


def kept_rows(size: int, num_coefficients: int) -> int:
    """How many rows (and columns) of a spectrum hold the first n zigzag coefficients: 24 of 128 for n = 256."""
    diagonals = (math.isqrt(8 * num_coefficients - 7) + 1) // 2
    return min((diagonals + 7) // 8 * 8, size)  # matrix products are faster at multiples of eight


def dct_matrix(size: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """The orthonormal DCT-II matrix A (size, size): the transform of a square mask is A @ mask @ A.T."""
    frequency = torch.arange(size, dtype=torch.float64, device=device)[:, None]
    position = torch.arange(size, dtype=torch.float64, device=device) + 0.5
    scale = torch.where(frequency == 0, math.sqrt(1 / size), math.sqrt(2 / size))
    return (torch.cos(math.pi / size * frequency * position) * scale).to(dtype)


def zigzag(size: int, num_coefficients: int, *, device: torch.device | None = None) -> Tensor:
    """Rows and columns (2, n) of the first coefficients in JPEG's zigzag order: (0,0), (0,1), (1,0), (2,0), …"""
    index = torch.arange(num_coefficients, device=device)
    # Past the longest diagonal the order is that of the beginning, mirrored: both corners are counted alike.
    mirrored = index >= size * (size + 1) // 2
    index = torch.where(mirrored, size * size - 1 - index, index)
    diagonal = ((torch.sqrt(8.0 * index.double() + 1) - 1) / 2).long()
    along = index - diagonal * (diagonal + 1) // 2
    upwards = diagonal % 2 == 0
    order = torch.stack([torch.where(upwards, diagonal - along, along), torch.where(upwards, along, diagonal - along)])
    return torch.where(mirrored, size - 1 - order, order)


def _as_digits(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes (N, 2·kept), the higher and lower digits to the base 255 of `matrix` (kept, N), and their unit.

    No digit is −128: processors without instructions for bytes add two products in 16 bits, which 127 just fits into.
    """
    unit = matrix[0, 0] / 22989  # the mean is exact; cosines, up to √2 times as large, are less than 127·255 + 127
    number = matrix / unit
    higher = (number / 255).round()
    return torch.cat([higher, (number - 255 * higher).round()]).to(torch.int8).T, unit


def _are_binary(masks: Tensor) -> bool:
    return masks.dtype == torch.bool or (masks.dtype == torch.uint8 and masks.numel() > 0 and bool(masks.max() <= 1))


def dct_encode(masks: Tensor, num_coefficients: int = 256) -> Tensor:
    """The first n zigzag coefficients (K, n) of the orthonormal 2-D DCT-II of masks (K, N, N).

    On x86 processors the rows of masks of zeros and ones are multiplied as bytes: exact sums of cosines rounded to 15
    bits. No coefficient is then off by more than 4e-5 of the first one.
    """
    size, kept = masks.shape[-1], kept_rows(masks.shape[-1], num_coefficients)
    matrix = dct_matrix(size, device=masks.device)[:kept].float()
    rows, columns = zigzag(size, num_coefficients, device=masks.device)
    digits, unit = _as_digits(matrix)
    bytes_multiply = masks.device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    vectors = []
    for some in masks.split(CHUNK):
        if bytes_multiply and _are_binary(some):
            sums = torch._int_mm(some.reshape(-1, size).view(torch.int8), digits)
            half = torch.add(sums[:, kept:], sums[:, :kept], alpha=255).float().view(-1, size, kept)
            spectrum = matrix @ half * unit
        else:
            spectrum = matrix @ some.float() @ matrix.T
        vectors.append(spectrum.flatten(1).index_select(1, rows * kept + columns))
    return torch.cat(vectors)


def dct_decode(coefficients: Tensor, size: int = 128) -> Tensor:
    """The masks (K, size, size) of which `coefficients` (K, n) are the first DCT coefficients, the others zero."""
    n = coefficients.shape[-1]
    kept = kept_rows(size, n)
    matrix = dct_matrix(size, device=coefficients.device)[:kept].float()
    rows, columns = zigzag(size, n, device=coefficients.device)
    spectrum = coefficients.new_zeros(coefficients.shape[0], kept * kept, dtype=torch.float32)
    spectrum = spectrum.index_copy(1, rows * kept + columns, coefficients.float()).unflatten(1, (kept, kept))
    return matrix.T @ (spectrum @ matrix)


def binarize(masks: Tensor) -> Tensor:
    """True where a decoded mask (K, N, N) lies above the middle between its own minimum and maximum."""
    return masks > (masks.amin((1, 2), keepdim=True) + masks.amax((1, 2), keepdim=True)) / 2


def dct_decode_binary(coefficients: Tensor, size: int = 128) -> Tensor:
    """`dct_decode`, binarised (K, size, size)."""
    return torch.cat([binarize(dct_decode(some, size)) for some in coefficients.split(CHUNK)])


LARGEST_CORNER = 2.0**20  # corners of boxes farther out are moved to there: no image reaches it


def _roi_align_weights(start: float, end: float, extent: int, size: int, device: torch.device) -> tuple[Tensor, int]:
    """RoIAlign along one axis is linear: its weights (size, reach) on the pixels first … first + reach, and first."""
    if not math.isfinite(end - start):
        return torch.zeros(size, 0, device=device), 0
    low, high = torch.tensor([start, end]).clamp(-LARGEST_CORNER, LARGEST_CORNER) - 0.5
    bin_size = ((high - low) / size).item()
    count = math.ceil(bin_size)  # adaptive sampling: samples per bin
    if count <= 0:  # inverted or empty
        return torch.zeros(size, 0, device=device), 0
    # The samples of all bins in one row, of which only those about the image are made.
    first, last = (min(max(int((edge - low.item()) * count / bin_size), 0), size * count) for edge in (-3, extent + 2))
    sample = torch.arange(first, last)
    index, step = sample // count, sample % count
    position = low + index * bin_size + (step + 0.5) * bin_size / count
    inside = (position >= -1) & (position <= extent)
    index, position = index[inside], position[inside].clamp(0, extent - 1)
    if not len(index):
        return torch.zeros(size, 0, device=device), 0
    pixel = position.floor().long()
    upper_share = position - pixel
    first, last = pixel[[0, -1]].tolist()
    weights = torch.zeros(size, last + 2 - first)
    weights.index_put_((index, pixel - first), 1 - upper_share, accumulate=True)
    weights.index_put_((index, pixel + 1 - first), upper_share, accumulate=True)  # zero where pixel + 1 is outside
    return (weights[:, : extent - first] / count).to(device), first


def crop_masks(masks: Tensor, boxes: Tensor, size: int = 128) -> Tensor:
    """Masks (K, H, W) cropped by their boxes (K, 4) with RoIAlign (aligned, adaptive sampling), True where ≥ 0.5."""
    H, W = masks.shape[-2:]
    crops = masks.new_empty(len(masks), size, size, dtype=torch.bool)
    for crop, mask, (x0, y0, x1, y1) in zip(crops, masks, boxes.tolist(), strict=True):
        down, top = _roi_align_weights(y0, y1, H, size, masks.device)
        across, left = _roi_align_weights(x0, x1, W, size, masks.device)
        region = mask[top : top + down.shape[1], left : left + across.shape[1]]
        torch.ge(down @ region.float() @ across.T, 0.5, out=crop)
    return crops


def crop_dct_encode(masks: Tensor, boxes: Tensor, size: int = 128, num_coefficients: int = 256) -> Tensor:
    """`dct_encode` of full-image masks (K, H, W) cropped by `boxes` (K, 4) in pixels."""
    return dct_encode(crop_masks(masks, boxes, size), num_coefficients)


def _neighbours(start: float, end: float, extent: int, size: int) -> tuple[int, Tensor, Tensor]:
    """The first pixel that a mask stretched over start … end can reach; of each pixel from there on, the cell before it
    in the mask with zeros around it, and the share (…, 1) of the next cell.
    """
    # A pixel whose centre lies outside the box is closer to the zeros around the mask: below the threshold.
    first, last = (int(min(max(edge, 0), extent)) for edge in (start - 1, end + 1))
    position = ((torch.arange(first, last) + 0.5 - start) / (end - start) * size + 0.5).clamp(0, size + 1)
    cell = position.long().clamp(max=size)
    return first, cell, (position - cell)[:, None]


def _visible_parts(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Iterator[tuple[int, int, int, Tensor]]:
    """Of each mask with a usable box its index, the first row and column of the image that it can reach, and its part
    of the image from there on, True where ≥ 0.5, column by column: (w, h).
    """
    H, W = image_size
    boxes = boxes.float()
    extent = boxes[:, 2:] - boxes[:, :2]
    usable = ((extent > 0) & extent.isfinite()).all(1)
    for index in usable.nonzero()[:, 0].tolist():
        x0, y0, x1, y1 = boxes[index].tolist()
        top, *down = _neighbours(y0, y1, H, masks.shape[-1])
        left, *across = _neighbours(x0, x1, W, masks.shape[-1])
        part = F.pad(masks[index].T.float(), (1, 1, 1, 1))
        for cell, share in (down, across):
            cell, share, part = cell.to(part.device), share.to(part.device), part.T.contiguous()
            part = torch.lerp(part.index_select(0, cell), part.index_select(0, cell + 1), share)
        yield index, top, left, part >= 0.5


def paste_masks(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Masks (K, N, N) stretched over their boxes (K, 4) in an image (H, W), True where ≥ 0.5: (K, H, W) bool."""
    images = masks.new_zeros(len(masks), *image_size, dtype=torch.bool)
    for index, top, left, part in _visible_parts(masks, boxes, image_size):
        images[index, top : top + part.shape[1], left : left + part.shape[0]] = part.T
    return images


def mask_runs(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Where full-image masks (K, H, W) change: places (R,) and their numbers (K,), see `solq.kernels.paste_runs`."""
    places = masks.transpose(1, 2).flatten(1)
    changes = torch.cat([places[:, :1], places[:, 1:] ^ places[:, :-1]], dim=1)
    return changes.nonzero()[:, 1], changes.sum(1)


def paste_runs(masks: Tensor, boxes: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`mask_runs` of `paste_masks`, without the images."""
    H, W = image_size
    changes = [boxes.new_zeros(0, dtype=torch.int64)] * len(masks)
    for index, top, left, part in _visible_parts(masks, boxes, image_size):
        # Runs end with a column, for there is a row below, unless the next column goes on where this one ends.
        column = F.pad(part, (0, int(part.shape[1] < H)))
        values = F.pad(column.flatten(), (1, 1))
        place = (values[1:] ^ values[:-1]).nonzero()[:, 0]
        x, y = place // column.shape[1], place % column.shape[1]
        place = (left + x) * H + top + y
        changes[index] = place[place < H * W]  # the last run needs no end
    counts = torch.tensor([len(places) for places in changes], dtype=torch.int64, device=masks.device)
    return torch.cat(changes) if changes else counts, counts


def dct_decode_paste(coefficients: Tensor, boxes: Tensor, image_size: tuple[int, int], size: int = 128) -> Tensor:
    """Decoded, binarised masks of vectors (K, n) pasted into their boxes (K, 4) in pixels: (K, H, W) bool."""
    return paste_masks(dct_decode_binary(coefficients, size), boxes, image_size)


# ---------------------------------------------------------------------------------------------------------------------
# Matching (DETR, section 3.1; focal-style class cost of Deformable DETR)
# ---------------------------------------------------------------------------------------------------------------------


CACHED_COSTS = 1 << 16  # as many costs at a time; with what is needed to compute them, they fit a core's cache


def _class_cost(
    logits: Tensor, labels: Tensor, class_cost: Literal["focal", "softmax"], alpha: float, gamma: float
) -> Tensor:
    """The class cost (L, n, Q) of one image's logits (L, Q, C) and labels (n,)."""
    if class_cost == "softmax":
        return -logits.softmax(-1).mT[:, labels]
    logit = logits.mT[:, labels]
    present, absent = logit.sigmoid(), (-logit).sigmoid()
    cost = (1 - alpha) * present**gamma * torch.log(absent + 1e-8)
    cost -= alpha * absent**gamma * torch.log(present + 1e-8)
    return cost


def _overlap_and_hull(centre: Tensor, extent: Tensor, other_centre: Tensor, other_extent: Tensor) -> list[Tensor]:
    """Lengths along one axis: of intersection, hull, and both intervals. Negative extents count as 0."""
    half, other_half = extent.clamp(min=0) / 2, other_extent.clamp(min=0) / 2
    low, high = centre - half, centre + half
    other_low, other_high = other_centre - other_half, other_centre + other_half
    length, other_length = high - low, other_high - other_low
    overlap = torch.minimum(high, other_high).sub_(torch.maximum(low, other_low))  # negative: the gap between both
    hull = (length + other_length).sub_(overlap)
    return [overlap.clamp_(min=0), hull, length, other_length]


def _giou_plus_one(boxes: Tensor, other_boxes: Tensor) -> Tensor:
    """1 + generalised IoU of boxes (4, ...) that broadcast, each cx cy w h; a GIoU of 0/0 is 0."""
    x, y = (_overlap_and_hull(boxes[i], boxes[i + 2], other_boxes[i], other_boxes[i + 2]) for i in (0, 1))
    overlap, hull, area, other_area = (along_x * along_y for along_x, along_y in zip(x, y, strict=True))
    smallest = torch.finfo(hull.dtype).tiny
    union = (area + other_area).sub_(overlap).clamp_(min=smallest)
    return overlap.div_(union).add_(union.div_(hull.clamp_(min=smallest)))


def matching_cost(
    logits: Tensor,
    boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    target_offsets: Tensor,
    *,
    cost_class: float = 2.0,
    cost_bbox: float = 5.0,
    cost_giou: float = 2.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
    class_cost: Literal["focal", "softmax"] = "focal",
) -> Tensor:
    """The cost (L, T, Q) of each query of a target's own image, for every decoder layer."""
    L, _, Q, _ = logits.shape
    cost = logits.new_empty(L, target_labels.shape[0], Q, dtype=torch.float32)
    coordinates = boxes.float().movedim(-1, 0).contiguous()  # (4, L, B, Q)
    target_coordinates = target_boxes.float().T[:, :, None]  # (4, T, 1)
    for image, (start, end) in enumerate(pairwise(target_offsets.tolist())):
        labels, column = target_labels[start:end].unique(return_inverse=True)
        of_class = cost_class * _class_cost(logits[:, image].float(), labels, class_cost, alpha, gamma) + cost_giou
        some = max(CACHED_COSTS // max((end - start) * Q, 1), 1)
        for layers in (slice(first, first + some) for first in range(0, L, some)):
            own = cost[layers, start:end]
            torch.index_select(of_class[layers], 1, column, out=own)
            pairs = coordinates[:, layers, image, None], target_coordinates[:, None, start:end]
            own.sub_(_giou_plus_one(*pairs), alpha=cost_giou)
            for query_coordinate, target_coordinate in zip(*pairs, strict=True):
                own.add_((query_coordinate - target_coordinate).abs_(), alpha=cost_bbox)
    return cost


LARGEST_COST = 1e290  # sums of larger ones overflow


@overload
def linear_assignment(cost: Tensor, target_offsets: Tensor, *, return_non_finite: Literal[False] = False) -> Tensor: ...


@overload
def linear_assignment(
    cost: Tensor, target_offsets: Tensor, *, return_non_finite: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def linear_assignment(
    cost: Tensor, target_offsets: Tensor, *, return_non_finite: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The query of each target (L, T) int64 at the least total cost per layer and image; -1 for a target left over.

    NaN and infinite costs, in float64 also those from LARGEST_COST on, are worse than all others together; their
    number (L, T) is returned on request.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    # NumPy has no bfloat16.
    host_cost = cost.detach().to("cpu", torch.promote_types(cost.dtype, torch.float32)).numpy()
    assignment = np.full(cost.shape[:2], -1, dtype=np.int64)
    non_finite = np.zeros(cost.shape[:2], dtype=np.int64)
    largest = min(LARGEST_COST, float(np.finfo(host_cost.dtype).max))
    for start, end in pairwise(target_offsets.tolist()):
        for layer, problem in enumerate(host_cost[:, start:end]):
            if problem.size and not (problem.max() <= largest and problem.min() >= -largest):  # neither is it of NaN
                finite = np.abs(problem) <= largest
                non_finite[layer, start:end] = (~finite).sum(1)
                bound = np.abs(problem[finite]).max(initial=0).astype(np.float64)
                problem = np.where(finite, problem, 2 * (end - start + 1) * bound if bound > 0 else 1.0)
            rows, columns = linear_sum_assignment(problem)
            assignment[layer, start + rows] = columns
    solved = torch.from_numpy(assignment).to(cost.device)
    return (solved, torch.from_numpy(non_finite).to(cost.device)) if return_non_finite else solved
