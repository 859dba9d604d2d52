"""Register the dynamic convolution and its gradient with torch.library."""

from typing import Any

import torch
from torch import Tensor

from .. import runtime
from . import cpu


def _backend_functions(tensor: Tensor) -> Any:
    if runtime.backend_for(tensor) == "reference":
        return cpu
    from . import launch

    return launch


@torch.library.custom_op(f"{runtime.NAMESPACE}::dynamic_conv", mutates_args=())
def dynamic_conv_operator(features: Tensor, parameters: Tensor, norms: list[Tensor], eps: float) -> Tensor:
    norms = [norm.contiguous() for norm in norms]
    return _backend_functions(features).forward(features.contiguous(), parameters.contiguous(), norms, eps)


@dynamic_conv_operator.register_fake
def _(features, *_) -> Tensor:
    return features.new_empty(features.shape)


@torch.library.custom_op(f"{runtime.NAMESPACE}::dynamic_conv_backward", mutates_args=())
def dynamic_conv_backward_operator(
    grad_output: Tensor, features: Tensor, parameters: Tensor, norms: list[Tensor], eps: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    norms = [norm.contiguous() for norm in norms]
    tensors = (grad_output.contiguous(), features.contiguous(), parameters.contiguous())
    return _backend_functions(features).backward(*tensors, norms, eps)


@dynamic_conv_backward_operator.register_fake
def _(grad_output, features, parameters, norms, *_) -> tuple[Tensor, Tensor, list[Tensor]]:
    return (
        features.new_empty(features.shape),
        parameters.new_empty(parameters.shape),
        [norm.new_empty(norm.shape) for norm in norms],
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, parameters, norms, ctx.eps = inputs
    ctx.save_for_backward(features, parameters, *norms)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    features, parameters, *norms = ctx.saved_tensors
    grads = dynamic_conv_backward_operator(grad_output, features, parameters, norms, ctx.eps)
    return *grads, None


dynamic_conv_operator.register_autograd(_backward, setup_context=_save)

_library = torch.library.Library(runtime.NAMESPACE, "FRAGMENT")


def _register_autocast(device_type: str, key: str) -> None:
    """Round what is multiplied to the dtype of autocast; norms stay as they are, since they are applied in float32."""

    def under_autocast(features: Tensor, parameters: Tensor, *others: Any) -> Tensor:
        if features.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device_type)
            features, parameters = features.to(dtype), parameters.to(dtype)
        with torch.autocast(device_type, enabled=False):
            return dynamic_conv_operator(features, parameters, *others)

    _library.impl("dynamic_conv", under_autocast, key)


_register_autocast("cuda", "AutocastCUDA")
_register_autocast("cpu", "AutocastCPU")
