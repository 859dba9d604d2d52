"""Launch the Triton kernels of the dynamic convolution."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime import INTERPRETED, LAUNCH_OPTIONS
from .dynamic_conv_kernels import backward_kernel, forward_kernel

# AMD's matrix cores multiply float32; on NVIDIA three TF32 products make one of float32.
PRECISION = "ieee" if torch.version.hip else "tf32x3"
NUM_WARPS = 4
TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if INTERPRETED else tl.bfloat16,  # the interpreter multiplies bfloat16 wrongly
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
# Positions, channels and stages of the loops over channels, in the forward and backward pass, by bytes of a number: the
# most that no target spills for a middle of 64. A warp computes 16 positions, as tensor cores like it.
BLOCKS = {2: ((64, 32, 2), (64, 16, 2)), 4: ((64, 16, 2), (32, 16, 1)), 8: ((16, 16, 1), (16, 16, 1))}


def kernel_constants(dtype: torch.dtype, channels: int, hidden: int, positions: int, backward: bool) -> dict[str, Any]:
    """Choose the constants and options of a launch."""
    block_positions, block_channels, num_stages = BLOCKS[dtype.itemsize][backward]
    block_hidden = max(triton.next_power_of_2(hidden), 16)
    fitting = max(block_positions * 64 // max(block_hidden, 64), 16)
    return {
        "CHANNELS": channels,
        "HIDDEN": hidden,
        "BLOCK_POSITIONS": min(fitting, max(triton.next_power_of_2(positions), 16)),
        "BLOCK_HIDDEN": block_hidden,
        "BLOCK_CHANNELS": block_channels,
        "OPERAND": TRITON_DTYPES[dtype],
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        "PRECISION": "ieee" if dtype == torch.float64 else PRECISION,
        "num_stages": num_stages,
    }


def _launch(kernel: Any, tensors: list[Tensor], features: Tensor, eps: float, constants: dict[str, Any]) -> None:
    R, A, _ = features.shape
    grid = (R, triton.cdiv(A, constants["BLOCK_POSITIONS"]))
    with torch.cuda.device_of(features):
        kernel[grid](*tensors, A, eps, **constants, num_warps=NUM_WARPS, **LAUNCH_OPTIONS)


def forward(features: Tensor, parameters: Tensor, norms: list[Tensor], eps: float) -> Tensor:
    """Compute the output (R, A, C)."""
    output = torch.empty_like(features)
    if output.numel():
        constants = kernel_constants(features.dtype, features.shape[2], len(norms[0]), features.shape[1], False)
        _launch(forward_kernel, [features, parameters, *norms, output], features, eps, constants)
    return output


def backward(
    grad_output: Tensor, features: Tensor, parameters: Tensor, norms: list[Tensor], eps: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Compute the gradients of features, parameters and the four norm vectors.

    Programs share the matrices of a region, and all of them the norms, so each writes a partial gradient of these. The
    sums have the same order in every run.
    """
    (R, A, C), D = features.shape, len(norms[0])
    if features.numel() == 0:
        return torch.zeros_like(features), torch.zeros_like(parameters), [torch.zeros_like(norm) for norm in norms]
    constants = kernel_constants(features.dtype, C, D, A, True)
    compute = torch.promote_types(features.dtype, torch.float32)
    blocks = triton.cdiv(A, constants["BLOCK_POSITIONS"])
    grad_features = torch.empty_like(features)
    grad_parameters = parameters.new_empty((R, blocks, 2 * C * D), dtype=parameters.dtype if blocks == 1 else compute)
    grad_norms = features.new_empty((R * blocks, 2 * D + 2 * C), dtype=compute)
    tensors = [grad_output, features, parameters, *norms, grad_features, grad_parameters, grad_norms]
    _launch(backward_kernel, tensors, features, eps, constants)
    return (
        grad_features,
        grad_parameters[:, 0] if blocks == 1 else grad_parameters.sum(1).to(parameters.dtype),
        [
            total.to(norm.dtype, copy=True)
            for total, norm in zip(grad_norms.sum(0).split([D, D, C, C]), norms, strict=True)
        ],
    )
