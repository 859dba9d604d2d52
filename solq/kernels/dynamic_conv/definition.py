"""Define the dynamic convolution in plain PyTorch: any device, differentiable, and exportable in standard operators."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dynamic_conv(
    features: Tensor,
    parameters: Tensor,
    norm_in_weight: Tensor,
    norm_in_bias: Tensor,
    norm_out_weight: Tensor,
    norm_out_bias: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """Multiply each region's features by two matrices of its own: see `solq.kernels.dynamic_conv`."""
    R, _, C = features.shape
    D = norm_in_weight.shape[0]
    compute = torch.promote_types(features.dtype, torch.float32)
    first, second = parameters.to(compute).split(C * D, dim=1)
    norm_in, norm_in_shift, norm_out, norm_out_shift = (
        tensor.to(compute) for tensor in (norm_in_weight, norm_in_bias, norm_out_weight, norm_out_bias)
    )
    middle = features.to(compute) @ first.reshape(R, C, D)
    middle = F.layer_norm(middle, (D,), norm_in, norm_in_shift, eps).relu()
    output = middle @ second.reshape(R, D, C)
    return F.layer_norm(output, (C,), norm_out, norm_out_shift, eps).relu().to(features.dtype)
