"""Target masks in predicted boxes: those that RoIAlign crops from full-image bitmaps."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from queryinst_cases import HEIGHT, SIZES, WIDTH, objects, pack
from torch import Tensor
from torchvision.ops import box_convert, roi_align

from solq.data.batch import PackedTargets
from solq.kernels.reference import crop_masks
from solq.models.queryinst.mask_targets import crop_targets

SIDE = 28


def published_crops(bitmaps: Tensor, regions: Tensor) -> Tensor:
    """Crop full-image bitmaps (R, H, W), padded as the images are, with regions clipped to them."""
    height, width = bitmaps.shape[1:]
    clipped = torch.stack([regions[:, 0::2].clamp(0, width), regions[:, 1::2].clamp(0, height)], dim=2).flatten(1)
    rows = torch.cat([torch.arange(len(bitmaps))[:, None].float(), clipped], dim=1)
    return roi_align(bitmaps[:, None].float(), rows, SIDE, sampling_ratio=-1, aligned=True)[:, 0] >= 0.5


def jittered(boxes: Tensor, seed: int = 0) -> Tensor:
    """Move and resize boxes (R, 4) x0 y0 x1 y1 as much as predictions differ from targets."""
    shift, growth = torch.randn(2, len(boxes), 2, generator=torch.Generator().manual_seed(seed))
    sides = boxes[:, 2:] - boxes[:, :2]
    center, half = (boxes[:, :2] + boxes[:, 2:]) / 2 + 0.15 * sides * shift, sides * (0.2 * growth).exp() / 2
    return torch.cat([center - half, center + half], dim=1)


def test_crops_are_those_of_full_image_bitmaps() -> None:
    found = objects((9, 7))
    targets = pack(found, 128)
    bitmaps = torch.zeros(16, HEIGHT, WIDTH)
    bitmaps[:9], bitmaps[9:, : SIZES[1][0], : SIZES[1][1]] = found[0]["bitmaps"], found[1]["bitmaps"]
    boxes, images = torch.cat([record["boxes"] for record in found]), targets.image_index()
    for seed in range(4):
        regions = jittered(boxes, seed)
        got = crop_targets(targets, torch.arange(16), images, regions, (HEIGHT, WIDTH), SIDE)
        expected = published_crops(bitmaps, regions)
        assert expected.float().mean() > 0.2
        assert (got != expected).float().mean() < 0.002


def test_rows_choose_targets_in_any_order() -> None:
    found = objects((3, 2))
    targets = pack(found)
    boxes, images = jittered(torch.cat([record["boxes"] for record in found])), targets.image_index()
    rows = torch.tensor([4, 0, 2])
    crops = crop_targets(targets, torch.arange(5), images, boxes, (HEIGHT, WIDTH), SIDE)
    assert torch.equal(crop_targets(targets, rows, images[rows], boxes[rows], (HEIGHT, WIDTH), SIDE), crops[rows])


def test_regions_without_pixels_are_empty() -> None:
    targets = pack(objects((1, 0)))
    nan = math.nan
    regions = torch.tensor(
        [[10.0, 10, 10, 50], [50, 40, 20, 10], [200, 10, 300, 20], [-9, -9, -5, -5], [nan, nan, nan, nan], [0, 0, 1, 1]]
    )
    zero = torch.zeros(len(regions), dtype=torch.int64)
    assert not crop_targets(targets, zero, zero, regions, (HEIGHT, WIDTH), SIDE).any()
    assert crop_targets(targets, zero[:0], zero[:0], regions[:0], (HEIGHT, WIDTH), SIDE).shape == (0, SIDE, SIDE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_crops_of_real_objects(coco_tiny: Path) -> None:
    """Images enlarged to a shorter side of 800, as in training, with the bitmaps that are published."""
    coco = COCO(coco_tiny / "annotations" / "instances_val2017.json")
    differences = []
    for image_id in sorted(coco.imgs)[:16]:
        info = coco.imgs[image_id]
        annotations = [coco.anns[k] for k in coco.getAnnIds(image_id) if not coco.anns[k]["iscrowd"]]
        height, width = info["height"], info["width"]
        scale = 800 / min(height, width)
        H, W = int(height * scale + 0.5), int(width * scale + 0.5)
        boxes = box_convert(torch.tensor([a["bbox"] for a in annotations]).view(-1, 4), "xywh", "xyxy")
        keep = (boxes[:, 2:] - boxes[:, :2] >= 2).all(1)
        boxes, annotations = boxes[keep], [a for a, kept in zip(annotations, keep, strict=True) if kept]
        if not annotations:
            continue
        bitmaps = torch.from_numpy(np.stack([coco.annToMask(a) for a in annotations]))
        size = torch.tensor([width, height] * 2)
        targets = PackedTargets(
            labels=torch.zeros(len(boxes), dtype=torch.int64),
            boxes=box_convert(boxes / size, "xyxy", "cxcywh"),
            masks=crop_masks(bitmaps, boxes, 256).to(torch.uint8),
            offsets=torch.tensor([0, len(boxes)]),
            image_ids=torch.tensor([image_id]),
            orig_sizes=torch.tensor([[height, width]]),
            sizes=torch.tensor([[H, W]]),
        )
        y, x = (torch.arange(H) * (height / H)).long(), (torch.arange(W) * (width / W)).long()  # nearest
        regions = jittered(boxes * torch.tensor([W / width, H / height] * 2), image_id)
        got = crop_targets(targets, torch.arange(len(boxes)), targets.image_index(), regions, (H, W), SIDE)
        expected = published_crops(bitmaps[:, y][:, :, x], regions)
        differences.append((got != expected).float().mean((1, 2)))
    assert torch.cat(differences).mean() < 0.002
