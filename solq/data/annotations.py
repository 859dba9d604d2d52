"""Annotation files in COCO's format: where they lie, reading, and checks of what is in them."""

import gc
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

# The entries that the rows of each list must have. Annotations may lack an id, which nothing here depends on.
REQUIRED: dict[str, dict[str, type]] = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "annotations": {"image_id": int, "category_id": int},
    "categories": {"id": int, "name": str},
}


def split_paths(data: Path, split: str) -> tuple[Path, Path]:
    """Return the folder of images and the annotation file of a split of a dataset in COCO's layout."""
    return data / split, data / "annotations" / f"instances_{split}.json"


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Switch Python's garbage collector off, while COCO's file becomes tens of millions of objects.

    None of these objects is garbage, and to look for some doubles the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@no_garbage_collection()
def read_coco(path: Path, lists: Sequence[str] = tuple(REQUIRED)) -> dict[str, Any]:
    """Read a JSON file in COCO's format and check it.

    Args:
        path: the file.
        lists: the lists that it must have, `images` among them.

    Raises:
        FileNotFoundError, OSError: the file is missing or cannot be read.
        ValueError: the file is not COCO JSON, has no images or categories, or refers to ones that it does not have.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: it should be a file in COCO's format") from error
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): download or export it again") from error
    for key in lists:
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list):
            raise ValueError(f"{path} is not in COCO's format: it has no list '{key}'")
        for row in rows:
            for entry, kind in REQUIRED[key].items():
                if isinstance(row, dict) and isinstance(row.get(entry), kind):
                    continue
                given = f"no '{entry}'"
                if isinstance(row, dict) and entry in row:
                    given = f"'{entry}': {row[entry]!r}, which is not {'a number' if kind is int else 'text'}"
                raise ValueError(f"{path} is not in COCO's format: an entry of '{key}' has {given}")
    if "categories" in lists and not content["categories"]:
        raise ValueError(f"{path} has no categories: choose another file")
    images = content["images"]
    if not images:
        raise ValueError(f"{path} has no images: choose another file or split")
    if min(min(image["height"], image["width"]) for image in images) < 1:
        raise ValueError(f"{path} has images without height or width: write their sizes in pixels")
    if len({image["id"] for image in images}) < len(images):
        raise ValueError(f"{path} gives several images the same id: give each its own")
    for referred, key, rows in (("image", "image_id", "images"), ("category", "category_id", "categories")):
        known = {row["id"] for row in content.get(rows, [])}
        for annotation in content["annotations"] if "annotations" in lists else []:
            if annotation[key] not in known:
                raise ValueError(
                    f"{path}: annotation {annotation.get('id')} is of {referred} {annotation[key]}, "
                    f"which is not among {rows}: add the {referred} or remove the annotation"
                )
    return content


def labels_of_categories(names: dict[int, str], dense: bool = False) -> tuple[list[int], list[str]]:
    """Return the category id and the name of each label, from the names of the categories by their ids.

    COCO's 80 ids reach to 90 and are themselves the labels, as in the published model with its 91 outputs; labels that
    are no id stay unused. The same is done with all ids that leave few labels unused: none is negative and the largest
    is at most twice the number of categories. Other ids, and all ids if `dense`, are numbered in rising order.
    """
    few_unused = not dense and min(names) >= 0 and max(names) <= 2 * len(names)
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
    """Return the polygons of a segmentation, or the counts of its compressed RLE.

    Raises:
        ValueError: the segmentation can be neither, with the reason.
    """
    if isinstance(segmentation, dict):
        if segmentation.get("size") != [height, width]:
            raise ValueError("the RLE's size is not the image's")
        counts = segmentation.get("counts")
        if isinstance(counts, str):
            if not _runs_sum_to(counts.encode(), height * width):
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


def _runs_sum_to(counts: bytes, num_pixels: int) -> bool:
    """Tell whether the run lengths of a compressed RLE sum to `num_pixels`; pycocotools reads others as noise.

    A run length is written in characters of 5 bits, low bits first, with a sixth bit set on all but the last; from the
    fourth run length on, its difference to the length two before is written.
    """
    lengths: list[int] = []
    length, shift = 0, 0
    for bits in (character - 48 for character in counts):
        if not 0 <= bits < 64 or shift > 55:
            return False
        length |= (bits & 31) << shift
        shift += 5
        if bits & 32 == 0:
            length -= (bits & 16) << shift - 4  # two's complement
            lengths.append(length + (lengths[-2] if len(lengths) > 2 else 0))
            length, shift = 0, 0
    return shift == 0 and bool(lengths) and min(lengths) >= 0 and sum(lengths) == num_pixels
