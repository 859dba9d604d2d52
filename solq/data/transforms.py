"""Augment images, boxes and masks: which part of an image is seen, at which size, mirrored or not.

Every chain of flips, resizes and crops is one :class:`View`: a window of the original image, stretched to a size,
perhaps mirrored. Pixels are therefore resampled once, and polygons move as coordinates straight into the frame of their
box, where they are rasterized once; no mask of the image's size is made for a polygon.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor


@dataclass(frozen=True)
class View:
    """A window x0 y0 x1 y1 of an image, in whole pixels, mirrored if `flip` and stretched to `size` (height, width)."""

    window: tuple[int, int, int, int]
    size: tuple[int, int]
    flip: bool = False


@dataclass(frozen=True)
class TrainTransform:
    """Augment as DETR does (its section A.4): half of the images are only resized, the others are cropped before.

    Random numbers that decide the size of an image (crop or not, sides of the crop, scale) are drawn for the whole
    batch, so that its images need little padding; the others (mirroring, place of the crop) are drawn for each image.
    The distribution for an image is the same as if all were drawn for it.

    Args:
        scales: lengths of the shorter side, one is chosen.
        max_size: bound of the longer side.
        crop: whether half of the images are resized to one of `crop_scales` and cropped to `crop_range` per side first.
        flip: whether half of the images are mirrored.
    """

    scales: tuple[int, ...] = tuple(range(480, 801, 32))
    max_size: int = 1333
    crop: bool = True
    flip: bool = True
    crop_scales: tuple[int, ...] = (400, 500, 600)
    crop_range: tuple[int, int] = (384, 600)

    def __call__(self, image_size: tuple[int, int], batch_rng: np.random.Generator, rng: np.random.Generator) -> View:
        """Choose the view of an image of `image_size` (height, width)."""
        H, W = image_size
        cropped = self.crop and batch_rng.random() < 0.5
        scale = int(batch_rng.choice(self.scales))
        crop_scale = int(batch_rng.choice(self.crop_scales))
        crop_fractions = batch_rng.random(2)
        flip = bool(self.flip and rng.random() < 0.5)
        position = rng.random(2)
        if not cropped:
            return View((0, 0, W, H), resized(image_size, scale, self.max_size), flip)
        window = []
        for extent, shown, fraction, offset in zip(
            (H, W), resized(image_size, crop_scale), crop_fractions, position, strict=True
        ):
            least, most = min(self.crop_range[0], shown), min(self.crop_range[1], shown)
            side = least + int(fraction * (most - least + 1))
            side = max(1, round(side * extent / shown))  # back in pixels of the original image
            start = int(offset * (extent - side + 1))
            window.append((start, start + side))
        (y0, y1), (x0, x1) = window
        return View((x0, y0, x1, y1), resized((y1 - y0, x1 - x0), scale, self.max_size), flip)


@dataclass(frozen=True)
class EvalTransform:
    """The whole image, its shorter side `size` long unless the longer one would exceed `max_size`."""

    size: int = 800
    max_size: int = 1333

    def __call__(self, image_size: tuple[int, int], batch_rng: np.random.Generator, rng: np.random.Generator) -> View:
        """Choose the view of an image of `image_size` (height, width)."""
        H, W = image_size
        return View((0, 0, W, H), resized(image_size, self.size, self.max_size))


def resized(image_size: tuple[int, int], shorter: int, longest: int | None = None) -> tuple[int, int]:
    """Scale a size (height, width) to a shorter side of `shorter`, or to a longer side of `longest` if that is less."""
    low, high = min(image_size), max(image_size)
    if longest is not None and high * shorter > longest * low:
        sides = {low: max(1, round(longest * low / high)), high: longest}
    else:
        sides = {high: max(1, int(shorter * high / low)), low: shorter}
    H, W = image_size
    return sides[H], sides[W]


def view_image(image: Tensor, view: View) -> Tensor:
    """Crop, mirror and resize an image (3, H, W) uint8 to what `view` shows: (3, view height, view width) uint8."""
    x0, y0, x1, y1 = view.window
    window = image[:, y0:y1, x0:x1]
    if view.flip:
        window = window.flip(-1)
    if window.shape[1:] == view.size:
        return window
    # The uint8 kernel of `interpolate` is fast on channels-last memory.
    window = window[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(window, view.size, mode="bilinear", antialias=True)[0]


def clip_boxes(boxes: NDArray[np.float32], view: View) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Clip boxes (n, 4; x0 y0 x1 y1 in pixels of the original image) to the window of `view`.

    Returns:
        the clipped boxes (n, 4), and whether each remains (n,): whether at least one pixel of the view's height and
        width is left of it.
    """
    low, high = _window_corners(view)
    corners = np.concatenate([np.clip(boxes[:, :2], low, high), np.clip(boxes[:, 2:], low, high)], axis=1)
    pixel = (high - low) / np.array(view.size[::-1], np.float32)
    return corners, np.all(corners[:, 2:] - corners[:, :2] >= pixel * 0.9999, axis=1)


def view_boxes(clipped: NDArray[np.float32], view: View) -> NDArray[np.float32]:
    """Convert clipped boxes (n, 4; x0 y0 x1 y1) to cx cy w h in 0..1 of the view."""
    low, high = _window_corners(view)
    extent = (clipped[:, 2:] - clipped[:, :2]) / (high - low)
    center = ((clipped[:, 2:] + clipped[:, :2]) / 2 - low) / (high - low)
    if view.flip:
        center[:, 0] = 1 - center[:, 0]
    return np.concatenate([center, extent], axis=1)


def _window_corners(view: View) -> NDArray[np.float32]:
    """Return the window's corners as rows (x0, y0) and (x1, y1)."""
    return np.array(view.window, np.float32).reshape(2, 2)


def rasterize_polygons(
    points: NDArray[np.float32],
    polygon_lengths: NDArray[np.int64],
    polygon_instances: NDArray[np.int64],
    boxes: NDArray[np.float32],
    flip: bool,
    size: int,
) -> NDArray[np.bool_]:
    """Rasterize polygons to masks (n, size, size) in the frames of n boxes, by the centers of the cells.

    All polygons of an image are filled at once, by the even-odd rule; the polygons of an instance are united.

    Args:
        points: (V, 2) vertices of all polygons, x y in pixels, one polygon after the other.
        polygon_lengths: (R,) number of vertices of each polygon.
        polygon_instances: (R,) the instance of each polygon, in rising order.
        boxes: (n, 4) x0 y0 x1 y1 in pixels, of positive extent; parts of polygons outside are cut off.
        flip: mirror the masks.
        size: N, cells per side.
    """
    masks = np.zeros((len(boxes), size, size), dtype=bool)
    R = len(polygon_lengths)
    if R == 0:
        return masks
    # Vertices in units of cells, and the edges that join them; the last vertex of a polygon is joined to its first.
    polygon = np.repeat(np.arange(R), polygon_lengths)
    box = boxes.astype(np.float64)[polygon_instances[polygon]]
    start = (points - box[:, :2]) / (box[:, 2:] - box[:, :2]) * size
    if flip:
        start[:, 0] = size - start[:, 0]
    last = np.cumsum(polygon_lengths) - 1
    next_vertex = np.arange(1, len(points) + 1)
    next_vertex[last] = last - polygon_lengths + 1
    end = start[next_vertex]
    # Rows whose center line an edge crosses: those between its ends, the lower end excluded.
    low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    first_row = np.clip(np.ceil(low - 0.5), 0, size).astype(np.int64)
    rows_crossed = np.clip(np.ceil(high - 0.5), 0, size).astype(np.int64) - first_row
    edge = np.repeat(np.arange(len(start)), rows_crossed)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(rows_crossed) - rows_crossed, rows_crossed) + first_row[edge]
    # Columns of the crossings. Each crossing flips the cells right of it, so a cell is inside if the count is odd.
    x, y = start[edge].T
    slope = (end[edge, 0] - x) / (end[edge, 1] - y)
    column = np.clip(np.ceil(x + (row + 0.5 - y) * slope - 0.5), 0, size).astype(np.int64)
    # The row is the innermost dimension, so that sums along a row add whole contiguous columns.
    inside = np.zeros((R, size + 1, size), dtype=np.uint8)
    np.bitwise_xor.at(inside.reshape(-1), (polygon[edge] * (size + 1) + column) * size + row, np.uint8(1))
    inside = np.bitwise_xor.accumulate(inside, axis=1)[:, :size]
    instances, first_polygons = np.unique(polygon_instances, return_index=True)
    masks[instances] = np.bitwise_or.reduceat(inside, first_polygons).transpose(0, 2, 1)
    return masks


def crop_rle(
    counts: bytes, image_size: tuple[int, int], box: NDArray[np.float32], flip: bool, size: int
) -> NDArray[np.bool_]:
    """Crop a compressed RLE of an image (height, width) to `box` (x0 y0 x1 y1) with RoIAlign, cut at 0.5.

    Returns:
        a mask (size, size).
    """
    from torchvision.ops import roi_align  # slow to import

    mask = coco_mask.decode({"size": list(image_size), "counts": counts})
    x0, y0 = np.maximum(np.floor(box[:2]).astype(int) - 1, 0)
    x1, y1 = np.ceil(box[2:]).astype(int) + 1
    near = torch.from_numpy(np.ascontiguousarray(mask[y0:y1, x0:x1])).float()
    corners = torch.from_numpy(box) - torch.tensor([x0, y0, x0, y0])
    cropped = roi_align(near[None, None], [corners[None]], (size, size), aligned=True)[0, 0] >= 0.5
    return (cropped.flip(-1) if flip else cropped).numpy()
