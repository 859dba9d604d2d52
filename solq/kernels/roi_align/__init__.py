"""Multi-level RoIAlign: the features of boxes, each read on the level of a feature pyramid that fits its size.

Mask R-CNN (https://arxiv.org/abs/1703.06870), section 3, has RoIAlign; Feature Pyramid Networks
(https://arxiv.org/abs/1612.03144), section 4.2, the choice of the level. The usual formulation asks the host which
boxes belong to which level and reads each level by itself. Here one launch serves all levels, and the host does not
wait.

The definition in plain PyTorch stands in definition.py, what serves CPU tensors in cpu.py, the Triton kernels in
roi_align_kernels.py; launch.py launches these, operators.py registers the operators.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import runtime
from . import definition
from .checks import check_options, check_tensors
from .operators import multiscale_roi_align_operator


def multiscale_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    box_image: Tensor,
    output_size: int | tuple[int, int],
    *,
    sampling_ratio: int = 2,
    finest_scale: float = 56.0,
    strides: Sequence[float] = (4, 8, 16, 32),
    aligned: bool = True,
) -> Tensor:
    """Sample the features of each box bilinearly, on the level of a feature pyramid that fits its size.

    Level 0 is used for boxes with √area below 2 · finest_scale, the next one below 4 · finest_scale, and so on, as in
    mmdetection; the last level is used for all larger ones. Every box is divided into bins, and a bin is the average of
    sampling_ratio² samples; samples more than a pixel outside the level are zero. Sums are in float32, or float64 for
    float64 features. Differentiable, once, with respect to the features; boxes get no gradient. Under autocast,
    features are rounded to its dtype, boxes are not.

    Channels-last features (`torch.channels_last`) are read fastest, on a CPU by far. Gradients are channels-last. On a
    GPU their sums have another order in every run, unless `torch.use_deterministic_algorithms` asks for one.

    Args:
        features: L tensors (B, C, H_l, W_l) of one dtype, finest level first.
        boxes: (R, 4) x0 y0 x1 y1 in pixels of the image. Boxes without area sample points. Boxes with NaN or infinite
            coordinates, or with only one side inverted, have features of zero.
        box_image: (R,) int64 or int32, the image of each box, in 0..B−1. Images that do not exist are an error on a
            CPU, and features of zero on a GPU, where the host does not wait to look at them.
        output_size: bins (height, width) of a box, or one number for both.
        sampling_ratio: samples per bin along each axis.
        finest_scale: half the √area from which on level 1 is used, in pixels.
        strides: image pixels per pixel of each level.
        aligned: whether pixel centers are at half integers, as in mmdetection. Without, as in torchvision's
            `MultiScaleRoIAlign`, boxes are shifted by half a pixel and at least one pixel of the level wide and high.

    Returns:
        (R, C, *output_size) in the dtype of the features and in channels-last memory format.

    Raises:
        TypeError: if features, boxes or box_image are no tensors.
        ValueError: if shapes, dtypes, devices or options do not fit.
        RuntimeError: if Triton was asked for where it cannot run.
    """
    check_tensors(features, boxes, box_image)
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    check_options(len(features), (height, width), sampling_ratio, finest_scale, strides)
    backend = runtime.backend_for(boxes, has_definition=True)
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()
    if backend == "definition" or (backend == "reference" and exporting):  # a program is made of standard operators
        return definition.multiscale_roi_align(
            features,
            boxes,
            box_image,
            (height, width),
            sampling_ratio=sampling_ratio,
            finest_scale=finest_scale,
            strides=strides,
            aligned=aligned,
        )
    return multiscale_roi_align_operator(
        list(features),
        boxes.detach(),
        box_image,
        [height, width],
        sampling_ratio,
        float(finest_scale),
        [float(stride) for stride in strides],
        aligned,
    )
