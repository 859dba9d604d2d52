"""MSDeformAttn: names and initial values of Deformable DETR's module, and equal training on both backends."""

import math

import pytest
import torch
from torch import Tensor

from solq.kernels import use_backend
from solq.kernels.ms_deform_attn.module import MSDeformAttn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES, STARTS = [(4, 3), (2, 2)], [0, 12]


def test_parameter_names_and_shapes() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in MSDeformAttn(64, 3, 4, 2).state_dict().items()}
    assert shapes == {
        "sampling_offsets.weight": (48, 64),
        "sampling_offsets.bias": (48,),
        "attention_weights.weight": (24, 64),
        "attention_weights.bias": (24,),
        "value_proj.weight": (64, 64),
        "value_proj.bias": (64,),
        "output_proj.weight": (64, 64),
        "output_proj.bias": (64,),
    }


def test_initial_offsets_lie_on_a_ring() -> None:
    module = MSDeformAttn(32, n_levels=2, n_heads=8, n_points=3)
    offsets = module.sampling_offsets.bias.detach().view(8, 2, 3, 2)
    for head in range(8):
        x, y = math.cos(head * math.pi / 4), math.sin(head * math.pi / 4)
        for point in range(3):
            expected = torch.tensor([x, y]) / max(abs(x), abs(y)) * (point + 1)
            torch.testing.assert_close(offsets[head, :, point], expected.expand(2, 2))
    for parameter in (module.sampling_offsets.weight, *module.attention_weights.parameters()):
        assert not parameter.any()
    assert not module.value_proj.bias.any()
    assert module.value_proj.weight.abs().max() <= math.sqrt(6 / 64)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="d_model is 30, must be a multiple of n_heads, which is 8"):
        MSDeformAttn(30)


@pytest.mark.parametrize("name", ["d_model", "n_levels", "n_heads", "n_points"])
def test_sizes_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.* must be at least 1"):
        MSDeformAttn(**{name: 0})


def test_values_of_another_batch_are_named() -> None:
    query, points, memory = inputs(2)
    with pytest.raises(ValueError, match=r"sampling_offsets has shape \(2, .*\(B=1"):
        MSDeformAttn(16, 2, 2, 2).to(DEVICE)(query, points, memory[:1], SHAPES, STARTS)


def inputs(reference_size: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    query, memory = torch.randn(2, 5, 16, device=DEVICE), torch.randn(2, 16, 16, device=DEVICE)
    return query, torch.rand(2, 5, 2, reference_size, device=DEVICE), memory


def test_padding_counts_as_zero() -> None:
    query, points, memory = inputs(2)
    module = MSDeformAttn(16, 2, 2, 2).to(DEVICE)
    mask = torch.zeros(2, 16, dtype=torch.bool, device=DEVICE)
    mask[:, 5:9] = True
    with use_backend("reference"), torch.no_grad():
        expected = module(query, points, memory, SHAPES, STARTS, mask)
        memory[:, 5:9] = 1e3
        torch.testing.assert_close(module(query, points, memory, SHAPES, STARTS, mask), expected)
        module.value_proj.bias.fill_(1)  # also of the bias
        assert not torch.allclose(module(query, points, memory, SHAPES, STARTS, mask), expected)


@pytest.mark.parametrize("reference_size", [2, 4])
def test_training_is_equal_on_both_backends(reference_size: int) -> None:
    query, points, memory = inputs(reference_size)
    losses = {}
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        module = MSDeformAttn(16, 2, 2, 2).to(DEVICE)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        losses[backend] = []
        with use_backend(backend):
            for _ in range(3):
                loss = (module(query, points, memory, SHAPES, STARTS) - query).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[backend].append(loss.item())
    assert losses["reference"][-1] < losses["reference"][0]
    assert losses["triton"] == pytest.approx(losses["reference"], rel=1e-5)
