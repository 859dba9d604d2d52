"""Crop masks by their boxes and paste them back in plain PyTorch: the definitions, and what serves CPU tensors."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .dct import dct_decode_binary, dct_encode

LARGEST_CORNER = 2.0**20  # coordinates of boxes are clamped to ±LARGEST_CORNER, which no image reaches


def _roi_align_weights(start: float, end: float, extent: int, size: int, device: torch.device) -> tuple[Tensor, int]:
    """Compute the weights of RoIAlign along one axis, where it is linear in the pixels.

    Returns:
        (size, R), the weights of each bin on R consecutive pixels; the first of these pixels.
    """
    if not math.isfinite(end - start):
        return torch.zeros(size, 0, device=device), 0
    low, high = torch.tensor([start, end]).clamp(-LARGEST_CORNER, LARGEST_CORNER) - 0.5
    bin_size = ((high - low) / size).item()
    count = math.ceil(bin_size)  # adaptive sampling: samples per bin
    if count <= 0:  # inverted or empty
        return torch.zeros(size, 0, device=device), 0
    # Samples of all bins are numbered in one row; only those close to the image are made.
    first, last = (min(max(int((edge - low.item()) * count / bin_size), 0), size * count) for edge in (-3, extent + 2))
    sample = torch.arange(first, last)
    index, step = sample // count, sample % count
    position = low + index * bin_size + (step + 0.5) * bin_size / count
    inside = (position >= -1) & (position <= extent)
    index, position = index[inside], position[inside].clamp(0, extent - 1)
    if not len(index):
        return torch.zeros(size, 0, device=device), 0
    pixel = position.floor().long()
    next_weight = position - pixel
    first, last = pixel[[0, -1]].tolist()
    weights = torch.zeros(size, last + 2 - first)
    weights.index_put_((index, pixel - first), 1 - next_weight, accumulate=True)
    weights.index_put_((index, pixel + 1 - first), next_weight, accumulate=True)  # zero where pixel + 1 is outside
    return (weights[:, : extent - first] / count).to(device), first


def crop_masks(masks: Tensor, boxes: Tensor, size: int = 128) -> Tensor:
    """Crop masks (K, H, W) by their boxes (K, 4) with RoIAlign (aligned, adaptive sampling): (K, size, size) bool.

    Pixels are True where RoIAlign gives at least 0.5.
    """
    H, W = masks.shape[-2:]
    crops = masks.new_empty(len(masks), size, size, dtype=torch.bool)
    for crop, mask, (x0, y0, x1, y1) in zip(crops, masks, boxes.tolist(), strict=True):
        down, top = _roi_align_weights(y0, y1, H, size, masks.device)
        across, left = _roi_align_weights(x0, x1, W, size, masks.device)
        region = mask[top : top + down.shape[1], left : left + across.shape[1]]
        torch.ge(down @ region.float() @ across.T, 0.5, out=crop)
    return crops


def crop_dct_encode(masks: Tensor, boxes: Tensor, size: int = 128, num_coefficients: int = 256) -> Tensor:
    """Crop full-image masks (K, H, W) by `boxes` (K, 4) in pixels, and encode the crops: (K, n)."""
    return dct_encode(crop_masks(masks, boxes, size), num_coefficients)


def _interpolation(start: float, end: float, extent: int, size: int) -> tuple[int, Tensor, Tensor]:
    """Prepare the linear interpolation of a mask of `size` pixels stretched over start … end, along one image axis.

    Returns:
        The first pixel of the image that the mask can reach; for each pixel from there on, the index of the neighbor
        before it in the mask padded with a zero on either side; the weight (…, 1) of the neighbor after it.
    """
    # A pixel whose center lies outside the box is closer to the zeros around the mask: below the threshold.
    first, last = (int(min(max(edge, 0), extent)) for edge in (start - 1, end + 1))
    position = ((torch.arange(first, last) + 0.5 - start) / (end - start) * size + 0.5).clamp(0, size + 1)
    before = position.long().clamp(max=size)
    return first, before, (position - before)[:, None]


def pasted_regions(masks: Tensor, boxes: Tensor, image_size: Sequence[int]) -> Iterator[tuple[int, int, int, Tensor]]:
    """Paste each mask with a usable box, and yield the region of the image that it can reach.

    Yields:
        The index of the mask; the first row and the first column of the region; its pixels (w, h) bool, transposed so
        that the pixels of a column lie side by side.
    """
    H, W = image_size
    boxes = boxes.float()
    extent = boxes[:, 2:] - boxes[:, :2]
    usable = ((extent > 0) & extent.isfinite()).all(1)
    for index in usable.nonzero()[:, 0].tolist():
        x0, y0, x1, y1 = boxes[index].tolist()
        top, *down = _interpolation(y0, y1, H, masks.shape[-1])
        left, *across = _interpolation(x0, x1, W, masks.shape[-1])
        region = F.pad(masks[index].T.float(), (1, 1, 1, 1))
        for before, weight in (down, across):
            before, weight, region = before.to(region.device), weight.to(region.device), region.T.contiguous()
            region = torch.lerp(region.index_select(0, before), region.index_select(0, before + 1), weight)
        yield index, top, left, region >= 0.5


def paste_masks(masks: Tensor, boxes: Tensor, image_size: Sequence[int]) -> Tensor:
    """Stretch masks (K, N, N) over their boxes (K, 4) in an image (H, W): (K, H, W) bool, True where ≥ 0.5."""
    images = masks.new_zeros(len(masks), *image_size, dtype=torch.bool)
    for index, top, left, region in pasted_regions(masks, boxes, image_size):
        images[index, top : top + region.shape[1], left : left + region.shape[0]] = region.T
    return images


def dct_decode_paste(coefficients: Tensor, boxes: Tensor, image_size: Sequence[int], size: int = 128) -> Tensor:
    """Decode vectors (K, n), binarize the masks and paste them into their boxes (K, 4) in pixels: (K, H, W) bool."""
    return paste_masks(dct_decode_binary(coefficients, size), boxes, image_size)
