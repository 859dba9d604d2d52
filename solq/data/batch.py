"""Collate samples into batches: images padded to one of few sizes, targets of all images packed in flat tensors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

Size = tuple[int, int]  # height, width
Target = dict[str, Any]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def padded_sizes(scales: Sequence[int], max_size: int) -> list[Size]:
    """List the sizes (height, width) that batches of images of these scales are padded to, at most 15.

    They are few because a model is compiled for each: four steps of the shorter side, each for crops, photographs and
    portraits, and three sizes for longer images. All are multiples of 32, the stride of C5.

    Args:
        scales: lengths of the shorter side, in pixels.
        max_size: bound of the longer side.
    """
    longest, largest = _up(max(scales)), _up(max_size)
    sizes = {(longest, largest), (largest, longest), (largest, largest)}
    for step in range(1, 5):
        side = _up(min(scales) + (max(scales) - min(scales)) * step / 4)
        sizes |= {(side, min(largest, _up(side * aspect))) for aspect in (1.2, 1.5)}
        sizes |= {(min(largest, _up(side * 1.35)), side)}
    return sorted(sizes)


def _up(length: float) -> int:
    """Round up to a multiple of 32."""
    return math.ceil(length / 32) * 32


def smallest_holding(height: int, width: int, sizes: Sequence[Size]) -> Size:
    """Return the size of the smallest area among `sizes` that holds an image of this height and width.

    Raises:
        ValueError: the image is larger than all of `sizes`.
    """
    large_enough = [size for size in sizes if size[0] >= height and size[1] >= width]
    if not large_enough:
        raise ValueError(f"a batch needs {height}x{width} pixels but the largest of sizes is {max(sizes)}")
    return min(large_enough, key=math.prod)


def pad_images(images: Sequence[Tensor], size: Size) -> tuple[Tensor, Tensor]:
    """Pad images (3, h, w) uint8 at the right and at the bottom to one size.

    Returns:
        images (B, 3, H, W) uint8, 0 on padding, and padding_mask (B, H, W) bool, True on padding.
    """
    padded = torch.zeros(len(images), 3, *size, dtype=torch.uint8)
    padding_mask = torch.ones(len(images), *size, dtype=torch.bool)
    for b, image in enumerate(images):
        _, h, w = image.shape
        padded[b, :, :h, :w] = image
        padding_mask[b, :h, :w] = False
    return padded, padding_mask


@dataclass
class PackedTargets:
    """Targets of B images, T in all: rows offsets[b] to offsets[b + 1] belong to image b.

    labels (T,) int64; boxes (T, 4) float32, cx cy w h in 0..1 of the image without its padding; masks (T, N, N) uint8
    in the box frame; offsets (B + 1,) int64; image_ids (B,) int64; orig_sizes and sizes (B, 2) int64, height and width
    in the file and in the batch.
    """

    labels: Tensor
    boxes: Tensor
    masks: Tensor
    offsets: Tensor
    image_ids: Tensor
    orig_sizes: Tensor
    sizes: Tensor

    @classmethod
    def pack(cls, targets: Sequence[Target]) -> "PackedTargets":
        """Pack a dict per image, as a dataset gives it, into flat tensors."""
        counts = torch.tensor([0] + [len(target["labels"]) for target in targets])
        return cls(
            labels=torch.cat([target["labels"] for target in targets]),
            boxes=torch.cat([target["boxes"] for target in targets]),
            masks=torch.cat([target["masks"] for target in targets]),
            offsets=counts.cumsum(0),
            image_ids=torch.tensor([int(target["image_id"]) for target in targets]),
            orig_sizes=torch.stack([torch.as_tensor(target["orig_size"]) for target in targets]),
            sizes=torch.stack([torch.as_tensor(target["size"]) for target in targets]),
        )

    def unpack(self) -> list[Target]:
        """Return a dict per image, as `pack` took it; the tensors are views."""
        counts = self.offsets.diff().tolist()
        labels, boxes, masks = (part.split(counts) for part in (self.labels, self.boxes, self.masks))
        keys = ("labels", "boxes", "masks", "image_id", "orig_size", "size")
        per_image = zip(labels, boxes, masks, self.image_ids.tolist(), self.orig_sizes, self.sizes, strict=True)
        return [dict(zip(keys, values, strict=True)) for values in per_image]

    def image_index(self) -> Tensor:
        """Return the image (T,) int64 of each target."""
        targets = torch.arange(len(self.labels), device=self.labels.device)
        return torch.bucketize(targets, self.offsets[1:], right=True)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "PackedTargets":
        return PackedTargets(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))

    def pin_memory(self) -> "PackedTargets":
        """Copy to pinned memory."""
        return PackedTargets(*(getattr(self, f.name).pin_memory() for f in fields(self)))


@dataclass
class Batch:
    """A padded batch.

    images (B, 3, H, W) uint8; padding_mask (B, H, W) bool, True on padding; skipped: number of damaged images, which
    are left out of the batch.
    """

    images: Tensor
    padding_mask: Tensor
    targets: PackedTargets
    skipped: int = 0

    def to(self, device: torch.device | str) -> "Batch":
        """Copy to a device, without waiting for it."""
        images, padding_mask = (part.to(device, non_blocking=True) for part in (self.images, self.padding_mask))
        return Batch(images, padding_mask, self.targets.to(device), self.skipped)

    def pin_memory(self) -> "Batch":
        """Copy to pinned memory; the DataLoader calls this if its `pin_memory` is set."""
        return Batch(self.images.pin_memory(), self.padding_mask.pin_memory(), self.targets.pin_memory(), self.skipped)


def collate(samples: Sequence[tuple[Tensor, Target] | None], *, sizes: Sequence[Size]) -> Batch | None:
    """Pad images (3, h, w) to the smallest of `sizes` that holds all of them, and pack their targets.

    Samples that are None (damaged images) are left out and counted; the result is None if all are.

    Raises:
        ValueError: an image is larger than all of `sizes`.
    """
    intact = [sample for sample in samples if sample is not None]
    if not intact:
        return None
    images, targets = zip(*intact, strict=True)
    size = smallest_holding(max(image.shape[1] for image in images), max(image.shape[2] for image in images), sizes)
    return Batch(*pad_images(images, size), PackedTargets.pack(targets), skipped=len(samples) - len(intact))


def fill_up(batch: Batch | None, num_images: int, size: Size, mask_size: int) -> Batch:
    """Replace the skipped images of a batch by black images without objects.

    Every batch then has the number of images that the model is compiled for, and all processes take the same number of
    steps.

    Args:
        batch: None if all images were skipped.
        num_images: the number of images to fill the batch up to.
        size: height and width of the images, if all were skipped.
        mask_size: side N of the target masks, if all were skipped.
    """
    if batch is not None:
        size, mask_size = (batch.images.shape[2], batch.images.shape[3]), batch.targets.masks.shape[1]
    missing = num_images - (0 if batch is None else len(batch.images))
    if missing == 0 and batch is not None:
        return batch
    images, padding_mask = pad_images([torch.zeros(3, *size, dtype=torch.uint8)] * missing, size)
    no_objects = {
        "labels": torch.zeros(0, dtype=torch.int64),
        "boxes": torch.zeros(0, 4),
        "masks": torch.zeros(0, mask_size, mask_size, dtype=torch.uint8),
        "image_id": -1,
        "orig_size": size,
        "size": size,
    }
    if batch is None:
        return Batch(images, padding_mask, PackedTargets.pack([no_objects] * missing), skipped=num_images)
    targets = PackedTargets.pack([*batch.targets.unpack(), *[no_objects] * missing])
    images, padding_mask = torch.cat([batch.images, images]), torch.cat([batch.padding_mask, padding_mask])
    return Batch(images, padding_mask, targets, batch.skipped)


def normalize(images: Tensor, padding_mask: Tensor) -> Tensor:
    """Normalize images (B, 3, H, W) uint8 to float32 with ImageNet's mean and standard deviation; padding becomes 0."""
    # Numbers, not tensors: making a tensor of them here would copy it to the device, and the host would wait for that.
    statistics = zip(images.unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    channels = [(channel - 255 * mean) / (255 * std) for channel, mean, std in statistics]
    return torch.stack(channels, dim=1).masked_fill(padding_mask[:, None], 0)
