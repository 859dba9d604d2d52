"""A tiny QueryInst, a batch for it and weights that follow from the published names alone."""

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from solq.data.batch import PackedTargets
from solq.kernels.reference import crop_masks
from solq.models.queryinst.config import QueryInstConfig
from solq.models.queryinst.model import QueryInst
from solq.models.queryinst.official import official_names
from solq.training.criterion import SetCriterion
from solq.training.matcher import HungarianMatcher

SETTINGS: dict[str, Any] = {
    "backbone": "resnet10",
    "backbone_norm": "group",
    "num_classes": 5,
    "num_queries": 12,
    "num_stages": 2,
    "width": 32,
    "num_heads": 4,
    "feedforward": 64,
    "dynamic_width": 8,
    "mask_convs": 2,
    "mask_size": 64,
}
HEIGHT, WIDTH = 96, 128
SIZES = [(96, 128), (80, 96)]  # the second image is padded


def build(**changes: Any) -> QueryInst:
    """Build the model with queries and boxes that differ from each other, as after some training."""
    torch.manual_seed(0)
    model = QueryInst(QueryInstConfig(**(SETTINGS | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone"):
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.proposal_boxes.weight.uniform_(0.2, 0.6)
    return model


def images() -> tuple[Tensor, Tensor]:
    """Return two normalized images and their padding mask."""
    batch = torch.randn(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
    padding_mask = torch.ones(2, HEIGHT, WIDTH, dtype=torch.bool)
    for image, (height, width) in enumerate(SIZES):
        padding_mask[image, :height, :width] = False
    return batch.masked_fill(padding_mask[:, None], 0), padding_mask


def ellipses(count: int, size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Draw ellipses in an image of this size: masks (count, H, W) uint8, boxes (count, 4) x0 y0 x1 y1 in pixels."""
    draw = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))
    center, radius = (0.25 + 0.5 * draw[:, :2]), (0.08 + 0.17 * draw[:, 2:])
    extent = torch.tensor([size[1], size[0]])
    center, radius = (center * extent)[..., None, None], (radius * extent)[..., None, None]
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    masks = ((x - center[:, 0]) / radius[:, 0]) ** 2 + ((y - center[:, 1]) / radius[:, 1]) ** 2 <= 1
    boxes = torch.cat([center - radius, center + radius], dim=1)[..., 0, 0]
    return masks.to(torch.uint8), boxes


def objects(counts: Sequence[int] = (3, 2), num_classes: int = 5) -> list[dict[str, Tensor]]:
    """Return the labels, the boxes in pixels and the full-image bitmaps of ellipses in each image."""
    found = []
    for image, (count, size) in enumerate(zip(counts, SIZES, strict=True)):
        masks, boxes = ellipses(count, size, seed=10 + image)
        labels = torch.randint(num_classes, (count,), generator=torch.Generator().manual_seed(20 + image))
        found.append({"labels": labels, "boxes": boxes, "bitmaps": masks})
    return found


def pack(found: Sequence[dict[str, Tensor]], mask_size: int = 64) -> PackedTargets:
    """Pack objects as the targets of a batch, their masks in the frames of their boxes."""
    targets = []
    for image, (record, (height, width)) in enumerate(zip(found, SIZES, strict=True)):
        x0, y0, x1, y1 = (record["boxes"] / torch.tensor([width, height] * 2)).unbind(1)
        targets.append(
            {
                "labels": record["labels"],
                "boxes": torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=1),
                "masks": crop_masks(record["bitmaps"], record["boxes"], mask_size).to(torch.uint8),
                "image_id": image,
                "orig_size": torch.tensor([height, width]),
                "size": torch.tensor([height, width]),
            }
        )
    return PackedTargets.pack(targets)


def criterion_of(model: QueryInst) -> SetCriterion:
    return SetCriterion(HungarianMatcher(**model.matcher_settings), model)


def step(network: nn.Module, model: QueryInst, targets: PackedTargets) -> dict[str, Tensor]:
    """Compute the losses and gradients of a training step."""
    model.zero_grad()
    criterion = criterion_of(model)
    losses = criterion(network(*images()), targets)
    criterion.total(losses).backward()
    return losses


def fill(key: str, shape: Sequence[int]) -> Tensor:
    """Make the tensor of a published name from random numbers that follow from the name."""
    numbers = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if key.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.int64)
    if key.endswith("running_var"):
        return 1 + 0.1 * numbers.abs()
    if key.endswith("init_proposal_bboxes.weight"):
        return numbers.sigmoid()
    if key.endswith("init_proposal_features.weight"):
        return numbers
    if numbers.dim() == 1:
        return 1 + 0.05 * numbers if key.endswith(".weight") else 0.05 * numbers
    return numbers / numbers[0].numel() ** 0.5


def build_filled() -> QueryInst:
    """Build the model of `test_published`, filled by the published names of its tensors."""
    published = SETTINGS | {"backbone": "resnet18", "backbone_norm": "running", "mask_convs": 4, "mask_size": 128}
    model = QueryInst(QueryInstConfig(**published))
    state = model.state_dict()
    model.load_state_dict({key: fill(official_names(key, model.config)[0], state[key].shape) for key in state})
    return model
