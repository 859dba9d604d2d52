"""mmcv's own module, with or without mmcv's compiled part, and detrex by the same names."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from solq.drop_in import detrex as detrex_drop_in
from solq.drop_in import mmcv as drop_in
from solq.kernels import use_backend

needs_mmcv = pytest.mark.skipif(find_spec("mmcv") is None, reason="mmcv is not installed: pip install mmcv-lite")


@pytest.fixture
def attention_module() -> Iterator[Any]:
    """`mmcv.ops.multi_scale_deform_attn`, unpatched: mmcv-lite is importable only after patching once."""
    drop_in.patch()
    drop_in.unpatch()
    from mmcv.ops import multi_scale_deform_attn

    yield multi_scale_deform_attn
    drop_in.unpatch()


def run_module(module: Any) -> list[Tensor]:
    torch.manual_seed(0)
    layer = module.MultiScaleDeformableAttention(embed_dims=16, num_heads=2, num_levels=2, num_points=3, dropout=0.0)
    torch.nn.init.normal_(layer.sampling_offsets.weight)
    query, value = torch.randn(5, 2, 16, requires_grad=True), torch.randn(16, 2, 16, requires_grad=True)
    shapes, starts = torch.tensor([(3, 4), (2, 2)]), torch.tensor([0, 12])
    reference_points = torch.rand(2, 5, 2, 2)
    output = layer(
        query, value=value, reference_points=reference_points, spatial_shapes=shapes, level_start_index=starts
    )
    return [output, *torch.autograd.grad(output.square().sum(), [query, value, *layer.parameters()])]


@needs_mmcv
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_module_gives_the_same(attention_module: Any, backend: str) -> None:
    theirs = run_module(attention_module)
    with drop_in.patched(), use_backend(backend):
        ours = run_module(attention_module)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@needs_mmcv
def test_the_function_of_the_compiled_operator(attention_module: Any) -> None:
    """What the module calls for CUDA tensors, by a reference to the class made before patching."""
    function = attention_module.MultiScaleDeformableAttnFunction
    shapes, starts = torch.tensor([(3, 4), (2, 2)]), torch.tensor([0, 12])
    value = torch.randn(2, 16, 2, 8, requires_grad=True)
    locations, weights = torch.rand(2, 5, 2, 2, 3, 2), torch.rand(2, 5, 2, 2, 3)
    expected = attention_module.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
    with drop_in.patched():
        actual = function.apply(value, shapes, starts, locations, weights, 64)
    torch.testing.assert_close(actual, expected)
    (gradient,) = torch.autograd.grad(actual.square().sum(), value)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), value)[0])


@needs_mmcv
def test_unpatching_restores_the_very_objects(attention_module: Any) -> None:
    function, pytorch = attention_module.MultiScaleDeformableAttnFunction, vars(attention_module)
    original = pytorch["multi_scale_deformable_attn_pytorch"]
    assert drop_in.patch() == drop_in.patch()
    assert "apply" in vars(function)
    assert pytorch["multi_scale_deformable_attn_pytorch"] is not original
    drop_in.unpatch()
    assert "apply" not in vars(function)  # inherited again
    assert pytorch["multi_scale_deformable_attn_pytorch"] is original


@needs_mmcv
@pytest.mark.skipif(
    find_spec("mmcv") is not None and find_spec("mmcv._ext") is not None, reason="mmcv has its compiled operators"
)
def test_other_operators_say_that_they_are_not_compiled(attention_module: Any) -> None:
    from mmcv.ops import nms

    with pytest.raises(RuntimeError, match="mmcv has no compiled operators here, so no nms: install mmcv instead"):
        nms(torch.rand(3, 4), torch.rand(3), 0.5)


@pytest.mark.skipif(find_spec("mmcv") is not None, reason="mmcv is installed")
def test_without_mmcv() -> None:
    with pytest.raises(ImportError, match=r"^mmcv is not installed: mmcv>=2.0,<3 is known to work$"):
        drop_in.patch()


@pytest.mark.skipif(find_spec("detrex") is not None, reason="detrex is installed")
def test_without_detrex() -> None:
    with pytest.raises(ImportError, match=r"^detrex is not installed: "):
        detrex_drop_in.patch()


@pytest.mark.skipif(find_spec("detrex") is None, reason="detrex is not installed: it is on no package index")
def test_detrex_gives_the_same() -> None:
    from detrex.layers import multi_scale_deform_attn as module

    inputs = [torch.randn(2, 16, 2, 8), torch.tensor([(3, 4), (2, 2)]), torch.rand(2, 5, 2, 2, 3, 2)]
    weights = torch.rand(2, 5, 2, 2, 3)
    expected = module.multi_scale_deformable_attn_pytorch(*inputs, weights)
    starts = torch.tensor([0, 12])
    with detrex_drop_in.patched():
        actual = module.MultiScaleDeformableAttnFunction.apply(inputs[0], inputs[1], starts, inputs[2], weights, 64)
    torch.testing.assert_close(actual, expected)
