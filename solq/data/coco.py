"""Datasets in COCO's format: an annotation file and a folder of images to samples of image and targets."""

import gc
import json
import logging
import math
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.utils.data import Dataset

from solq.data.image import read_image
from solq.data.sampler import Key
from solq.data.transforms import (
    EvalTransform,
    TrainTransform,
    clip_boxes,
    crop_rle,
    rasterize_polygons,
    view_boxes,
    view_image,
)

logger = logging.getLogger(__name__)


class CocoDataset(Dataset):
    """Images of a folder and their instances from an annotation file.

    `dataset[i]`, or `dataset[(i, seed)]` with a key of :class:`solq.data.sampler.TrainSampler`, is an image (3, H, W)
    uint8 and a dict of `labels` (n,) int64, `boxes` (n, 4) float32 cx cy w h in 0..1, `masks` (n, N, N) uint8 in the
    box frame, `image_id` int, `orig_size` and `size` (2,) int64: height and width in the file and here. The random
    choices of a sample depend on its key only, so neither the number of workers nor the order of reading changes them.

    An image that cannot be read is reported and gives None, or a ValueError if `strict`.

    Crowd regions are no targets; evaluation reads them from the annotation file itself. Images without annotations are
    samples without targets.

    The instances lie in a few flat arrays, not in Python objects: worker processes share their memory, because no
    reference count is written when one is read.

    Args:
        images: folder of the images.
        annotations: JSON file, "instances" of COCO's format: polygons, compressed or uncompressed RLE.
        transform: chooses what is seen of an image.
        mask_size: N.
        train: the images are to be learned from, so that a file without a single usable instance is an error.
        strict: a damaged image is an error.

    Attributes:
        class_names: name of each label; empty for a label that no category has.
        num_classes: number of labels, the outputs a model needs.
        category_ids: COCO category id of each label.
        image_ids: (I,) int64.
        image_sizes: (I, 2) int64 height, width.
        dropped: number of annotations left out, by reason.
        coco_json: the annotation file.

    Raises:
        FileNotFoundError: the annotation file, the folder or an image is missing.
        ValueError: the file is not COCO JSON, has no images, or refers to an image or category that it does not have.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path,
        transform: TrainTransform | EvalTransform,
        *,
        mask_size: int = 128,
        train: bool,
        strict: bool = False,
    ) -> None:
        self.images = Path(images)
        self.coco_json = Path(annotations)
        self.transform = transform
        self.mask_size = mask_size
        self.strict = strict
        with _no_garbage_collection():
            content = _read_json(self.coco_json)
            self.category_ids, self.class_names = labels_of_categories(
                {category["id"]: category["name"] for category in content["categories"]}
            )
            self.num_classes = len(self.category_ids)
            self._read_images(content["images"])
            self._read_annotations(content["annotations"])
        if train and len(self._labels) == 0:
            raise ValueError(f"{self.coco_json} has no instance to learn from: annotations is empty or unusable")

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: int | Key) -> tuple[Tensor, dict[str, Any]] | None:
        index, batch_seed = key if isinstance(key, tuple) else (key, 0)
        height, width = self.image_sizes[index].tolist()
        path = self.images / self._file_names[index].decode()
        try:
            image = read_image(path, (height, width))
        except Exception as error:  # Pillow's readers raise anything
            reason = (str(error) or repr(error)).splitlines()[0]
            message = f"{path} cannot be used: {reason}; restore the file or remove it from {self.coco_json.name}"
            if self.strict:
                raise ValueError(message) from error
            logger.warning("%s (skipped)", message)
            return None
        view = self.transform(
            (height, width), np.random.default_rng(batch_seed), np.random.default_rng((batch_seed, index))
        )
        instances = np.arange(self._image_offsets[index], self._image_offsets[index + 1])
        boxes, remain = clip_boxes(self._boxes[instances], view)
        instances, boxes = instances[remain], boxes[remain]
        masks = self._crop_masks(instances, boxes, (height, width), view.flip)
        remain = np.any(masks, axis=(1, 2))  # of an instance that reaches into a crop by its box only, nothing is seen
        target = {
            "labels": torch.from_numpy(self._labels[instances[remain]].astype(np.int64)),
            "boxes": torch.from_numpy(view_boxes(boxes[remain], view)),
            "masks": torch.from_numpy(masks[remain].view(np.uint8)),
            "image_id": int(self.image_ids[index]),
            "orig_size": torch.tensor([height, width]),
            "size": torch.tensor(view.size),
        }
        return view_image(image, view), target

    def _crop_masks(
        self, instances: NDArray[np.int64], boxes: NDArray[np.float32], image_size: tuple[int, int], flip: bool
    ) -> NDArray[np.bool_]:
        """Masks (n, N, N) of instances in the frames of their clipped boxes (n, 4)."""
        if len(instances) == 0:
            return np.zeros((0, self.mask_size, self.mask_size), dtype=bool)
        # The polygons of an image lie together in the arrays, only those of dropped instances have to be left out.
        first, end = self._polygon_offsets[instances], self._polygon_offsets[instances + 1]
        polygons = np.concatenate([np.arange(a, b) for a, b in zip(first, end, strict=True)])
        lengths = self._point_offsets[polygons + 1] - self._point_offsets[polygons]
        vertices = np.repeat(self._point_offsets[polygons] - (np.cumsum(lengths) - lengths), lengths)
        points = self._points[vertices + np.arange(len(vertices))]
        owners = np.repeat(np.arange(len(instances)), end - first)
        masks = rasterize_polygons(points, lengths, owners, boxes, flip, self.mask_size)
        for k in np.flatnonzero(first == end):
            a, b = self._rle_offsets[instances[k] : instances[k] + 2]
            masks[k] = crop_rle(self._rles[a:b].tobytes(), image_size, boxes[k], flip, self.mask_size)
        return masks

    def _read_images(self, images: list[dict[str, Any]]) -> None:
        if not images:
            raise ValueError(f"{self.coco_json} has no images: choose another file or split")
        if not self.images.is_dir():
            raise FileNotFoundError(f"{self.images} is not a folder: it should hold the images of {self.coco_json}")
        self.image_ids = np.array([image["id"] for image in images], np.int64)
        self.image_sizes = np.array([(image["height"], image["width"]) for image in images], np.int64)
        if self.image_sizes.min() < 1:
            raise ValueError(f"{self.coco_json} has images without height or width: write their sizes in pixels")
        if len(np.unique(self.image_ids)) < len(images):
            raise ValueError(f"{self.coco_json} gives several images the same id: give each its own")
        names = [str(image["file_name"]) for image in images]
        present = {entry.name for entry in os.scandir(self.images)}  # one look at the folder instead of one per image
        missing = [name for name in names if name not in present and not (self.images / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(images)} images of {self.coco_json} are missing, the first is "
                f"{self.images / missing[0]}: complete the folder or remove them from the file"
            )
        self._file_names = np.array([name.encode() for name in names])

    def _read_annotations(self, annotations: list[dict[str, Any]]) -> None:
        """Fill the flat arrays: instances sorted by image, their polygons, the vertices of those, and RLEs."""
        index_of_image = {image_id: index for index, image_id in enumerate(self.image_ids.tolist())}
        label_of_category = {category: label for label, category in enumerate(self.category_ids)}
        sizes = self.image_sizes.tolist()
        dropped: dict[str, list[Any]] = {}
        kept: list[tuple[int, dict[str, Any], list[Sequence[float]] | bytes]] = []
        for annotation in annotations:
            image = index_of_image.get(annotation["image_id"])
            if image is None:
                raise ValueError(
                    f"{self.coco_json}: annotation {annotation['id']} is of image {annotation['image_id']}, "
                    "which is not among images: add the image or remove the annotation"
                )
            if annotation["category_id"] not in label_of_category:
                raise ValueError(
                    f"{self.coco_json}: annotation {annotation['id']} is of category {annotation['category_id']}, "
                    "which is not among categories: add the category or remove the annotation"
                )
            if annotation.get("iscrowd", 0):
                continue
            try:
                check_box(annotation.get("bbox"), *sizes[image])
                kept.append((image, annotation, read_segmentation(annotation.get("segmentation"), *sizes[image])))
            except ValueError as error:
                dropped.setdefault(str(error), []).append(annotation["id"])
        self.dropped = Counter({reason: len(ids) for reason, ids in dropped.items()})
        for reason, ids in dropped.items():
            named = ", ".join(str(i) for i in ids[:3]) + (", …" if len(ids) > 3 else "")
            logger.warning("%s: %d annotations left out: %s (ids %s)", self.coco_json, len(ids), reason, named)

        kept.sort(key=lambda entry: entry[0])
        points, rles = array("f"), bytearray()
        point_offsets, polygon_offsets, rle_offsets = array("q", [0]), array("q", [0]), array("q", [0])
        for _, _, segmentation in kept:
            if isinstance(segmentation, bytes):
                rles += segmentation
            else:
                for polygon in segmentation:
                    points.extend(polygon)
                    point_offsets.append(len(points) // 2)
            polygon_offsets.append(len(point_offsets) - 1)
            rle_offsets.append(len(rles))
        per_image = np.bincount([image for image, _, _ in kept], minlength=len(self)) if kept else np.zeros(len(self))
        self._image_offsets = np.concatenate([[0], np.cumsum(per_image)]).astype(np.int64)
        self._labels = np.array([label_of_category[entry["category_id"]] for _, entry, _ in kept], np.int32)
        boxes = np.array([entry["bbox"] for _, entry, _ in kept], np.float32).reshape(-1, 4)
        self._boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        self._polygon_offsets = np.frombuffer(polygon_offsets, np.int64)
        self._point_offsets = np.frombuffer(point_offsets, np.int64)
        self._points = np.frombuffer(points, np.float32).reshape(-1, 2)
        self._rle_offsets = np.frombuffer(rle_offsets, np.int64)
        self._rles = np.frombuffer(rles, np.uint8)


def labels_of_categories(names: dict[int, str]) -> tuple[list[int], list[str]]:
    """Category id and name of each label, from the names of the categories by their ids.

    COCO's 80 ids reach to 90 and are themselves the labels, as the published model has it with its 91 outputs; the
    labels that are no id stay unused. So it is done with all ids that leave few labels unused: none is negative and the
    largest is at most twice the number of categories. Others are numbered in rising order.
    """
    few_unused = min(names) >= 0 and max(names) <= 2 * len(names)
    ids = list(range(max(names) + 1)) if few_unused else sorted(names)
    return ids, [names.get(i, "") for i in ids]


def check_box(box: Any, height: int, width: int) -> None:
    """Raise a ValueError that says why a COCO box (x, y, w, h) cannot be used in an image of `height`, `width`."""
    if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)):
        raise ValueError("bbox is not four numbers")
    x, y, w, h = box
    if not math.isfinite(x + y + w + h):
        raise ValueError("bbox is not finite")
    if w <= 0 or h <= 0:
        raise ValueError("bbox has no area")
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        raise ValueError("bbox lies outside the image")


def read_segmentation(segmentation: Any, height: int, width: int) -> list[Sequence[float]] | bytes:
    """Polygons as they are or the counts of a compressed RLE; a ValueError says why it can be neither."""
    if isinstance(segmentation, dict):
        if segmentation.get("size") != [height, width]:
            raise ValueError("the RLE's size is not the image's")
        counts = segmentation.get("counts")
        if isinstance(counts, str):
            if not _covers(counts.encode(), height * width):
                raise ValueError("the RLE's counts do not sum to the image's pixels")
            return counts.encode()
        if isinstance(counts, list) and all(isinstance(count, int) and count >= 0 for count in counts):
            if sum(counts) != height * width:
                raise ValueError("the RLE's counts do not sum to the image's pixels")
            return coco_mask.frPyObjects(segmentation, height, width)["counts"]
        raise ValueError("the RLE's counts are neither text nor numbers")
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("it has no segmentation")
    if not all(isinstance(polygon, list) and len(polygon) % 2 == 0 for polygon in segmentation):
        raise ValueError("a polygon is not a list of x, y pairs")
    polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
    if not polygons:
        raise ValueError("its polygons have fewer than 3 points")
    try:
        if not all(math.isfinite(sum(polygon)) for polygon in polygons):
            raise ValueError("a polygon is not finite")
    except TypeError as error:
        raise ValueError("a polygon is not a list of numbers") from error
    return polygons


def _covers(counts: bytes, num_pixels: int) -> bool:
    """Whether a compressed RLE has run lengths that sum to `num_pixels`; pycocotools reads others as noise.

    A run length is written in characters of 5 bits, low bits first, with a sixth bit on all but the last; from the
    fourth on it is the difference to the length two before.
    """
    bits = np.frombuffer(counts, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(bits & 32 == 0)
    if len(ends) == 0 or ends[-1] != len(bits) - 1 or bits.min() < 0 or bits.max() > 63:
        return False
    starts = np.concatenate([[0], ends[:-1] + 1])
    num_characters = ends - starts + 1
    if num_characters.max() > 12:  # more than 60 bits
        return False
    shifts = 5 * (np.arange(len(bits)) - np.repeat(starts, num_characters))
    lengths = np.add.reduceat((bits & 31) << shifts, starts)
    lengths -= ((bits[ends] & 16) != 0).astype(np.int64) << (5 * num_characters)  # two's complement
    lengths[1::2] = np.cumsum(lengths[1::2])
    lengths[2::2] = np.cumsum(lengths[2::2])
    return bool(lengths.min() >= 0 and lengths.sum() == num_pixels)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """COCO's file makes tens of millions of objects, none of them garbage; to look for some doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read_json(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The content of an annotation file, with the keys and entries that every COCO file has."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: it should hold COCO annotations") from error
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download or export it again") from error
    required: dict[str, dict[str, type]] = {
        "images": {"id": int, "file_name": str, "height": int, "width": int},
        "annotations": {"id": int, "image_id": int, "category_id": int},
        "categories": {"id": int, "name": str},
    }
    for key, entries in required.items():
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise ValueError(f"{path} is not in COCO's format: it has no list '{key}'")
        for row in rows:
            for entry, kind in entries.items():
                if not isinstance(row, dict) or entry not in row:
                    raise ValueError(f"{path} is not in COCO's format: an entry of '{key}' has no '{entry}'")
                if not isinstance(row[entry], kind):
                    given = f"'{entry}': {row[entry]!r}, which is not {'a number' if kind is int else 'text'}"
                    raise ValueError(f"{path} is not in COCO's format: an entry of '{key}' has {given}")
    if not content["categories"]:
        raise ValueError(f"{path} has no categories: choose another file")
    return content
