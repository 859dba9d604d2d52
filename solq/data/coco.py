"""Datasets in COCO's format: an annotation file and a folder of images, read as samples of an image and its targets."""

import logging
import os
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from solq.data.annotations import check_box, labels_of_categories, no_garbage_collection, read_coco, read_segmentation
from solq.data.image import read_annotated_image
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
from solq.errors import first_line

logger = logging.getLogger(__name__)


class CocoDataset(Dataset):
    """Read the images of a folder and their instances from an annotation file.

    `dataset[i]`, or `dataset[(i, seed)]` with a key of :class:`solq.data.sampler.TrainSampler`, is an image (3, H, W)
    uint8 and a dict of `labels` (n,) int64, `boxes` (n, 4) float32 cx cy w h in 0..1, `masks` (n, N, N) uint8 in the
    box frame, `image_id` int, `orig_size` and `size` (2,) int64: height and width in the file and here. The random
    choices of a sample depend on its key only, so neither the number of workers nor the order of reading changes them.

    An image that cannot be read is logged and gives None, or a ValueError if `strict`.

    Crowd regions are no targets; evaluation reads them from the annotation file itself. Images without annotations are
    samples without targets.

    The instances lie in a few flat arrays, not in Python objects, so that worker processes share their memory: reading
    a Python object writes its reference count, which copies the memory page.

    Args:
        images: folder of the images.
        annotations: JSON file, "instances" of COCO's format: polygons, compressed or uncompressed RLE.
        transform: chooses what is seen of an image.
        mask_size: N.
        train: the dataset is for training, where a file without a single usable instance is an error.
        strict: a damaged image is an error.
        dense_labels: number the categories in rising order even where their ids could be the labels.

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
        ValueError: the annotation file is refused by :func:`solq.data.annotations.read_coco`.
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
        dense_labels: bool = False,
    ) -> None:
        self.images = Path(images)
        self.coco_json = Path(annotations)
        self.transform = transform
        self.mask_size = mask_size
        self.strict = strict
        with no_garbage_collection():
            content = read_coco(self.coco_json)
            self.category_ids, self.class_names = labels_of_categories(
                {category["id"]: category["name"] for category in content["categories"]}, dense_labels
            )
            self.num_classes = len(self.category_ids)
            self._read_images(content["images"])
            self._read_annotations(content["annotations"])
        if train and len(self._labels) == 0:
            raise ValueError(f"{self.coco_json} has no instance to learn from: annotations is empty or unusable")

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def num_instances(self) -> int:
        """Number of usable instances in all images."""
        return len(self._labels)

    def __getitem__(self, key: int | Key) -> tuple[Tensor, dict[str, Any]] | None:
        index, batch_seed = key if isinstance(key, tuple) else (key, 0)
        height, width = self.image_sizes[index].tolist()
        path = self.images / self._file_names[index].decode()
        try:
            image = read_annotated_image(path, (height, width))
        except Exception as error:  # Pillow's readers raise anything
            advice = f"restore the file or remove it from {self.coco_json.name}"
            message = f"{path} cannot be used: {first_line(error)}; {advice}"
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
        remain = np.any(masks, axis=(1, 2))  # drop instances whose box, but no pixel, lies in the crop
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
        """Rasterize the masks (n, N, N) of instances in the frames of their clipped boxes (n, 4)."""
        if len(instances) == 0:
            return np.zeros((0, self.mask_size, self.mask_size), dtype=bool)
        # The polygons of an image lie next to each other in the arrays; those of dropped instances are left out.
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
        """Note ids, sizes and file names of the images, all of whose files must be there."""
        if not self.images.is_dir():
            raise FileNotFoundError(f"{self.images} is not a folder: it should hold the images of {self.coco_json}")
        self.image_ids = np.array([image["id"] for image in images], np.int64)
        self.image_sizes = np.array([(image["height"], image["width"]) for image in images], np.int64)
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
        """Fill the flat arrays: instances sorted by image, their polygons, the vertices of these, and RLEs."""
        index_of_image = {image_id: index for index, image_id in enumerate(self.image_ids.tolist())}
        label_of_category = {category: label for label, category in enumerate(self.category_ids)}
        sizes = self.image_sizes.tolist()
        dropped: dict[str, list[Any]] = {}
        kept: list[tuple[int, dict[str, Any], list[Sequence[float]] | bytes]] = []
        for annotation in annotations:
            image = index_of_image[annotation["image_id"]]
            if annotation.get("iscrowd", 0):
                continue
            try:
                check_box(annotation.get("bbox"), *sizes[image])
                kept.append((image, annotation, read_segmentation(annotation.get("segmentation"), *sizes[image])))
            except ValueError as error:
                dropped.setdefault(str(error), []).append(annotation.get("id"))
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
        per_image = np.bincount(np.array([image for image, _, _ in kept], np.int64), minlength=len(self))
        self._image_offsets = np.concatenate([[0], np.cumsum(per_image)])
        self._labels = np.array([label_of_category[entry["category_id"]] for _, entry, _ in kept], np.int32)
        boxes = np.array([entry["bbox"] for _, entry, _ in kept], np.float32).reshape(-1, 4)
        self._boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        self._polygon_offsets = np.frombuffer(polygon_offsets, np.int64)
        self._point_offsets = np.frombuffer(point_offsets, np.int64)
        self._points = np.frombuffer(points, np.float32).reshape(-1, 2)
        self._rle_offsets = np.frombuffer(rle_offsets, np.int64)
        self._rles = np.frombuffer(rles, np.uint8)
