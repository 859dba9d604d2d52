"""Launch the kernels: the forward pass and the backward pass on tensors whose shapes were checked."""

from typing import Any

import torch
import triton
from torch import Tensor

from ..runtime import LAUNCH_OPTIONS, architecture, require_triton, warp_size
from . import configuration
from .configuration import (
    MAX_CHANNELS,
    Problem,
    channels_per_word,
    kernel_constants,
    launch_configuration,
    max_registers,
)
from .kernels import backward_kernel, forward_kernel
from .windows import launch_windows, uses_windows


def forward(
    value: Tensor, levels: Tensor, reference_points: Tensor | None, coordinates: Tensor, weights: Tensor
) -> Tensor:
    """Compute the output (B, Q, M·D); the arguments are those of the operator `ms_deform_attn`."""
    require_triton(value)
    B, _, M, D = value.shape
    output = value.new_empty(B, coordinates.shape[1], M * D)
    inputs = _dense_inputs(value, levels, reference_points, coordinates, weights)
    problem = _problem(value, reference_points, coordinates)
    for first_channel in range(0, D, MAX_CHANNELS):
        _launch(forward_kernel, "forward", [output, *inputs], value, problem, first_channel)
    return output


def backward(
    grad_output: Tensor,
    output: Tensor | None,
    value: Tensor,
    levels: Tensor,
    reference_points: Tensor | None,
    coordinates: Tensor,
    weights: Tensor,
    grad_reference: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of value, reference points (empty unless asked for), coordinates and weights."""
    require_triton(value)
    B, S, M, D = value.shape
    Q = coordinates.shape[1]
    problem = _problem(value, reference_points, coordinates)
    compute = torch.promote_types(value.dtype, torch.float32)
    grad_output = _dense(grad_output.to(value.dtype))
    inputs = [grad_output, grad_output if output is None else _dense(output)]
    inputs += _dense_inputs(value, levels, reference_points, coordinates, weights)

    fixed_point = torch.are_deterministic_algorithms_enabled() and grad_output.numel() > 0
    scale = value.new_empty((), dtype=torch.float64)  # not read without fixed point
    if fixed_point:
        scale = _fixed_point_scale(grad_output, weights if reference_points is None else None, compute)
    grad_value = torch.zeros_like(inputs[2], dtype=torch.int64 if fixed_point else compute)
    # Where D takes several launches, each gives the points and weights a partial gradient.
    chunks = range(0, D, MAX_CHANNELS)
    rounded = len(chunks) == 1 and compute == torch.float32
    grad_coordinates = coordinates.new_empty(len(chunks), *coordinates.shape, dtype=None if rounded else compute)
    grad_weights = weights.new_empty(len(chunks), *weights.shape, dtype=None if rounded else compute)
    size = problem.reference_size * grad_reference
    grad_points = value.new_empty(len(chunks), B, Q, M, problem.L, size, dtype=compute)  # of each head
    in_windows = uses_windows(value, coordinates)
    if in_windows:
        launch_windows([grad_value, scale, grad_output, *inputs[3:]], value, problem)
    for chunk, first_channel in enumerate(chunks):
        gradients = [grad_value, grad_points[chunk], grad_coordinates[chunk], grad_weights[chunk], scale]
        _launch(
            backward_kernel, "backward", [*gradients, *inputs], value, problem, first_channel,
            GRAD_REFERENCE=grad_reference, GRAD_VALUE=not in_windows, BLOCK_P=triton.next_power_of_2(problem.P),
        )  # fmt: skip
    if fixed_point:
        grad_value = (grad_value / scale).to(compute)
    # Where a word holds two channels, lanes add all even channels before all odd ones; windows keep the order.
    pack = 1 if in_windows else channels_per_word(value.dtype, D)
    grad_value = grad_value.view(B, S, M, pack, D // pack).mT.reshape(B, S, M, D).to(value.dtype)
    total_coordinates, total_weights = (g[0] if rounded else g.sum(0) for g in (grad_coordinates, grad_weights))
    return (
        grad_value,
        grad_points.sum((0, 3)).to(value.dtype if reference_points is None else reference_points.dtype),
        total_coordinates.to(coordinates.dtype),
        total_weights.to(weights.dtype),
    )


def _problem(value: Tensor, reference_points: Tensor | None, coordinates: Tensor) -> Problem:
    _, _, M, L, P, _ = coordinates.shape
    reference_size = 0 if reference_points is None else reference_points.shape[-1]
    return Problem(value.dtype, M, L, P, value.shape[-1], reference_size)


def _launch(
    kernel: Any, direction: str, tensors: list[Tensor], value: Tensor, problem: Problem, first_channel: int,
    **constants: Any,
) -> None:  # fmt: skip
    """Launch a kernel for the channels from `first_channel` on, at most MAX_CHANNELS, of every head."""
    B, S, M, D = value.shape
    Q = tensors[-1].shape[1]
    target = architecture(value.device)
    block_words, num_warps = launch_configuration(direction, target, D, value.dtype)
    adds_to_value = constants.get("GRAD_VALUE", False)
    if B * Q * M <= configuration.FEW_ROWS or adds_to_value:
        num_warps = 1
    constants |= kernel_constants(problem, first_channel, (block_words, num_warps), warp_size(value.device))
    options: dict[str, Any] = dict(LAUNCH_OPTIONS)
    if target.startswith("sm_"):
        fixed_point = adds_to_value and tensors[0].dtype == torch.int64
        options["maxnreg"] = max_registers(
            "deterministic" if fixed_point else direction, target, D, value.dtype, problem.reference_size,
            grad_reference=constants.get("GRAD_REFERENCE", False), grad_value=constants.get("GRAD_VALUE", True),
        )  # fmt: skip
    programs = triton.cdiv(Q, constants["BLOCK_QUERIES"]) * B * M
    if programs:
        with torch.cuda.device_of(value):
            kernel[(programs,)](*tensors, S, Q, first_channel, **constants, num_warps=num_warps, **options)


def _dense(tensor: Tensor) -> Tensor:
    """Make a tensor contiguous and at a multiple of 16 bytes, as the wide loads need; a copy only where it is not."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _dense_inputs(
    value: Tensor, levels: Tensor, reference_points: Tensor | None, coordinates: Tensor, weights: Tensor
) -> list[Tensor]:
    points = coordinates if reference_points is None else reference_points  # the plain form never reads them
    return [_dense(tensor) for tensor in (value, levels, points, coordinates, weights)]


def _fixed_point_scale(grad_output: Tensor, weights: Tensor | None, compute: torch.dtype) -> Tensor:
    """Return the power of two that takes the largest possible sum of contributions to one pixel to at most 2^61."""
    bound = grad_output.abs().amax().double() * grad_output.shape[1]
    if weights is not None:  # of softmax weights, at most one meets a pixel per query
        bound = bound * weights.abs().amax().double() * (weights.shape[3] * weights.shape[4])
    return torch.exp2(61 - torch.ceil(torch.log2(bound.clamp(min=torch.finfo(compute).tiny * 2.0**64))))
