"""Register multi-level RoIAlign and its gradient with torch.library."""

from typing import Any

import torch
from torch import Tensor

from .. import runtime
from . import cpu
from .checks import check_images
from .definition import Sampling


def _backend_functions(tensor: Tensor) -> Any:
    if runtime.backend_for(tensor) == "reference":
        return cpu
    from . import launch

    return launch


@torch.library.custom_op(f"{runtime.NAMESPACE}::multiscale_roi_align", mutates_args=())
def multiscale_roi_align_operator(
    features: list[Tensor],
    boxes: Tensor,
    box_image: Tensor,
    output_size: list[int],
    sampling_ratio: int,
    finest_scale: float,
    strides: list[float],
    aligned: bool,
) -> Tensor:
    if box_image.device.type == "cpu":
        check_images(box_image, features[0].shape[0])
    sampling = _sampling(output_size, sampling_ratio, finest_scale, strides, aligned)
    output = _empty_output(features, boxes, box_image, output_size)
    rows = output.permute(0, 2, 3, 1).flatten(1, 2)
    _backend_functions(boxes).forward(rows, features, boxes, box_image, sampling)
    return output


@multiscale_roi_align_operator.register_fake
def _empty_output(features, boxes, box_image, output_size, *_) -> Tensor:
    C = features[0].shape[1]
    return features[0].new_empty((boxes.shape[0], *output_size, C)).permute(0, 3, 1, 2)


@torch.library.custom_op(f"{runtime.NAMESPACE}::multiscale_roi_align_backward", mutates_args=())
def multiscale_roi_align_backward_operator(
    grad_output: Tensor,
    boxes: Tensor,
    box_image: Tensor,
    images: int,
    heights: list[int],
    widths: list[int],
    sampling_ratio: int,
    finest_scale: float,
    strides: list[float],
    aligned: bool,
) -> list[Tensor]:
    sampling = _sampling(list(grad_output.shape[2:]), sampling_ratio, finest_scale, strides, aligned)
    rows = grad_output.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
    sizes = list(zip(heights, widths, strict=True))
    grads = _backend_functions(boxes).backward(rows, boxes, box_image, images, sizes, sampling)
    return [grad.permute(0, 3, 1, 2) for grad in grads]


@multiscale_roi_align_backward_operator.register_fake
def _(grad_output, boxes, box_image, images, heights, widths, *_) -> list[Tensor]:
    C = grad_output.shape[1]
    return [
        grad_output.new_empty((images, height, width, C)).permute(0, 3, 1, 2)
        for height, width in zip(heights, widths, strict=True)
    ]


def _sampling(
    output_size: list[int], sampling_ratio: int, finest_scale: float, strides: list[float], aligned: bool
) -> Sampling:
    height, width = output_size
    return Sampling((height, width), sampling_ratio, finest_scale, tuple(strides), aligned)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, boxes, box_image, _, *ctx.options = inputs
    ctx.save_for_backward(boxes, box_image)
    ctx.images = features[0].shape[0]
    ctx.heights, ctx.widths = ([feature.shape[axis] for feature in features] for axis in (2, 3))


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    grads = multiscale_roi_align_backward_operator(
        grad_output, *ctx.saved_tensors, ctx.images, ctx.heights, ctx.widths, *ctx.options
    )
    return grads, *[None] * 7


multiscale_roi_align_operator.register_autograd(_backward, setup_context=_save)

_library = torch.library.Library(runtime.NAMESPACE, "FRAGMENT")


def _register_autocast(device_type: str, key: str) -> None:
    """Round features, and nothing else, to the dtype of autocast: boxes in half precision are wrong by pixels."""

    def under_autocast(features: list[Tensor], *others: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        features = [feature if feature.dtype == torch.float64 else feature.to(dtype) for feature in features]
        with torch.autocast(device_type, enabled=False):
            return multiscale_roi_align_operator(features, *others)

    _library.impl("multiscale_roi_align", under_autocast, key)


_register_autocast("cuda", "AutocastCUDA")
_register_autocast("cpu", "AutocastCPU")
