"""Generate the shapes dataset: textured pictures of overlapping shapes, drawn from a seed into COCO's layout on disk.

The six classes differ by shape alone: disc, triangle (convex), cross (concave), ring (with a hole), stick (thin), dots
(in several parts). Polygons follow the visible part of an instance; an instance whose visible part has a hole is
written as RLE, alternately compressed and uncompressed, because the polygons of a COCO annotation can only be united.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from solq.data.annotations import split_paths
from solq.files import UNFINISHED
from solq.progress import track

CLASS_NAMES = ("disc", "triangle", "cross", "ring", "stick", "dots")
SETTINGS_FILE = "shapes.json"

_VERSION = 2  # version of the drawing: raise it when the same settings give other pictures
_SUPERSAMPLING = 3
_MIN_VISIBLE = 0.6  # share of an instance that stays visible
_MAX_ROTATION = np.pi / 8  # of all shapes except sticks, which have any rotation

Outline = NDArray[np.float64]  # (V, 2) x, y


def generate(root: Path, *, seed: int = 0, num_train: int = 2400, num_val: int = 240, image_size: int = 128) -> None:
    """Write `root`/{train2017, val2017, annotations}, or keep the folder if it was written with the same settings.

    The files appear all at once: they are written into a sibling folder that is renamed when it is complete.

    Args:
        root: folder of the dataset.
        seed: seed of all pictures.
        num_train, num_val: number of images in each split.
        image_size: height and width in pixels.

    Raises:
        ValueError: `root` holds something that is not a shapes dataset.
    """
    root = Path(root)
    settings = {
        "version": _VERSION,
        "seed": seed,
        "num_train": num_train,
        "num_val": num_val,
        "image_size": image_size,
    }
    if _recorded_settings(root) == settings:
        return
    unfinished = root.with_name(f".{root.name}.{os.getpid()}{UNFINISHED}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        _write_split(unfinished, "train2017", seed, range(1, num_train + 1), image_size)
        _write_split(unfinished, "val2017", seed, range(num_train + 1, num_train + num_val + 1), image_size)
        (unfinished / SETTINGS_FILE).write_text(json.dumps(settings) + "\n")
        _move_into_place(unfinished, root, settings)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _recorded_settings(root: Path) -> dict[str, int] | None:
    """Read the settings that the dataset in `root` was written with; None if there is no dataset."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    try:
        return json.loads((root / SETTINGS_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{root} exists and is not a shapes dataset: name another folder or remove it") from error


def _move_into_place(finished: Path, root: Path, settings: dict[str, int]) -> None:
    """Rename `finished` to `root`, unless another process has done so with the same settings."""
    root.parent.mkdir(parents=True, exist_ok=True)
    if root.exists():
        if _recorded_settings(root) == settings:
            return
        replaced = finished.with_suffix(".replaced")
        root.rename(replaced)
        shutil.rmtree(replaced)
    try:
        finished.rename(root)
    except OSError:
        if _recorded_settings(root) != settings:
            raise


def _write_split(root: Path, split: str, seed: int, image_ids: range, size: int) -> None:
    folder, annotation_file = split_paths(root, split)
    folder.mkdir(parents=True)
    annotation_file.parent.mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in track(image_ids, f"drawing {split}", len(image_ids)):
        # The random numbers of an image follow from seed and id alone, so no two images share them.
        pixels, instances = draw_image(np.random.default_rng((seed, image_id)), size)
        name = f"{image_id:012d}.jpg"
        Image.fromarray(pixels).save(folder / name, quality=92)
        images.append({"id": image_id, "file_name": name, "height": size, "width": size})
        for label, mask in instances:
            annotation_id = len(annotations) + 1
            annotations.append(
                {"id": annotation_id, "image_id": image_id, "category_id": label + 1, "iscrowd": 0}
                | describe_mask(mask, compressed=annotation_id % 2 == 0)
            )
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(CLASS_NAMES)]
    info = {"description": f"shapes, {split.removesuffix('2017')}, seed {seed}"}
    annotation_file.write_text(
        json.dumps({"info": info, "images": images, "annotations": annotations, "categories": categories})
    )


# ---- one picture


def draw_image(rng: np.random.Generator, size: int) -> tuple[NDArray[np.uint8], list[tuple[int, NDArray[np.bool_]]]]:
    """Draw one image.

    Returns:
        pixels (size, size, 3), and label and visible mask (size, size) of each instance, the rearmost first.
    """
    canvas = _background(rng, size)
    labels: list[int] = []
    full_areas: list[int] = []
    visible: list[NDArray[np.bool_]] = []
    for _ in range(rng.integers(1, 7)):
        for _ in range(12):  # attempts to place an instance
            label = int(rng.integers(len(CLASS_NAMES)))
            coverage, whole_area = _draw_shape(rng, CLASS_NAMES[label], size)
            mask = coverage >= 0.5
            remaining = [behind & ~mask for behind in visible]
            if mask.sum() >= 0.75 * whole_area and all(
                rest.sum() >= _MIN_VISIBLE * area for rest, area in zip(remaining, full_areas, strict=True)
            ):
                labels.append(label)
                full_areas.append(int(mask.sum()))
                visible = [*remaining, mask]
                _paint(rng, canvas, coverage)
                break
    canvas += np.float32(rng.uniform(1, 6)) * rng.standard_normal(canvas.shape, np.float32)
    return canvas.clip(0, 255).astype(np.uint8), list(zip(labels, visible, strict=True))


def _background(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Draw a coarse color field with stripes or checks over it: (size, size, 3) in 0..255."""
    color = rng.uniform(40, 215, 3)
    coarse = (color + rng.normal(0, 22, (4, 4, 3))).clip(0, 255).astype(np.uint8)
    canvas = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    angle, frequency = rng.uniform(0, np.pi), rng.uniform(12, 60)
    pattern = np.sin(frequency * (x * np.cos(angle) + y * np.sin(angle)))
    if rng.random() < 0.5:
        pattern = pattern * np.sin(frequency * (y * np.cos(angle) - x * np.sin(angle)))
    return canvas + pattern[..., None] * rng.normal(0, 14, 3).astype(np.float32)


def _paint(rng: np.random.Generator, canvas: NDArray[np.float32], coverage: NDArray[np.float32]) -> None:
    """Paint one shape on `canvas` in place, in a color that differs from the covered pixels."""
    region = np.ix_(coverage.any(1), coverage.any(0))
    coverage, covered = coverage[region], canvas[region]
    behind = covered.mean((0, 1))
    colors = rng.uniform(0, 255, (8, 3))
    color = colors[np.abs(colors - behind).sum(1).argmax()] if rng.random() < 0.5 else colors[0]
    if np.abs(color - behind).sum() < 120:
        color = np.where(behind > 127, behind - 90, behind + 90)
    shade = np.linspace(rng.uniform(-25, 25), rng.uniform(-25, 25), len(coverage), dtype=np.float32)[:, None]
    texture = shade + np.float32(rng.uniform(0, 10)) * rng.standard_normal(coverage.shape, np.float32)
    canvas[region] = covered + coverage[..., None] * (color.astype(np.float32) + texture[..., None] - covered)


def _draw_shape(rng: np.random.Generator, name: str, size: int) -> tuple[NDArray[np.float32], float]:
    """Draw one shape at a random place.

    Returns:
        its coverage (size, size) in 0..1, and its area in pixels, with what lies outside of the image.
    """
    filled, holes = _outlines(rng, name)
    radius = rng.uniform(0.14, 0.27) * size  # half the longer side
    angle = rng.uniform(0, np.pi) if name == "stick" else rng.uniform(-_MAX_ROTATION, _MAX_ROTATION)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    center = rng.uniform(0.7 * radius, size - 0.7 * radius, 2)
    layer = Image.new("L", (size * _SUPERSAMPLING, size * _SUPERSAMPLING))
    pen = ImageDraw.Draw(layer)
    area = 0.0
    for outlines, ink in ((filled, 255), (holes, 0)):
        for outline in outlines:
            points = outline @ rotation * radius + center
            pen.polygon([tuple(point) for point in (points * _SUPERSAMPLING).tolist()], fill=ink)
            area += abs(_signed_area(points)) * (1 if ink else -1)
    return np.asarray(layer.reduce(_SUPERSAMPLING), dtype=np.float32) / np.float32(255), area


def _outlines(rng: np.random.Generator, name: str) -> tuple[list[Outline], list[Outline]]:
    """Return the filled outlines and the holes of a shape within the unit circle."""
    match name:
        case "disc":
            return [_ellipse(1, rng.uniform(0.75, 1))], []
        case "triangle":
            corners = 2 * np.pi * (np.arange(3) / 3 + rng.uniform(-0.05, 0.05, 3))
            return [np.stack([np.cos(corners), np.sin(corners)], 1)], []
        case "cross":
            w = rng.uniform(0.25, 0.38)
            arm = [(1, w), (w, w), (w, 1), (-w, 1)]
            quarter = np.array([[0, 1], [-1, 0]])
            return [np.concatenate([np.array(arm[:3]) @ np.linalg.matrix_power(quarter, k) for k in range(4)])], []
        case "ring":
            hole = rng.uniform(0.45, 0.62)
            return [_ellipse(1, 1)], [_ellipse(hole, hole)]
        case "stick":
            w = rng.uniform(0.13, 0.2)
            return [np.array([(-1.3, -w), (1.3, -w), (1.3, w), (-1.3, w)])], []
        case "dots":
            corners = 2 * np.pi * np.arange(3) / 3
            r = rng.uniform(0.36, 0.44)
            return [_ellipse(r, r) + (1 - r) * np.array([np.cos(c), np.sin(c)]) for c in corners], []
    raise ValueError(f"no shape is called {name}; there are {', '.join(CLASS_NAMES)}")


def _ellipse(a: float, b: float) -> Outline:
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return np.stack([a * np.cos(angles), b * np.sin(angles)], 1)


# ---- one annotation


def describe_mask(mask: NDArray[np.bool_], *, compressed: bool) -> dict[str, Any]:
    """Compute `segmentation`, `area` and `bbox` of a mask (H, W): polygons, or RLE if the mask has a hole."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    measures = {"area": float(coco_mask.area(rle)), "bbox": coco_mask.toBbox(rle).tolist()}
    contours = trace_contours(mask)
    if all(_signed_area(contour) > 0 for contour in contours):
        return {"segmentation": [contour.ravel().tolist() for contour in contours]} | measures
    counts = rle["counts"].decode("ascii") if compressed else _run_lengths(mask)
    return {"segmentation": {"size": list(mask.shape), "counts": counts}} | measures


def _run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """Encode a mask as uncompressed RLE: lengths of runs down the columns, the first one of zeros."""
    pixels = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(pixels)) + 1
    return np.diff(np.concatenate([[0] if not pixels[0] else [0, 0], ends, [pixels.size]])).tolist()


def _signed_area(contour: Outline) -> float:
    x, y = contour.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def trace_contours(mask: NDArray[np.bool_]) -> list[Outline]:
    """Trace the closed contours (V, 2) of a mask (H, W): outer ones have a positive signed area, holes a negative one.

    A contour joins the middles of successive pixel sides between mask and background (marching squares). It never
    passes a pixel's center, so rasterizing it gives exactly the mask again.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows) == 0:
        return []
    top, left = int(rows[0]), int(columns[0])
    mask = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    padded = np.pad(mask, 1)
    # The steps (dx, dy) that start at each corner (x, y): sides of mask pixels that face the background, walked with
    # the mask on the right (y points down).
    sides: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for (dy, dx), start, step in (
        ((-1, 0), (0, 0), (1, 0)),  # upper side, rightwards
        ((0, 1), (1, 0), (0, 1)),  # right side, downwards
        ((1, 0), (1, 1), (-1, 0)),  # lower side, leftwards
        ((0, -1), (0, 1), (0, -1)),  # left side, upwards
    ):
        neighbor = padded[1 + dy : padded.shape[0] - 1 + dy, 1 + dx : padded.shape[1] - 1 + dx]
        ys, xs = np.nonzero(mask & ~neighbor)
        for x, y in zip((xs + left + start[0]).tolist(), (ys + top + start[1]).tolist(), strict=True):
            sides.setdefault((x, y), []).append(step)
    contours = []
    while sides:
        corner = next(iter(sides))
        step = sides[corner][0]
        middles: list[tuple[float, float]] = []
        while corner in sides:
            options = sides[corner]
            # Where two mask pixels touch by a corner only, turning right keeps them apart.
            right = (-step[1], step[0])
            step = right if right in options else options[0]
            options.remove(step)
            if not options:
                del sides[corner]
            middles.append((corner[0] + step[0] / 2, corner[1] + step[1] / 2))
            corner = (corner[0] + step[0], corner[1] + step[1])
        points = np.array(middles)
        steps = np.diff(points, axis=0, append=points[:1])
        turns = (steps != np.concatenate([steps[-1:], steps[:-1]])).any(1)
        contours.append(points[turns])
    return contours
