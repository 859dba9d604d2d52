"""Time the dynamic convolution of QueryInst's heads: 200 regions, 49 or 196 positions, 256 channels, 64 in the middle.

Contenders: this project; the batched products of Sparse R-CNN and QueryInst with PyTorch's LayerNorm, eager and, on a
GPU, compiled. `extra_info` has the peak memory of one call beyond its inputs, and on a GPU the time there.

    pytest benchmarks/bench_dynamic_conv.py --benchmark-only
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import time_launch
from solq.kernels import dynamic_conv

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
REGIONS, CHANNELS, HIDDEN = 200, 256, 64


def make_inputs(positions: int, dtype: torch.dtype) -> list[Tensor]:
    """Make the arguments of the operator; norms are in float32, as under autocast."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(REGIONS, positions, CHANNELS, generator=generator)
    parameters = torch.randn(REGIONS, 2 * CHANNELS * HIDDEN, generator=generator) / 8
    norms = [torch.rand(size, generator=generator) for size in (HIDDEN, HIDDEN, CHANNELS, CHANNELS)]
    tensors = [features.to(DEVICE, dtype), parameters.to(DEVICE, dtype), *(norm.to(DEVICE) for norm in norms)]
    return [tensor.requires_grad_() for tensor in tensors]


def batched_products(
    features: Tensor,
    parameters: Tensor,
    norm_in_weight: Tensor,
    norm_in_bias: Tensor,
    norm_out_weight: Tensor,
    norm_out_bias: Tensor,
) -> Tensor:
    first, second = parameters.split(CHANNELS * HIDDEN, dim=1)
    middle = torch.bmm(features, first.view(-1, CHANNELS, HIDDEN)).float()
    middle = F.relu(F.layer_norm(middle, (HIDDEN,), norm_in_weight, norm_in_bias)).to(features.dtype)
    output = torch.bmm(middle, second.view(-1, HIDDEN, CHANNELS)).float()
    return F.relu(F.layer_norm(output, (CHANNELS,), norm_out_weight, norm_out_bias)).to(features.dtype)


compiled_products = torch.compile(batched_products)
compiled_products.__name__ = "compiled_products"


@pytest.mark.parametrize("contender", [dynamic_conv, batched_products, compiled_products], ids=lambda c: c.__name__)
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("positions", [49, 196])
def test_dynamic_conv(
    benchmark, positions: int, dtype: torch.dtype, direction: str, contender: Callable[..., Tensor]
) -> None:
    if not ON_GPU and dtype == torch.bfloat16:
        pytest.skip("on a CPU all contenders are compared in float32")
    if not ON_GPU and contender is compiled_products:
        pytest.skip("compiled products are compared on a GPU only")
    inputs = make_inputs(positions, dtype)
    backward = direction == "forward_backward"
    grad_output = torch.randn_like(inputs[0])

    def launch() -> None:
        with torch.set_grad_enabled(backward):
            output = contender(*inputs)
        if backward:
            torch.autograd.grad(output, inputs, grad_output)

    benchmark.group = f"dynamic_conv {positions} positions, {str(dtype)[6:]}, {direction}"
    time_launch(benchmark, launch)
