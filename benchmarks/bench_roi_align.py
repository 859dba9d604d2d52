"""Time multi-level RoIAlign on QueryInst's pyramid: 200 boxes of two images, 7 × 7 and 14 × 14 bins, 256 channels.

Contenders: this project; its definition in PyTorch; torchvision's RoIAlign level by level, as mmdetection calls it;
torchvision's MultiScaleRoIAlign. Features are in the usual memory format ("planar") or channels-last. `extra_info` has
the peak memory of one call beyond its inputs, and on a GPU the time there.

    pytest benchmarks/bench_roi_align.py --benchmark-only
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align

from benchmarks.measure import time_launch
from solq.kernels import multiscale_roi_align, reference

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
STRIDES = (4, 8, 16, 32)
CHANNELS = 256
IMAGE_SIZE = (800, 1344) if ON_GPU else (480, 640)
BOXES_PER_IMAGE = 100


class Inputs(NamedTuple):
    """The arguments of the operator."""

    features: list[Tensor]
    boxes: Tensor
    box_image: Tensor
    bins: int


def make_inputs(bins: int, dtype: torch.dtype, channels_last: bool, whole_image: bool) -> Inputs:
    """Make a pyramid of two images, and boxes of all sizes or, as QueryInst's first stage, of whole images."""
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = [
        torch.randn(2, CHANNELS, IMAGE_SIZE[0] // stride, IMAGE_SIZE[1] // stride, generator=generator)
        .to(DEVICE, dtype)
        .contiguous(memory_format=layout)
        .requires_grad_()
        for stride in STRIDES
    ]
    extent = torch.tensor([IMAGE_SIZE[1], IMAGE_SIZE[0]])
    count = 2 * BOXES_PER_IMAGE
    sides = (0.2 * torch.exp(0.8 * torch.randn(count, 2, generator=generator))).clamp(max=1) * extent
    corners = torch.rand(count, 2, generator=generator) * (extent - sides)
    if whole_image:
        sides, corners = extent.expand(count, 2), torch.zeros(count, 2)
    boxes = torch.cat([corners, corners + sides], dim=1).to(DEVICE)
    return Inputs(features, boxes, torch.arange(count, device=DEVICE) // BOXES_PER_IMAGE, bins)


def ours(inputs: Inputs) -> Tensor:
    return multiscale_roi_align(*inputs)


def definition(inputs: Inputs) -> Tensor:
    return reference.multiscale_roi_align(*inputs)


def torchvision_per_level(inputs: Inputs) -> Tensor:
    """Sample level by level; the host waits for the number of boxes of each."""
    features, boxes, box_image, bins = inputs
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    level = torch.floor(torch.log2(area.sqrt() / 56 + 1e-6)).clamp(0, len(STRIDES) - 1)
    regions = torch.cat([box_image[:, None].to(boxes), boxes], dim=1).to(features[0].dtype)
    output = features[0].new_zeros(len(boxes), CHANNELS, bins, bins)
    for index, stride in enumerate(STRIDES):
        chosen = (level == index).nonzero()[:, 0]
        if len(chosen):
            output[chosen] = roi_align(features[index], regions[chosen], bins, 1 / stride, 2, aligned=True)
    return output


def torchvision_multiscale(inputs: Inputs) -> Tensor:
    pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], inputs.bins, sampling_ratio=2)
    levels = {str(index): feature for index, feature in enumerate(inputs.features)}
    boxes = list(inputs.boxes.to(inputs.features[0].dtype).split(BOXES_PER_IMAGE))
    return pooler(levels, boxes, [IMAGE_SIZE] * 2)


@pytest.mark.parametrize("contender", [ours, torchvision_per_level, torchvision_multiscale, definition])
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["planar", "channels_last"])
@pytest.mark.parametrize("sizes", ["mixed", "whole_image"])
@pytest.mark.parametrize("bins", [7, 14])
def test_roi_align(
    benchmark,
    bins: int,
    sizes: str,
    layout: str,
    dtype: torch.dtype,
    direction: str,
    contender: Callable[[Inputs], Tensor],
) -> None:
    if dtype == torch.bfloat16:
        if not ON_GPU:
            pytest.skip("on a CPU all contenders are compared in float32")
        if contender in (torchvision_per_level, torchvision_multiscale):
            pytest.skip("torchvision's RoIAlign has no bfloat16")
    inputs = make_inputs(bins, dtype, layout == "channels_last", sizes == "whole_image")
    backward = direction == "forward_backward"
    grad_output = torch.randn(len(inputs.boxes), bins, bins, CHANNELS, device=DEVICE, dtype=dtype).permute(0, 3, 1, 2)
    if layout == "planar":
        grad_output = grad_output.contiguous()

    def launch() -> None:
        with torch.set_grad_enabled(backward):
            output = contender(inputs)
        if backward:
            torch.autograd.grad(output, inputs.features, grad_output, allow_unused=True)  # levels without boxes

    benchmark.group = f"roi_align {bins} × {bins}, {sizes}, {layout}, {str(dtype)[6:]}, {direction}"
    time_launch(benchmark, launch)
