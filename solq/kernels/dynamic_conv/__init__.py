"""The dynamic convolution: the features of each region pass through two matrices that a query made for it.

Sparse R-CNN (https://arxiv.org/abs/2011.12450), section 3.2, has it as dynamic instance interactive head; QueryInst
(https://arxiv.org/abs/2105.01928), section 3.2, uses it for boxes and masks. The usual formulation is two batched
products with LayerNorm and ReLU as separate steps, each of which reads and writes its whole result. Here it is one
kernel: features are read once, and what lies between the products never reaches memory.

The definition in plain PyTorch stands in definition.py, what serves CPU tensors in cpu.py, the Triton kernels in
dynamic_conv_kernels.py; launch.py launches these, operators.py registers the operators.
"""

import torch
from torch import Tensor

from .. import runtime
from . import definition
from .checks import check_arguments
from .operators import dynamic_conv_operator


def dynamic_conv(
    features: Tensor,
    parameters: Tensor,
    norm_in_weight: Tensor,
    norm_in_bias: Tensor,
    norm_out_weight: Tensor,
    norm_out_bias: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """Multiply the features of each region by two matrices of its own, with a LayerNorm and ReLU after each product.

    The result is ReLU(LN(ReLU(LN(features @ first)) @ second)). On a GPU this is one kernel: features are read once,
    and what lies between the products, D wide, never reaches memory; it is rounded to the dtype of the features, as all
    operands of products are. Sums and norms are in float32, or float64 for float64 features. Differentiable, once, with
    respect to all tensors, with the same gradients in every run; the backward pass computes the products again. Under
    autocast, features and parameters are rounded to its dtype.

    Args:
        features: (R, A, C), A positions of R regions.
        parameters: (R, 2 · C · D): row by row, the matrix C × D and then the matrix D × C of each region. They are
            rounded to the dtype of the features.
        norm_in_weight, norm_in_bias: (D,), of the LayerNorm after the first product.
        norm_out_weight, norm_out_bias: (C,), of the LayerNorm after the second product.
        eps: what both LayerNorms add to the variance; positive.

    Returns:
        (R, A, C) in the dtype of the features.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes or devices do not fit.
        RuntimeError: if Triton was asked for where it cannot run.
    """
    norms = {
        "norm_in_weight": norm_in_weight,
        "norm_in_bias": norm_in_bias,
        "norm_out_weight": norm_out_weight,
        "norm_out_bias": norm_out_bias,
    }
    check_arguments(features, parameters, norms, eps)
    backend = runtime.backend_for(features, has_definition=True)
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()
    if backend == "definition" or (backend == "reference" and exporting):  # a program is made of standard operators
        return definition.dynamic_conv(features, parameters, **norms, eps=eps)
    return dynamic_conv_operator(features, parameters.to(features.dtype), list(norms.values()), eps)
