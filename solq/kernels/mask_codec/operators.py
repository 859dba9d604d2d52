"""Register the operators of the mask codec with torch.library."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..runtime import NAMESPACE, backend_for
from . import crop_paste, dct


def _operator(plain: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], torch.library.CustomOpDef]:
    """Register an operator that is served by `plain`, or by the function of the operator's name in launch.py.

    The decorated function gives the operator its name, its schema and, for tracing, an empty result. Operators run on
    the CPU too, and choose the backend themselves: the plain functions loop over masks and boxes, which no tracer
    should unroll.
    """

    def register(empty_result: Callable[..., Tensor]) -> torch.library.CustomOpDef:
        name = empty_result.__name__

        def call(*arguments: Any) -> Tensor:
            if backend_for(arguments[0]) == "triton":
                from . import launch

                return getattr(launch, name)(*arguments)
            # Autocast must not round the products to bfloat16.
            with torch.autocast(arguments[0].device.type, enabled=False):
                return plain(*arguments)

        schema = torch.library.infer_schema(empty_result, mutates_args=())
        operator = torch.library.custom_op(f"{NAMESPACE}::{name}", call, mutates_args=(), schema=schema)
        operator.register_fake(empty_result)
        return operator

    return register


@_operator(dct.dct_encode)
def dct_encode(masks: Tensor, num_coefficients: int) -> Tensor:
    return masks.new_empty(masks.shape[0], num_coefficients, dtype=torch.float32)


@_operator(dct.dct_decode)
def dct_decode(coefficients: Tensor, size: int) -> Tensor:
    return coefficients.new_empty(coefficients.shape[0], size, size, dtype=torch.float32)


@_operator(dct.dct_decode_binary)
def dct_decode_binary(coefficients: Tensor, size: int) -> Tensor:
    return coefficients.new_empty(coefficients.shape[0], size, size, dtype=torch.bool)


@_operator(crop_paste.crop_dct_encode)
def crop_dct_encode(masks: Tensor, boxes: Tensor, size: int, num_coefficients: int) -> Tensor:
    return masks.new_empty(masks.shape[0], num_coefficients, dtype=torch.float32)


@_operator(crop_paste.paste_masks)
def paste_masks(masks: Tensor, boxes: Tensor, image_size: Sequence[int]) -> Tensor:
    return masks.new_empty(masks.shape[0], *image_size, dtype=torch.bool)


@_operator(crop_paste.dct_decode_paste)
def dct_decode_paste(coefficients: Tensor, boxes: Tensor, image_size: Sequence[int], size: int) -> Tensor:
    return coefficients.new_empty(coefficients.shape[0], *image_size, dtype=torch.bool)


# Encode and decode are linear, and each is the transpose of the other: the gradient of one is the other.


def _save_masks(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.size, ctx.dtype = inputs[0].shape[-1], inputs[0].dtype


def _save_coefficients(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.num_coefficients, ctx.dtype = inputs[0].shape[-1], inputs[0].dtype


dct_encode.register_autograd(
    lambda ctx, grad: (dct_decode(grad, ctx.size).to(ctx.dtype), None), setup_context=_save_masks
)
dct_decode.register_autograd(
    lambda ctx, grad: (dct_encode(grad, ctx.num_coefficients).to(ctx.dtype), None), setup_context=_save_coefficients
)
