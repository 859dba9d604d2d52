"""Define multi-level RoIAlign in plain PyTorch: any device, differentiable, and exportable in standard operators."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How boxes are sampled: the arguments of `multiscale_roi_align` that are no tensors."""

    output_size: tuple[int, int]
    sampling_ratio: int
    finest_scale: float
    strides: tuple[float, ...]
    aligned: bool


def level_areas(levels: int, finest_scale: float) -> list[float]:
    """Compute the box area from which on each level but the first is used.

    These are the areas where floor(log2(√area / finest_scale + 1e-6)) grows by one; comparing areas needs no logarithm,
    so boxes near a border go to the same level on every device.
    """
    return [((2**level - 1e-6) * finest_scale) ** 2 for level in range(1, levels)]


def box_levels(boxes: Tensor, levels: int, finest_scale: float) -> Tensor:
    """Choose the level (R,) of each box (R, 4) by its area: −1 if a side is NaN, infinite or inverted alone."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    level = torch.zeros_like(area, dtype=torch.int64)
    for least in level_areas(levels, finest_scale):
        level = level + (area >= least)
    return torch.where(boxes.isfinite().all(1) & (area >= 0), level, -1)


def sample_positions(low: Tensor, high: Tensor, bins: int, sampling_ratio: int, aligned: bool) -> Tensor:
    """Compute where each box is sampled along one axis: (R, bins · sampling_ratio), in pixels of its level."""
    if aligned:
        low, high = low - 0.5, high - 0.5
    extent = high - low if aligned else (high - low).clamp(min=1)
    steps = torch.arange(bins * sampling_ratio, dtype=low.dtype, device=low.device)
    return low[:, None] + (steps + 0.5) / sampling_ratio * (extent / bins)[:, None]


def neighbors(position: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the pixels before and after each position, the share of the latter, and whether the position is inside.

    `size` is the number of pixels along the axis. Up to one pixel outside, the first or last pixel is sampled.
    """
    inside = (position >= -1) & (position <= size)
    position = torch.where(inside, position, 0).clamp(min=0).minimum(size - 1)
    before = position.floor()
    return before.long(), (before + 1).minimum(size - 1).long(), position - before, inside


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
    """Average bilinear samples of each box on the level of its size: see `solq.kernels.multiscale_roi_align`."""
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    compute = torch.promote_types(features[0].dtype, torch.float32)
    pixels = torch.cat([feature.flatten(2) for feature in features], dim=2).mT.to(compute)  # (B, S, C)
    sizes = [(feature.shape[2], feature.shape[3]) for feature in features]
    starts = [sum(h * w for h, w in sizes[:level]) for level in range(len(features))]

    boxes = boxes.detach().to(compute)
    level = box_levels(boxes, len(features), finest_scale)
    valid = (level >= 0) & (box_image >= 0) & (box_image < features[0].shape[0])
    level = level.clamp(min=0)
    image = torch.where(valid, box_image, 0)
    level_sizes = torch.tensor(sizes, device=boxes.device)[level]
    start = torch.tensor(starts, device=boxes.device)[level]
    scale = torch.tensor([1 / stride for stride in strides], dtype=compute, device=boxes.device)[level]

    x0, y0, x1, y1 = (boxes * scale[:, None]).unbind(1)
    y = sample_positions(y0, y1, height, sampling_ratio, aligned)
    x = sample_positions(x0, x1, width, sampling_ratio, aligned)
    top, bottom, share_bottom, inside_y = neighbors(y, level_sizes[:, :1].to(compute))
    left, right, share_right, inside_x = neighbors(x, level_sizes[:, 1:].to(compute))

    def corner(row: Tensor, column: Tensor) -> Tensor:
        """Read the pixels (R, samples along y, samples along x, C) at these rows and columns."""
        line = start[:, None] + row * level_sizes[:, 1:]
        return pixels[image[:, None, None], line[:, :, None] + column[:, None, :]]

    below, beside = share_bottom[:, :, None, None], share_right[:, None, :, None]
    sampled = (1 - below) * ((1 - beside) * corner(top, left) + beside * corner(top, right)) + below * (
        (1 - beside) * corner(bottom, left) + beside * corner(bottom, right)
    )
    inside = valid[:, None, None] & inside_y[:, :, None] & inside_x[:, None, :]
    sampled = torch.where(inside[..., None], sampled, 0)
    bins = sampled.unflatten(2, (width, sampling_ratio)).unflatten(1, (height, sampling_ratio)).mean((2, 4))
    return bins.permute(0, 3, 1, 2).to(features[0].dtype)
