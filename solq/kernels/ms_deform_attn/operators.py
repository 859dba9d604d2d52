"""Register deformable attention as an operator of torch, with its gradient, its fake kernel and its rule for autocast.

One operator serves both forms, as one kernel does: without reference points, `coordinates` are sampling locations and
`weights` attention weights; with them, the two are offsets and logits. It runs Triton kernels and nothing else.
"""

import itertools
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..runtime import NAMESPACE
from .checks import is_readable
from .plain import SpatialShapes


@torch.library.custom_op(f"{NAMESPACE}::ms_deform_attn", mutates_args=())
def ms_deform_attn(
    value: Tensor, levels: Tensor, reference_points: Tensor | None, coordinates: Tensor, weights: Tensor
) -> Tensor:
    """Compute the output (B, Q, M·D).

    Args:
        value: (B, S, M, D).
        levels: (3, L) integers, the heights, the widths and the first pixels in S: see :func:`level_table`.
        reference_points: (B, Q, L, 2 or 4), or None.
        coordinates: (B, Q, M, L, P, 2).
        weights: (B, Q, M, L, P).
    """
    from .launch import forward  # imports Triton

    return forward(value, levels, reference_points, coordinates, weights)


@torch.library.custom_op(f"{NAMESPACE}::ms_deform_attn_backward", mutates_args=())
def ms_deform_attn_backward(
    grad_output: Tensor,
    output: Tensor | None,
    value: Tensor,
    levels: Tensor,
    reference_points: Tensor | None,
    coordinates: Tensor,
    weights: Tensor,
    grad_reference: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of value, reference points (empty unless `grad_reference`), coordinates and weights.

    `output` is that of the forward pass, and only needed with reference points.
    """
    from .launch import backward  # imports Triton

    return backward(grad_output, output, value, levels, reference_points, coordinates, weights, grad_reference)


@ms_deform_attn.register_fake
def _(value, levels, reference_points, coordinates, weights):
    B, _, M, D = value.shape
    return value.new_empty(B, coordinates.shape[1], M * D)


@ms_deform_attn_backward.register_fake
def _(grad_output, output, value, levels, reference_points, coordinates, weights, grad_reference):
    B, Q, _, L, _, _ = coordinates.shape
    points = value if reference_points is None else reference_points
    size = points.shape[-1] if grad_reference else 0
    others = (tensor.new_empty(tensor.shape) for tensor in (coordinates, weights))
    return value.new_empty(value.shape), points.new_empty(B, Q, L, size), *others


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    reference_points = inputs[2]
    ctx.save_for_backward(None if reference_points is None else output, *inputs)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grad_reference = ctx.needs_input_grad[2]
    grad_value, grad_points, grad_coordinates, grad_weights = ms_deform_attn_backward(
        grad_output, *ctx.saved_tensors, grad_reference
    )
    return grad_value, None, grad_points if grad_reference else None, grad_coordinates, grad_weights


ms_deform_attn.register_autograd(_backward, setup_context=_save)

_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # registrations end with it


def round_under_autocast(value: Tensor) -> Tensor:
    """Round `value` to autocast's dtype where that is enabled.

    Nothing else becomes half precision: locations in bfloat16 would be wrong by pixels, and weights and logits gain
    nothing.
    """
    device_type = value.device.type
    # "meta" has no autocast, and older versions of torch raise when asked for it
    if value.dtype == torch.float64 or value.is_meta or not torch.is_autocast_enabled(device_type):
        return value
    return value.to(torch.get_autocast_dtype(device_type))


def _register_autocast(device_type: str, dispatch_key: str) -> None:
    def with_autocast(value: Tensor, *others: Tensor | None) -> Tensor:
        value = round_under_autocast(value)
        with torch.autocast(device_type, enabled=False):
            return ms_deform_attn(value, *others)

    _library.impl("ms_deform_attn", with_autocast, dispatch_key)


_register_autocast("cuda", "AutocastCUDA")
_register_autocast("cpu", "AutocastCPU")


def level_table(spatial_shapes: SpatialShapes, value: Tensor) -> Tensor:
    """Return the heights, the widths and the first pixels in S of the levels (3, L), on the device of `value`.

    The host never waits. A list costs nothing after its first time; of a tensor on a GPU, the first pixels are computed
    there at each call.
    """
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.device == value.device or not is_readable(spatial_shapes):
            shapes = spatial_shapes.to(value.device)
            sizes = shapes.prod(1, dtype=shapes.dtype)
            starts = sizes.cumsum(0, dtype=shapes.dtype) - sizes
            return torch.cat([shapes.T, starts[None]])
        spatial_shapes = spatial_shapes.tolist()
    heights, widths = zip(*spatial_shapes, strict=True)
    sizes_before = itertools.accumulate((height * width for height, width in spatial_shapes[:-1]), initial=0)
    numbers = *heights, *widths, *sizes_before
    if torch.compiler.is_compiling() or type(value) not in (Tensor, torch.nn.Parameter):
        # Traced, numbers become part of the graph. Filled in on the device, they need no copy that the host waits for.
        filled = [value.new_full((1,), number, dtype=torch.int32) for number in numbers]
        return torch.cat(filled).view(3, -1)
    return _copied_to(value.device, numbers)


@lru_cache(maxsize=4096)
def _copied_to(device: torch.device, numbers: tuple[int, ...]) -> Tensor:
    """Copy a level table (3, L) to a device, once. A copy from pinned memory does not make the host wait."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        L = len(numbers) // 3
        shapes = list(zip(numbers[:L], numbers[L : 2 * L], strict=True))
        raise RuntimeError(
            f"spatial_shapes {shapes} was not seen before this CUDA graph is captured: "
            "call the operator once before, or give a tensor"
        )
    with torch.inference_mode(False):
        host = torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda").view(3, -1)
        return host.to(device, non_blocking=True)
