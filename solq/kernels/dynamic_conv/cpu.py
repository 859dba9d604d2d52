"""The dynamic convolution on a CPU: a few regions at a time, so that products and norms stay in the cache."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CACHED_FEATURES = 1 << 19  # numbers of region features at a time


def _split(regions: int, positions: int, channels: int) -> Iterator[slice]:
    """Yield slices of a few regions each."""
    size = max(CACHED_FEATURES // (positions * channels), 1)
    return (slice(first, first + size) for first in range(0, regions, size))


def _matrices(parameters: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """View parameters (n, 2 · C · D) as the two matrices of each region, (n, C, D) and (n, D, C)."""
    hidden = parameters.shape[1] // (2 * channels)
    first, second = parameters.chunk(2, dim=1)
    return first.view(-1, channels, hidden), second.view(-1, hidden, channels)


def forward(features: Tensor, parameters: Tensor, norms: list[Tensor], eps: float) -> Tensor:
    """Compute the output (R, A, C)."""
    output = torch.empty_like(features)
    compute = torch.promote_types(features.dtype, torch.float32)
    norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias = (norm.to(compute) for norm in norms)
    for part in _split(*features.shape):
        first, second = _matrices(parameters[part].to(compute), features.shape[2])
        middle = F.layer_norm(features[part].to(compute) @ first, norm_in_bias.shape, norm_in_weight, norm_in_bias, eps)
        product = middle.relu_() @ second
        output[part] = F.layer_norm(product, norm_out_bias.shape, norm_out_weight, norm_out_bias, eps).relu_()
    return output


def backward(
    grad_output: Tensor, features: Tensor, parameters: Tensor, norms: list[Tensor], eps: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Compute the gradients of features, parameters and the four norm vectors; the middle is computed again."""
    compute = torch.promote_types(features.dtype, torch.float32)
    norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias = (norm.to(compute) for norm in norms)
    grad_features = torch.empty_like(features, dtype=compute)
    grad_parameters = torch.empty_like(parameters, dtype=compute)
    grad_norms = [torch.zeros_like(norm, dtype=compute) for norm in norms]
    layer_norm, layer_norm_backward = torch.native_layer_norm, torch.ops.aten.native_layer_norm_backward
    relu_backward = torch.ops.aten.threshold_backward
    for part in _split(*features.shape):
        inputs = features[part].to(compute)
        first, second = _matrices(parameters[part].to(compute), features.shape[2])
        product_in = inputs @ first
        middle, *statistics_in = layer_norm(product_in, norm_in_bias.shape, norm_in_weight, norm_in_bias, eps)
        product_out = middle.relu_() @ second
        output, *statistics_out = layer_norm(product_out, norm_out_bias.shape, norm_out_weight, norm_out_bias, eps)

        grad_first, grad_second = _matrices(grad_parameters[part], features.shape[2])
        grad = relu_backward(grad_output[part].to(compute), output, 0)
        grad, *grads_out = layer_norm_backward(
            grad, product_out, norm_out_bias.shape, *statistics_out, norm_out_weight, norm_out_bias, [True] * 3
        )
        torch.bmm(middle.mT, grad, out=grad_second)
        grad = relu_backward(grad @ second.mT, middle, 0)
        grad, *grads_in = layer_norm_backward(
            grad, product_in, norm_in_bias.shape, *statistics_in, norm_in_weight, norm_in_bias, [True] * 3
        )
        torch.bmm(inputs.mT, grad, out=grad_first)
        torch.bmm(grad, first.mT, out=grad_features[part])
        for total, addend in zip(grad_norms, (*grads_in, *grads_out), strict=True):
            total += addend
    return (
        grad_features.to(features.dtype),
        grad_parameters.to(parameters.dtype),
        [total.to(norm.dtype) for total, norm in zip(grad_norms, norms, strict=True)],
    )
