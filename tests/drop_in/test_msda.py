"""What Deformable DETR's own test of its operator checks, through a Function written as such codebases write it."""

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.autograd import gradcheck

import solq.drop_in.msda
from solq.kernels import use_backend
from solq.kernels.ms_deform_attn import plain
from solq.kernels.runtime import INTERPRETED

MSDA = importlib.import_module("MultiScaleDeformableAttention")

SHAPES = torch.tensor([(6, 4), (3, 2)])
STARTS = torch.tensor([0, 24])
B, M, Q, L, P = 1, 2, 2, 2, 2


class MSDeformAttnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, im2col_step: int = 2) -> Tensor:
        ctx.save_for_backward(value, locations, weights)
        ctx.im2col_step = im2col_step
        return MSDA.ms_deform_attn_forward(value, SHAPES, STARTS, locations, weights, im2col_step)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        value, locations, weights = ctx.saved_tensors
        return *MSDA.ms_deform_attn_backward(
            value, SHAPES, STARTS, locations, weights, grad_output, ctx.im2col_step
        ), None


def random_inputs(channels: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    value = torch.rand(B, 30, M, channels, generator=generator, dtype=dtype) * 0.01
    locations = torch.rand(B, Q, M, L, P, 2, generator=generator, dtype=dtype)
    weights = torch.rand(B, Q, M, L, P, generator=generator, dtype=dtype) + 1e-5
    return [value, locations, weights / weights.sum((-1, -2), keepdim=True)]


def test_the_extension_is_this_module() -> None:
    assert MSDA is solq.drop_in.msda


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_forward_and_backward_equal_the_definition(dtype: torch.dtype, backend: str) -> None:
    results = []
    for function in (MSDeformAttnFunction.apply, lambda value, *points: plain.ms_deform_attn(value, SHAPES, *points)):
        inputs = [tensor.requires_grad_() for tensor in random_inputs(2, dtype)]
        with use_backend(backend):
            output = function(*inputs)
            results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("channels", [30, 32, 64, 71, 1025, 2048, 3096])
def test_gradients_numerically(channels: int) -> None:
    inputs = [tensor.requires_grad_() for tensor in random_inputs(channels, torch.float64)]
    assert gradcheck(MSDeformAttnFunction.apply, inputs, fast_mode=channels > 30)


@pytest.mark.parametrize("channels", [30, 32, 1025])
def test_triton_backward_equals_the_reference(channels: int) -> None:
    """The numerical check, and more channels still, would take the interpreter minutes."""
    if channels > 32 and INTERPRETED and triton.__version__.startswith("3.6."):
        pytest.skip("triton 3.6's interpreter reads a mask of one element as if only the first lane had it")
    results = []
    for backend in ("reference", "triton"):
        inputs = [tensor.requires_grad_() for tensor in random_inputs(channels, torch.float64)]
        with use_backend(backend):
            output = MSDeformAttnFunction.apply(*inputs)
            results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference)


def test_im2col_step_need_not_divide_the_batch() -> None:
    value, locations, weights = (tensor.repeat_interleave(3, 0) for tensor in random_inputs(4, torch.float32))
    output = MSDA.ms_deform_attn_forward(value, SHAPES, STARTS, locations, weights, 2)
    assert output.shape == (3, Q, M * 4)


def test_half_precision_and_autocast_keep_the_dtype_of_value() -> None:
    inputs = random_inputs(4, torch.float32)
    expected = MSDA.ms_deform_attn_forward(inputs[0], SHAPES, STARTS, *inputs[1:], 64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(MSDA.ms_deform_attn_forward(inputs[0], SHAPES, STARTS, *inputs[1:], 64), expected)
    half = MSDA.ms_deform_attn_forward(inputs[0].bfloat16(), SHAPES, STARTS, *inputs[1:], 64)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=2e-2, atol=1e-4)


def test_bad_input_names_the_argument() -> None:
    value, locations, weights = random_inputs(4, torch.float32)
    with pytest.raises(ValueError, match="sampling_locations has 2 levels but spatial_shapes has 1"):
        MSDA.ms_deform_attn_forward(value, SHAPES[:1], STARTS[:1], locations, weights, 64)


def test_an_extension_imported_earlier_is_reported() -> None:
    code = (
        "import sys, types\n"
        "sys.modules['MultiScaleDeformableAttention'] = module = types.ModuleType('compiled')\n"
        "module.__file__ = 'compiled.so'\n"
        "import solq.drop_in.msda"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: MultiScaleDeformableAttention was already imported from compiled.so" in finished.stderr
