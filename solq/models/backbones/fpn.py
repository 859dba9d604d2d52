"""The feature pyramid: semantics of coarse features joined to the resolution of fine ones."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class FeaturePyramid(nn.Module):
    """Project features to one width, add each level to the next finer one, and smooth the sums.

    Source: Feature Pyramid Networks (Lin et al., CVPR 2017, section 3), without its additional coarse levels.

    Args:
        in_channels: of the features, finest first.
        width: C of every level of the pyramid.
    """

    def __init__(self, in_channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in in_channels)
        self.output_convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in in_channels)
        for conv in [*self.lateral_convs, *self.output_convs]:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the pyramid (B, C, H_l, W_l), finest first, of features (B, channels, H_l, W_l)."""
        levels = [conv(feature) for conv, feature in zip(self.lateral_convs, features, strict=True)]
        for level in range(len(levels) - 1, 0, -1):
            finer = levels[level - 1]
            levels[level - 1] = finer + F.interpolate(levels[level], size=finer.shape[-2:])
        return [conv(x) for conv, x in zip(self.output_convs, levels, strict=True)]
