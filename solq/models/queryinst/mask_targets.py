"""Target masks in the boxes that a stage predicted, resampled from the target masks in their own boxes."""

import math

import torch
from torch import Tensor
from torchvision.ops import box_convert

from solq.data.batch import PackedTargets


@torch.no_grad()
def crop_targets(
    targets: PackedTargets, rows: Tensor, images: Tensor, regions: Tensor, padded_size: tuple[int, int], side: int
) -> Tensor:
    """Crop target masks by R regions, as RoIAlign does with full-image masks, without ever making these.

    A full-image mask has the pixels of the image file: where the image is enlarged for training, published targets
    show them as blocks. Pixels are therefore looked up where the file has them. RoIAlign reads rows and columns alike,
    so each crop is its mask between two small matrices.

    Args:
        targets: T targets, their masks in the frames of their own boxes.
        rows: (R,) int64, the target of each region.
        images: (R,) int64, the image of each region.
        regions: (R, 4), x0 y0 x1 y1 in pixels of the padded image, to which they are clipped.
        padded_size: height and width of the padded images.
        side: height and width of the crops.

    Returns:
        (R, side, side) bool, True where at least half is covered.

    Source: Mask R-CNN, section 3.1.
    """
    masks = targets.masks[rows].float()
    sizes, file_sizes = targets.sizes[images].float(), targets.orig_sizes[images].float().clamp(min=1)
    boxes = box_convert(targets.boxes[rows], "cxcywh", "xyxy") * sizes.flip(-1).repeat(1, 2)
    crop_x, crop_y = (
        _sampling_matrix(
            regions[:, axis::2].clamp(0, padded),
            boxes[:, axis::2],
            (sizes[:, 1 - axis], file_sizes[:, 1 - axis]),
            padded,
            (side, masks.shape[-1]),
        )
        for axis, padded in enumerate(reversed(padded_size))
    )
    return crop_y @ masks @ crop_x.mT >= 0.5


def _sampling_matrix(
    regions: Tensor, boxes: Tensor, sizes: tuple[Tensor, Tensor], padded: int, shape: tuple[int, int]
) -> Tensor:
    """Compute along one axis the share (R, bins, N) of each cell of a target mask in each bin of a region.

    Args:
        regions, boxes: (R, 2), start and end in pixels of the padded image.
        sizes: (R,) twice, extent of the image without its padding, in the batch and in its file.
        padded: extent of the padded image.
        shape: number of bins, and N cells of a mask.
    """
    bins, cells = shape
    start, end = regions[:, :, None, None].unbind(1)  # (R, 1, 1)
    bin_size = (end - start) / bins
    samples = bin_size.ceil()  # in each bin, as RoIAlign chooses them
    sample = torch.arange(math.ceil(padded / bins), device=regions.device)
    bin_start = start + bin_size * torch.arange(bins, device=regions.device)[:, None]
    position = bin_start + bin_size * (sample + 0.5) / samples.clamp(min=1) - 0.5  # (R, bins, samples)
    used = (sample < samples) & (position >= -1)
    position = position.clamp(0, padded - 1)

    size, file_size = (extent[:, None, None] for extent in sizes)
    box_start, box_end = boxes[:, :, None, None].unbind(1)
    shares = regions.new_zeros(len(regions), bins, cells)
    before = position.floor()
    for pixel, share in ((before, before + 1 - position), (before + 1, position - before)):
        # The added hundredth undoes rounding where a pixel begins exactly with one of the file.
        file_pixel = (pixel * (file_size / size) + 0.01).floor()
        center = (file_pixel + 0.5) * (size / file_size)
        cell = ((center - box_start) / (box_end - box_start) * cells).floor()
        inside = used & (pixel < padded) & (cell >= 0) & (cell < cells)
        shares.scatter_add_(2, torch.where(inside, cell, 0).long(), torch.where(inside, share / samples, 0))
    return shares
