"""Deformable attention on a CPU, in plain PyTorch."""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Torch says so once, of what `_dots` does.
warnings.filterwarnings("ignore", "Sparse (CSR tensor support is in beta|invariant checks are implicitly disabled)")

SpatialShapes = Tensor | Sequence[tuple[int, int]]


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
