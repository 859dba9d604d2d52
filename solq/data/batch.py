"""Samples to batches: images padded to one of few sizes, targets of all images packed in flat tensors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

Size = tuple[int, int]  # height, width
Target = dict[str, Any]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def padded_sizes(scales: Sequence[int], max_size: int) -> list[Size]:
    """The few sizes (height, width) that batches of images of these scales are padded to, at most 15.

    A model is compiled for each of them. Four steps of the shorter side, each wide as a crop and as a photograph, or
    high as a portrait; the largest three hold what is longer. All are multiples of 32, the stride of C5.
    """
    shortest, longest, largest = min(scales), _up(max(scales)), _up(max_size)
    sizes = {(longest, largest), (largest, longest), (largest, largest)}
    for step in range(1, 5):
        side = _up(shortest + (max(scales) - shortest) * step / 4)
        sizes |= {(side, min(largest, _up(side * aspect))) for aspect in (1.2, 1.5)}
        sizes |= {(min(largest, _up(side * 1.35)), side)}
    return sorted(sizes)


def _up(length: float) -> int:
    return math.ceil(length / 32) * 32


@dataclass
class PackedTargets:
    """Targets of B images, T in all: those of image b are offsets[b] … offsets[b + 1].

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
        """One dict per image, as `pack` took them; the tensors are views."""
        counts = self.offsets.diff().tolist()
        per_image = zip(
            self.labels.split(counts),
            self.boxes.split(counts),
            self.masks.split(counts),
            self.image_ids.tolist(),
            self.orig_sizes,
            self.sizes,
            strict=True,
        )
        keys = ("labels", "boxes", "masks", "image_id", "orig_size", "size")
        return [dict(zip(keys, values, strict=True)) for values in per_image]

    def image_index(self) -> Tensor:
        """Return the image (T,) int64 of each target."""
        targets = torch.arange(len(self.labels), device=self.labels.device)
        return torch.bucketize(targets, self.offsets[1:], right=True)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PackedTargets":
        return PackedTargets(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))

    def pin_memory(self) -> "PackedTargets":
        return PackedTargets(*(getattr(self, f.name).pin_memory() for f in fields(self)))


@dataclass
class Batch:
    """images (B, 3, H, W) uint8; padding_mask (B, H, W) bool, True on padding; `skipped`: images that were damaged."""

    images: Tensor
    padding_mask: Tensor
    targets: PackedTargets
    skipped: int = 0

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        return Batch(
            self.images.to(device, non_blocking=non_blocking),
            self.padding_mask.to(device, non_blocking=non_blocking),
            self.targets.to(device, non_blocking=non_blocking),
            self.skipped,
        )

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader if its `pin_memory` is set."""
        return Batch(self.images.pin_memory(), self.padding_mask.pin_memory(), self.targets.pin_memory(), self.skipped)


def collate(samples: Sequence[tuple[Tensor, Target] | None], *, sizes: Sequence[Size]) -> Batch | None:
    """Pad images (3, h, w) to the smallest of `sizes` that holds all of them, and pack their targets.

    Samples that are None (damaged images) are left out and counted; the result is None if no other is there.

    Raises:
        ValueError: an image is larger than all of `sizes`.
    """
    intact = [sample for sample in samples if sample is not None]
    if not intact:
        return None
    height = max(image.shape[1] for image, _ in intact)
    width = max(image.shape[2] for image, _ in intact)
    fitting = [size for size in sizes if size[0] >= height and size[1] >= width]
    if not fitting:
        raise ValueError(f"a batch needs {height}x{width} pixels but the largest of sizes is {max(sizes)}")
    H, W = min(fitting, key=lambda size: size[0] * size[1])
    images = torch.zeros(len(intact), 3, H, W, dtype=torch.uint8)
    padding_mask = torch.ones(len(intact), H, W, dtype=torch.bool)
    for b, (image, _) in enumerate(intact):
        _, h, w = image.shape
        images[b, :, :h, :w] = image
        padding_mask[b, :h, :w] = False
    targets = PackedTargets.pack([target for _, target in intact])
    return Batch(images, padding_mask, targets, skipped=len(samples) - len(intact))


def fill_up(batch: Batch | None, num_images: int, size: Size, mask_size: int) -> Batch:
    """The batch with black images without objects for those that were skipped; of this size if all of them were.

    So every batch has the same number of images, for which the model is compiled, and no process has a step less.
    """
    if batch is None:
        targets = PackedTargets(
            labels=torch.zeros(0, dtype=torch.int64),
            boxes=torch.zeros(0, 4),
            masks=torch.zeros(0, mask_size, mask_size, dtype=torch.uint8),
            offsets=torch.zeros(1, dtype=torch.int64),
            image_ids=torch.zeros(0, dtype=torch.int64),
            orig_sizes=torch.zeros(0, 2, dtype=torch.int64),
            sizes=torch.zeros(0, 2, dtype=torch.int64),
        )
        images = torch.zeros(0, 3, *size, dtype=torch.uint8)
        batch = Batch(images, torch.zeros(0, *size, dtype=torch.bool), targets, skipped=num_images)
    missing = num_images - len(batch.images)
    if missing == 0:
        return batch
    targets = batch.targets
    sizes = torch.tensor([batch.images.shape[-2:]]).expand(missing, 2)
    return Batch(
        torch.cat([batch.images, batch.images.new_zeros(missing, *batch.images.shape[1:])]),
        torch.cat([batch.padding_mask, batch.padding_mask.new_zeros(missing, *batch.padding_mask.shape[1:])]),
        replace(
            targets,
            offsets=torch.cat([targets.offsets, targets.offsets[-1:].expand(missing)]),
            image_ids=torch.cat([targets.image_ids, torch.full((missing,), -1)]),
            orig_sizes=torch.cat([targets.orig_sizes, sizes]),
            sizes=torch.cat([targets.sizes, sizes]),
        ),
        batch.skipped,
    )


def normalize(images: Tensor, padding_mask: Tensor) -> Tensor:
    """Images (B, 3, H, W) uint8 as float32 less ImageNet's mean, over its deviation; 0 on padding, as in DETR."""
    # Numbers instead of tensors: a tensor made from them here would be a copy to the device that the host waits for.
    channels = [
        (images[:, channel] - 255 * mean) / (255 * std)
        for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
    ]
    return torch.stack(channels, dim=1).masked_fill(padding_mask[:, None], 0)
