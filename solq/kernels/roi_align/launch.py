"""Launch the Triton kernels of multi-level RoIAlign."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime import LAUNCH_OPTIONS
from .definition import Sampling, level_areas
from .roi_align_kernels import backward_kernel, forward_kernel


def kernel_constants(sampling: Sampling, channels: int, compute: torch.dtype, channels_last: bool) -> dict[str, Any]:
    """Choose the constants that both kernels share.

    A warp reads the 256 channels of a pixel at once, 16 bytes per lane in half precision. Channels of planar features
    are far apart, so that it reads neighboring bins there.
    """
    block_channels = min(triton.next_power_of_2(channels), 256 if channels_last else 16)
    bins = triton.next_power_of_2(sampling.output_size[0] * sampling.output_size[1])
    return {
        "SCALES": tuple(1 / stride for stride in sampling.strides),
        "AREAS": tuple(level_areas(len(sampling.strides), sampling.finest_scale)),
        "HEIGHT": sampling.output_size[0],
        "WIDTH": sampling.output_size[1],
        "SAMPLES": sampling.sampling_ratio,
        "ALIGNED": sampling.aligned,
        "BLOCK_BINS": min(bins, 4 if channels_last else 16),
        "BLOCK_CHANNELS": block_channels,
        "COMPUTE": tl.float64 if compute == torch.float64 else tl.float32,
    }


NUM_WARPS = 4


def _launch(kernel: Any, arguments: Sequence[Any], boxes: Tensor, channels: int, constants: dict[str, Any]) -> None:
    blocks = triton.cdiv(constants["HEIGHT"] * constants["WIDTH"], constants["BLOCK_BINS"])
    grid = (len(boxes), blocks, triton.cdiv(channels, constants["BLOCK_CHANNELS"]))
    with torch.cuda.device_of(boxes):
        kernel[grid](*arguments, **constants, num_warps=NUM_WARPS, **LAUNCH_OPTIONS)


def _float_sizes(sizes: Sequence[tuple[int, int]]) -> tuple[tuple[float, float], ...]:
    return tuple((float(height), float(width)) for height, width in sizes)


def forward(output: Tensor, features: Sequence[Tensor], boxes: Tensor, box_image: Tensor, sampling: Sampling) -> None:
    """Write the features of all boxes to `output` (R, bins, C)."""
    if output.numel() == 0:
        return
    B, C = features[0].shape[:2]
    channels_last = not all(feature.is_contiguous() for feature in features)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    levels = tuple(feature.contiguous(memory_format=layout) for feature in features)
    compute = torch.promote_types(output.dtype, torch.float32)
    constants = kernel_constants(sampling, C, compute, channels_last) | {"CHANNELS_LAST": channels_last}
    sizes = _float_sizes([(feature.shape[2], feature.shape[3]) for feature in features])
    arguments = (levels, sizes, boxes.contiguous(), box_image.contiguous(), output, B, C)
    _launch(forward_kernel, arguments, boxes, C, constants)


def _units(grad_output: Tensor) -> Tensor:
    """Compute the power of two by which no sum of gradients of one pixel can exceed 2^61 in absolute value.

    The weights of a bin's samples sum to 1 at most, so a pixel gets each bin's gradient once at most.
    """
    bound = grad_output.abs().amax().double() * grad_output[..., 0].numel()
    return torch.exp2(61 - bound.clamp(min=1e-30).log2().ceil())


def backward(
    grad_output: Tensor,
    boxes: Tensor,
    box_image: Tensor,
    images: int,
    sizes: Sequence[tuple[int, int]],
    sampling: Sampling,
) -> list[Tensor]:
    """Compute the gradients (B, H, W, C) of the levels from that of the output (R, bins, C)."""
    C = grad_output.shape[-1]
    compute = torch.promote_types(grad_output.dtype, torch.float32)
    if grad_output.numel() == 0:
        return [grad_output.new_zeros(images, *size, C) for size in sizes]
    fixed_point = torch.are_deterministic_algorithms_enabled()
    units = _units(grad_output) if fixed_point else grad_output  # not read otherwise
    grads = tuple(
        grad_output.new_zeros((images, *size, C), dtype=torch.int64 if fixed_point else compute) for size in sizes
    )
    constants = kernel_constants(sampling, C, compute, True) | {"FIXED_POINT": fixed_point}
    arguments = (grads, _float_sizes(sizes), boxes.contiguous(), box_image.contiguous(), grad_output, units, images, C)
    _launch(backward_kernel, arguments, boxes, C, constants)
    if fixed_point:
        grads = tuple(grad / units for grad in grads)
    return [grad.to(grad_output.dtype) for grad in grads]
