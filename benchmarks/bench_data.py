"""Images per second of training data with one worker process: COCO images and annotations to padded batches.

Contenders: this project; the usual way: every mask decoded at the image's size, image, boxes and masks transformed by
torchvision v2 (mirroring, then a resize, or a resize, a crop and a resize), masks cropped by their boxes with RoIAlign
to 128×128, images and masks collated. Both draw the same augmentation, share the scale within a batch, and pad alike.

`SOLQ_COCO_TINY` names a folder in COCO's layout. `extra_info` has the images per second.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional as F

from solq.data.batch import collate, padded_sizes
from solq.data.coco import CocoDataset
from solq.data.sampler import Key, TrainSampler
from solq.data.transforms import TrainTransform, resized

FOLDER = Path(
    os.environ.get("SOLQ_COCO_TINY", Path(__file__).parent.parent.parent / "shared" / "data" / "coco-tiny")
).resolve()
BATCH_SIZE, STEPS, WARMUP_STEPS = 4, 20, 2
TRANSFORM = TrainTransform()


class UsualDataset(Dataset):
    """Full masks through torchvision v2; `decoder` is "pillow", which torchvision's datasets use, or "torchvision"."""

    def __init__(self, images: Path, annotations: Path, decoder: str) -> None:
        self.images, self.decoder = images, decoder
        self.coco = COCO(str(annotations))
        self.ids = list(self.coco.imgs)

    def __getitem__(self, key: Key) -> tuple[Tensor, dict[str, Any]]:
        index, seed = key
        info = self.coco.imgs[self.ids[index]]
        H, W = info["height"], info["width"]
        path = self.images / info["file_name"]
        if self.decoder == "pillow":
            image = F.pil_to_tensor(Image.open(path).convert("RGB"))
        else:
            image = decode_image(str(path), mode=ImageReadMode.RGB)
        annotations = [a for a in self.coco.loadAnns(self.coco.getAnnIds(info["id"])) if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = torch.zeros(len(annotations), H, W, dtype=torch.uint8)
        for mask, annotation in zip(masks, annotations, strict=True):
            mask[:] = torch.from_numpy(self.coco.annToMask(annotation))
        labels = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
        data = (
            tv_tensors.Image(image),
            tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(H, W)),
            tv_tensors.Mask(masks),
        )
        data, labels = self.augment(data, labels, np.random.default_rng(seed), np.random.default_rng((seed, index)))
        image, boxes, masks = data
        h, w = image.shape[-2:]
        numbered = torch.cat([torch.arange(len(boxes))[:, None], boxes], dim=1)
        cropped = roi_align(masks[:, None].float(), numbered.float(), (128, 128), aligned=True)[:, 0] >= 0.5
        corners = boxes.as_subclass(Tensor) / torch.tensor([w, h, w, h])
        center, extent = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
        target = {
            "labels": labels,
            "boxes": torch.cat([center, extent], dim=1),
            "masks": cropped.to(torch.uint8),
            "image_id": info["id"],
            "orig_size": torch.tensor([H, W]),
            "size": torch.tensor([h, w]),
        }
        return image.as_subclass(Tensor), target

    @staticmethod
    def augment(data: tuple, labels: Tensor, batch_rng: np.random.Generator, rng: np.random.Generator) -> tuple:
        """The steps that `TrainTransform` composes, one after the other, from the same random numbers."""
        cropped = batch_rng.random() < 0.5
        scale = int(batch_rng.choice(TRANSFORM.scales))
        crop_scale = int(batch_rng.choice(TRANSFORM.crop_scales))
        fractions = batch_rng.random(2)
        flip = rng.random() < 0.5
        place = rng.random(2)
        if flip:
            data = tuple(map(F.horizontal_flip, data))
            place[1] = 1 - place[1]  # a view's window is that of the image before it is mirrored
        if cropped:
            shown = resized(tuple(data[0].shape[-2:]), crop_scale)
            data = tuple(F.resize(item, list(shown)) for item in data)
            low, high = TRANSFORM.crop_range
            h, w = (
                min(low, extent) + int(fraction * (min(high, extent) - min(low, extent) + 1))
                for extent, fraction in zip(shown, fractions, strict=True)
            )
            top, left = (int(p * (extent - side + 1)) for p, extent, side in zip(place, shown, (h, w), strict=True))
            data = tuple(F.crop(item, top, left, h, w) for item in data)
            image, boxes, masks = data
            boxes = F.clamp_bounding_boxes(boxes)
            remain = (boxes[:, 2:] > boxes[:, :2]).all(1)
            data = (image, tv_tensors.wrap(boxes[remain], like=boxes), tv_tensors.wrap(masks[remain], like=masks))
            labels = labels[remain]
        size = resized(tuple(data[0].shape[-2:]), scale, TRANSFORM.max_size)
        return tuple(F.resize(item, list(size)) for item in data), labels


def open_dataset(contender: str) -> Dataset:
    images, annotations = FOLDER / "train2017", FOLDER / "annotations" / "instances_train2017.json"
    if contender == "solq":
        return CocoDataset(images, annotations, TRANSFORM, train=True)
    return UsualDataset(images, annotations, contender.removeprefix("usual-"))


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no real images: {FOLDER} is not there (set SOLQ_COCO_TINY)")
@pytest.mark.benchmark(group="data")
@pytest.mark.parametrize("contender", ["solq", "usual-torchvision", "usual-pillow"])
def test_images_per_second(benchmark: Any, contender: str) -> None:
    dataset = open_dataset(contender)
    groups = open_dataset("solq").image_sizes
    sampler = TrainSampler(len(groups), BATCH_SIZE, groups=groups[:, 0] > groups[:, 1])
    sizes = padded_sizes(TRANSFORM.scales, TRANSFORM.max_size)

    def start() -> tuple[tuple, dict]:
        loader = DataLoader(
            dataset, batch_sampler=sampler, num_workers=1, prefetch_factor=1, collate_fn=partial(collate, sizes=sizes)
        )
        batches = iter(loader)
        for _ in range(WARMUP_STEPS):  # the worker's start is not measured
            next(batches)
        return (batches,), {}

    def run(batches: Any) -> None:
        for _ in range(STEPS):
            next(batches)

    benchmark.pedantic(run, setup=start, rounds=5)
    benchmark.extra_info["images_per_second"] = round(BATCH_SIZE * STEPS / benchmark.stats.stats.median, 1)
