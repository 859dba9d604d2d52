"""Multi-level RoIAlign on a CPU: each bin is a weighted sum of pixels, which torch calls an embedding bag.

Pixels are rows of channels, so channels-last features are read where they are. The gradient of a pixel is an embedding
bag again, over the bins that read the pixel, which one sort brings together: no two threads add to one pixel, and the
sum has the same order in every run.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .definition import Sampling, box_levels, neighbors, sample_positions


def _weighted_pixels(low: Tensor, high: Tensor, bins: int, size: int, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Find the pixels of each bin along one axis and their weights, both (n, bins, 2 · sampling_ratio)."""
    ratio = sampling.sampling_ratio
    position = sample_positions(low, high, bins, ratio, sampling.aligned)
    before, after, share, inside = neighbors(position, torch.tensor(size, dtype=position.dtype))
    weight = inside / ratio
    pixels = torch.stack([before, after], dim=-1).int()
    weights = torch.stack([weight - weight * share, weight * share], dim=-1)
    return pixels.unflatten(1, (bins, ratio)).flatten(2), weights.unflatten(1, (bins, ratio)).flatten(2)


def _bags(
    boxes: Tensor, box_image: Tensor, level: int, size: tuple[int, int], sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Find the pixels of each bin of boxes of one level and their weights, both (n · bins, 4 · sampling_ratio²)."""
    x0, y0, x1, y1 = (boxes * (1 / sampling.strides[level])).unbind(1)
    rows, row_weights = _weighted_pixels(y0, y1, sampling.output_size[0], size[0], sampling)
    columns, column_weights = _weighted_pixels(x0, x1, sampling.output_size[1], size[1], sampling)
    rows = (box_image.int()[:, None, None] * size[0] + rows) * size[1]
    pixels = rows[:, :, None, :, None] + columns[:, None, :, None, :]
    weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    return pixels.flatten(3).flatten(0, 2), weights.flatten(3).flatten(0, 2)


def forward(output: Tensor, features: Sequence[Tensor], boxes: Tensor, box_image: Tensor, sampling: Sampling) -> None:
    """Write the features of all boxes to `output` (R, bins, C)."""
    compute = torch.promote_types(output.dtype, torch.float32)
    boxes = boxes.to(compute)
    box_level = box_levels(boxes, len(features), sampling.finest_scale)
    output[box_level < 0] = 0
    for level, feature in enumerate(features):
        chosen = (box_level == level).nonzero()[:, 0]
        if len(chosen):
            _, _, height, width = feature.shape
            pixels, weights = _bags(boxes[chosen], box_image[chosen], level, (height, width), sampling)
            table = feature.permute(0, 2, 3, 1).flatten(0, 2).to(compute)
            sums = F.embedding_bag(pixels, table, mode="sum", per_sample_weights=weights)
            output[chosen] = sums.view(len(chosen), *output.shape[1:]).to(output.dtype)


def backward(
    grad_output: Tensor,
    boxes: Tensor,
    box_image: Tensor,
    images: int,
    sizes: Sequence[tuple[int, int]],
    sampling: Sampling,
) -> list[Tensor]:
    """Compute the gradients (B, H, W, C) of the levels from that of the output (R, bins, C)."""
    compute = torch.promote_types(grad_output.dtype, torch.float32)
    grads_of_bins = grad_output.flatten(0, 1).to(compute)
    boxes = boxes.to(compute)
    box_level = box_levels(boxes, len(sizes), sampling.finest_scale)
    grads = []
    for level, (height, width) in enumerate(sizes):
        shape = (images, height, width, grad_output.shape[2])
        chosen = (box_level == level).nonzero()[:, 0]
        if len(chosen) == 0:
            grads.append(grad_output.new_zeros(shape))
            continue
        pixels, weights = _bags(boxes[chosen], box_image[chosen], level, (height, width), sampling)
        pixel, order = pixels.flatten().sort(stable=True)
        begins = torch.searchsorted(pixel, torch.arange(images * height * width, dtype=torch.int32), out_int32=True)
        weights = weights.flatten()[order]
        bins = torch.arange(len(grads_of_bins), dtype=torch.int32).view(grad_output.shape[:2])[chosen].flatten()
        bin_of_weight = bins[order // pixels.shape[1]]
        sums = F.embedding_bag(bin_of_weight, grads_of_bins, begins, mode="sum", per_sample_weights=weights)
        grads.append(sums.view(shape).to(grad_output.dtype))
    return grads
