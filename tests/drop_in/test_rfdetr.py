"""RF-DETR's own attention module, of its package on PyPI."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("rfdetr", reason="rfdetr is not installed: pip install rfdetr")

from solq.drop_in import rfdetr as drop_in
from solq.kernels import use_backend

SHAPES = [(3, 4), (2, 2)]


def module() -> Any:
    from rfdetr.models.ops.modules.ms_deform_attn import MSDeformAttn

    torch.manual_seed(0)
    layer = MSDeformAttn(d_model=16, n_levels=2, n_heads=2, n_points=3)
    torch.nn.init.normal_(layer.sampling_offsets.weight)
    torch.nn.init.normal_(layer.attention_weights.weight)
    return layer


def run(layer: Any, coordinates: int, pairs: list[tuple[int, int]] | None) -> list[Tensor]:
    torch.manual_seed(1)
    query, value = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 16, 16, requires_grad=True)
    references = torch.rand(2, 5, 1, coordinates)
    output = layer(query, references, value, torch.tensor(SHAPES), torch.tensor([0, 12]), None, pairs)
    return [output, *torch.autograd.grad(output.square().sum(), [query, value, *layer.parameters()])]


@pytest.mark.parametrize("pairs", [None, SHAPES], ids=["tensor", "pairs"])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_module_gives_the_same(coordinates: int, pairs: list[tuple[int, int]] | None, backend: str) -> None:
    layer = module()
    theirs = run(layer, coordinates, pairs)
    with drop_in.patched(), use_backend(backend):
        ours = run(layer, coordinates, pairs)
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_export_mode_keeps_its_own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = module()
    layer._export = True
    theirs = run(layer, 4, SHAPES)
    monkeypatch.setattr("solq.drop_in.rfdetr.attention", None)
    with drop_in.patched():
        ours = run(layer, 4, SHAPES)
    assert all(torch.equal(actual, expected) for actual, expected in zip(ours, theirs, strict=True))


def test_unpatching_restores_the_very_object() -> None:
    from rfdetr.models.ops.modules import ms_deform_attn

    original = ms_deform_attn.ms_deform_attn_core_pytorch
    assert drop_in.patch() == drop_in.patch() == [f"{ms_deform_attn.__name__}.ms_deform_attn_core_pytorch"]
    assert ms_deform_attn.ms_deform_attn_core_pytorch is not original
    drop_in.unpatch()
    assert ms_deform_attn.ms_deform_attn_core_pytorch is original
