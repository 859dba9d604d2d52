"""Plain versions of operators that `solq.kernels` does not have yet; this file goes when it has."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from solq.kernels.reference import paste_masks, paste_runs

__all__ = ["dynamic_conv", "multiscale_roi_align", "paste_masks", "paste_runs"]


def multiscale_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    box_image: Tensor,
    output_size: tuple[int, int],
    *,
    sampling_ratio: int = 2,
    finest_scale: float = 56.0,
    strides: Sequence[int] = (4, 8, 16, 32),
) -> Tensor:
    """Average bilinear samples of each box (R, 4) on the level of its size: (R, C, *output_size)."""
    boxes = boxes.detach().float()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    usable = boxes.isfinite().all(1) & (area >= 0)
    level = (torch.log2(area.clamp(min=0).sqrt() / finest_scale + 1e-6)).floor().clamp(0, len(features) - 1)
    regions = torch.cat([box_image[:, None].float(), boxes], dim=1).masked_fill(~usable[:, None], 0)
    sampled = features[0].new_zeros(len(boxes), features[0].shape[1], *output_size)
    for index, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        aligned = roi_align(feature, regions.to(feature.dtype), output_size, 1 / stride, sampling_ratio, aligned=True)
        sampled = torch.where((usable & (level == index))[:, None, None, None], aligned, sampled)
    return sampled


def dynamic_conv(
    features: Tensor,
    parameters: Tensor,
    norm_in_weight: Tensor,
    norm_in_bias: Tensor,
    norm_out_weight: Tensor,
    norm_out_bias: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """Multiply the features (R, A, C) of each region by its own matrices C×D and D×C, each with LayerNorm and ReLU."""
    R, _, C = features.shape
    D = len(norm_in_weight)
    first, second = parameters.split(C * D, dim=1)
    middle = F.layer_norm(features @ first.view(R, C, D), (D,), norm_in_weight, norm_in_bias, eps).relu()
    middle = middle.to(features.dtype)
    output = F.layer_norm(middle @ second.view(R, D, C), (C,), norm_out_weight, norm_out_bias, eps).relu()
    return output.to(features.dtype)
