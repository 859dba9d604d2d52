"""Find the run lengths of masks in plain PyTorch, on any device: where COCO's runs of equal pixels begin.

COCO orders the pixels of an image column by column: pixel (x, y) is number x·H + y. Runs alternate, zeros first.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .crop_paste import pasted_regions


def mask_runs(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Find where full-image masks change from 0 to 1 or back.

    Args:
        masks: (K, H, W) bool.

    Returns:
        Numbers x·H + y (R,) int64 of the pixels that differ from the one before them, where a zero stands before the
        first: those of the first mask, of the second, …; how many each mask has (K,) int64.
    """
    pixels = masks.transpose(1, 2).flatten(1)
    changes = torch.cat([pixels[:, :1], pixels[:, 1:] ^ pixels[:, :-1]], dim=1)
    return changes.nonzero()[:, 1], changes.sum(1)


def paste_runs(masks: Tensor, boxes: Tensor, image_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Find the `mask_runs` of masks (K, N, N) pasted into their boxes (K, 4), without making the images (H, W)."""
    H, W = image_size
    changes = [boxes.new_zeros(0, dtype=torch.int64)] * len(masks)
    for index, top, left, region in pasted_regions(masks, boxes, image_size):
        # Where the image goes on below the region, a row of zeros there ends the run of each column.
        column = F.pad(region, (0, int(region.shape[1] < H)))
        pixels = F.pad(column.flatten(), (1, 1))
        change = (pixels[1:] ^ pixels[:-1]).nonzero()[:, 0]
        x, y = change // column.shape[1], change % column.shape[1]
        change = (left + x) * H + top + y
        changes[index] = change[change < H * W]  # the end of the image ends the last run
    counts = torch.tensor([len(change) for change in changes], dtype=torch.int64, device=masks.device)
    return torch.cat(changes) if changes else counts, counts
