"""Compute multi-scale deformable attention fast on a CPU, in PyTorch; it runs on any device.

The weighted sum of four rows per sample is what torch calls an embedding bag: nothing of the size of all samples,
B·Q·M·L·P·D, ever exists. The gradients are formulas of our own, since torch's are many times slower.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from .plain import SpatialShapes, as_tensor, locations_and_weights

# Torch warns once that the sparse matrices of `_dots` are new.
warnings.filterwarnings("ignore", "Sparse (CSR tensor support is in beta|invariant checks are implicitly disabled)")


class _DifferentiableOnce(torch.autograd.Function):
    """Identity in the forward pass; raises on double backward. `sources` only connect the gradient to the graph."""

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
    """Sum, for each bag of samples, the rows of `value` at their four corners, by their weights.

    Args:
        value: (B, S, M, D).
        first: (B·Q, M, L·P), the row of the top left corner of each sample, in `value` as (B·S·M, D).
        steps: (4, M, L·P), rows from the top left corner to each corner.
        left, right, upper, lower: (B·Q, M, L·P), the weights along each axis; a corner's weight is a product of two.

    Returns:
        (B·Q·M, D), summed over the last axis of `first`.
    """
    rows = value.flatten(0, 2)

    def sum_two(vertical: Tensor, steps: Tensor) -> Tensor:
        """Sum the two upper, or the two lower corners."""
        index = torch.stack([first + step for step in steps], dim=2)
        weights = torch.stack([vertical * left, vertical * right], dim=2)
        index, weights = (bags.flatten(0, 1).flatten(1) for bags in (index, weights))
        return F.embedding_bag(index, rows, mode="sum", per_sample_weights=weights)

    return sum_two(upper, steps[:2]) + sum_two(lower, steps[2:])


class _SumCorners(torch.autograd.Function):
    """`_sum_corners` with gradients of its own: torch's are many times slower, and not reproducible on every device.

    `above` (S,) is the pixel above each pixel. In the first line of a level, it is any that is no sample's upper corner
    with a lower weight.
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
            grads = [None if gradient is None else _DifferentiableOnce.apply(gradient, *sources) for gradient in grads]
        return tuple(grads)


def _gradient_of_value(
    grad: Tensor, value: Tensor, first: Tensor, above: Tensor,
    left: Tensor, right: Tensor, upper: Tensor, lower: Tensor,
) -> Tensor:  # fmt: skip
    """Sort the samples by their first row; each row's gradient is then a weighted sum over one contiguous run.

    A row also gets a gradient as the second corner of samples, which are the run of the pixel before it: the same runs
    serve, shifted by a pixel. (At the end of a line no sample begins, or its second weight is zero.) As one of the
    lower two corners, it gets one from the runs of the pixel `above`.
    """
    B, S, M, D = value.shape
    row, order = first.flatten().sort(stable=True)
    as_first = torch.searchsorted(row, torch.arange(B * S * M, dtype=row.dtype, device=row.device), out_int32=True)
    as_second = F.pad(as_first[:-M], (M, 0))
    bag = order.int() // first.shape[-1]

    def sum_runs(vertical: Tensor) -> Tensor:
        """Sum what rows get as the first and the second corner, upper or lower, of samples."""
        sums = []
        for begins, horizontal in ((as_first, left), (as_second, right)):
            weights = (vertical * horizontal).flatten().index_select(0, order)
            sums.append(F.embedding_bag(bag, grad, begins, mode="sum", per_sample_weights=weights))
        return sums[0].add_(sums[1]).view(B, S, M * D)

    return sum_runs(lower).index_select(1, above).add_(sum_runs(upper)).view(B, S, M, D)


def _gradients_of_weights(
    grad: Tensor, value: Tensor, first: Tensor, steps: Tensor, weights: list[Tensor]
) -> list[Tensor]:
    """Differentiate by left, right, upper and lower: from dot products of `grad` with the four rows of each sample."""
    rows, (left, right, upper, lower) = value.flatten(0, 2), weights
    dots = [_dots(grad, rows, (first + step).flatten(0, 1)).view_as(first) for step in steps]
    return [
        (dots[0] * upper).addcmul_(dots[2], lower),
        (dots[1] * upper).addcmul_(dots[3], lower),
        (dots[0] * left).addcmul_(dots[1], right),
        (dots[2] * left).addcmul_(dots[3], right),
    ]


def _dots(vectors: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Multiply each of the `vectors` (N, D) by K of the `rows`, those of `index` (N, K): dot products (N, K)."""
    if (
        torch.compiler.is_compiling()  # makes one loop of it
        or rows.device.type != "cpu"
        or index.shape[1] > rows.shape[0]  # a matrix cannot be that full
        or any(torch.func.debug_unwrap(tensor) is not tensor for tensor in (vectors, rows, index))  # in vmap
    ):
        return (rows[index] * vectors[:, None]).sum(-1)
    # Torch has a loop for this on a CPU: the product of two matrices, computed only at the entries of a sparse one,
    # which may repeat. It runs in parts, to save memory.
    dots = []
    for part, columns in zip(vectors.split(4096), index.split(4096), strict=True):
        ends = torch.arange(0, columns.numel() + 1, columns.shape[1], dtype=index.dtype)
        sampled = torch.sparse_csr_tensor(
            ends, columns.flatten(), rows.new_zeros(columns.numel()), (len(part), len(rows)), check_invariants=False
        )
        dots.append(torch.sparse.sampled_addmm(sampled, part, rows.T, beta=0, out=sampled).values())
    return torch.cat(dots)


def _corners(locations: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first of two neighboring pixels along an axis, and both weights, for `locations` in 0..1 over `size`.

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


def ms_deform_attn(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Compute what :func:`.plain.ms_deform_attn` defines; locations that are not finite sample zero."""
    B, S, M, D = value.shape
    Q, L, P = sampling_locations.shape[1], sampling_locations.shape[3], sampling_locations.shape[4]
    compute, device = torch.promote_types(value.dtype, torch.float32), value.device

    # The size and the start of the level of each sample (l, p) of a query, for each head: (M, L·P).
    shapes = as_tensor(spatial_shapes, torch.int32, device)
    sizes = shapes[:, 0] * shapes[:, 1]
    starts = sizes.cumsum(0, dtype=torch.int32) - sizes
    levels = torch.cat([shapes.T, starts[None]])
    height, width, start = levels[:, None, :, None].expand(3, M, L, P).flatten(2)
    head = torch.arange(M, dtype=torch.int32, device=device)[:, None]
    image = torch.arange(B, dtype=torch.int32, device=device).repeat_interleave(Q)
    first_row = (image[:, None, None] * S + start) * M + head  # of the level in the image, (B·Q, M, L·P)

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
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Compute what :func:`.plain.ms_deform_attn_fused` defines; locations that are not finite sample zero."""
    locations, weights = locations_and_weights(
        value.dtype, spatial_shapes, reference_points, sampling_offsets, attention_logits
    )
    return ms_deform_attn(value, spatial_shapes, locations, weights)
