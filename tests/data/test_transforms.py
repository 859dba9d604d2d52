"""Views against the long way: every step done one after the other, on masks of the whole image."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from solq.data.transforms import (
    EvalTransform,
    TrainTransform,
    View,
    clip_boxes,
    crop_rle,
    rasterize_polygons,
    resized,
    view_boxes,
    view_image,
)
from solq.kernels.reference import crop_masks

N = 128


def rasterize(polygons: list[np.ndarray], box: list[float], flip: bool = False, size: int = N) -> np.ndarray:
    """One instance of several polygons."""
    lengths = np.array([len(polygon) for polygon in polygons])
    owners = np.zeros(len(polygons), np.int64)
    points = np.concatenate(polygons).astype(np.float32)
    return rasterize_polygons(points, lengths, owners, np.array([box], np.float32), flip, size)[0]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / max(1, (a | b).sum())


def star(rng: np.random.Generator, num_points: int, extent: float) -> np.ndarray:
    """A polygon (V, 2) around the middle of a square image, its radius different in every direction."""
    angles = np.sort(rng.uniform(0, 2 * math.pi, num_points))
    radii = rng.uniform(0.15, 0.48, num_points) * extent
    return np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None] + extent / 2


# ---- polygons -------------------------------------------------------------------------------------------------------


def test_cells_are_set_where_their_centers_lie_inside():
    triangle = np.array([(0.0, 0.0), (4.0, 0.0), (0.0, 4.0)])
    expected = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]  # a center on the long side counts as outside
    assert rasterize([triangle], [0, 0, 4, 4], size=4).astype(int).tolist() == expected
    mirrored = rasterize([triangle - 0.01], [0, 0, 4, 4], flip=True, size=4)
    assert mirrored.tolist() == rasterize([triangle - 0.01], [0, 0, 4, 4], size=4)[:, ::-1].tolist()


def test_polygons_of_an_instance_are_united_and_a_polygon_that_crosses_itself_is_even_odd():
    left, right = np.array([(0, 0), (6, 0), (6, 8), (0, 8)]), np.array([(4, 0), (8, 0), (8, 8), (4, 8)])
    assert rasterize([left, right], [0, 0, 8, 8], size=8).all()
    bow = np.array([(0, 0), (8, 8), (8, 0), (0, 8)]) + 1e-3
    mask = rasterize([bow], [0, 0, 8, 8], size=8)
    assert mask[4, 0]
    assert mask[4, 7]
    assert not mask[0, 4]
    assert not mask[7, 3]


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), num_points=st.integers(3, 40))
def test_polygons_agree_with_pycocotools(seed: int, num_points: int):
    """In a frame as large as the image, where both sample pixel centers; it rounds vertices to a fifth of a pixel."""
    polygon = star(np.random.default_rng(seed), num_points, N)
    expected = coco_mask.decode(coco_mask.frPyObjects([polygon.ravel().tolist()], N, N))[..., 0].astype(bool)
    mask = rasterize([polygon], [0, 0, N, N])
    perimeter = np.abs(np.diff(polygon, axis=0, append=polygon[:1])).sum()
    assert (mask ^ expected).sum() <= 4 + 0.25 * perimeter


@pytest.mark.parametrize("extent", [60, 128, 400])
@pytest.mark.parametrize("flip", [False, True])
def test_polygons_agree_with_full_masks_cropped_by_roi_align(extent: int, flip: bool):
    rng = np.random.default_rng(extent)
    ious = []
    for _ in range(20):
        polygon = star(rng, 12, extent)
        low, high = polygon.min(0), polygon.max(0)
        high = low + (high - low) * rng.uniform(0.5, 1, 2)  # as if clipped by a crop
        rle = coco_mask.frPyObjects([polygon.ravel().tolist()], extent, extent)
        full = torch.from_numpy(coco_mask.decode(rle)[..., 0])
        exact = crop_masks(full[None], torch.tensor([[*low, *high]]), N)[0].numpy()
        exact = exact[:, ::-1] if flip else exact
        ious.append(iou(rasterize([polygon], [*low, *high], flip), exact))
    # The mask of the whole image is itself a grid of pixels, coarser than the crop where the object is small.
    assert np.mean(ious) > 1 - 4 / extent
    assert min(ious) > 1 - 12 / extent


def test_vertices_far_outside_a_box_cost_nothing_and_nothing_of_them_is_lost():
    huge = np.array([(-1e6, -1e6), (1e6, -1e6), (1e6, 1e6), (-1e6, 1e6)])
    assert rasterize([huge], [0, 0, 1, 1]).all()
    assert not rasterize([huge + 3e6], [0, 0, 1, 1]).any()


def test_instances_of_an_image_do_not_mix():
    squares = [np.array([(x, 0), (x + 5, 0), (x + 5, 10), (x, 10)], np.float32) for x in (0, 20, 40)]
    boxes = np.array([[0, 0, 10, 10], [100, 0, 110, 10], [20, 0, 25, 10], [40, 0, 50, 10]], np.float32)
    masks = rasterize_polygons(
        np.concatenate(squares), np.array([4, 4, 4]), np.array([0, 2, 3]), boxes, flip=False, size=8
    )  # the second instance has no polygon
    assert masks.mean((1, 2)).tolist() == [0.5, 0, 1, 0.5]
    none = rasterize_polygons(np.zeros((0, 2), np.float32), np.zeros(0, int), np.zeros(0, int), boxes, False, 8)
    assert none.shape == (4, 8, 8)
    assert not none.any()


# ---- RLE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
def test_rle_is_the_full_mask_cropped_by_roi_align(flip: bool):
    rng = np.random.default_rng(0)
    H, W = 70, 90
    for _ in range(10):
        mask = np.kron(rng.random((7, 9)) < 0.5, np.ones((10, 10))).astype(np.uint8)
        x0, y0 = rng.uniform(0, 40, 2)
        box = np.array([x0, y0, x0 + rng.uniform(1, W - x0), y0 + rng.uniform(1, H - y0)], np.float32)
        exact = crop_masks(torch.from_numpy(mask)[None], torch.from_numpy(box)[None], N)[0].numpy()
        rle = coco_mask.encode(np.asfortranarray(mask))
        cropped = crop_rle(rle["counts"], (H, W), box, flip, N)
        assert (cropped == (exact[:, ::-1] if flip else exact)).mean() > 0.999  # sums of float32 meet 0.5 exactly


# ---- views ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(
    height=st.integers(1, 3000), width=st.integers(1, 3000), shorter=st.integers(1, 1088), longest=st.integers(32, 1536)
)
def test_resized_keeps_bounds_and_aspect(height: int, width: int, shorter: int, longest: int):
    h, w = resized((height, width), shorter, longest)
    assert max(h, w) <= longest or min(h, w) == shorter == max(h, w)
    assert 1 <= min(h, w) <= shorter
    assert h == w or (h < w) == (height < width)
    if min(h, w) > 20:
        assert h / w == pytest.approx(height / width, rel=0.06)


@pytest.mark.parametrize(
    ("size", "expected"), [((480, 640), (800, 1066)), ((640, 427), (1199, 800)), ((300, 900), (444, 1333))]
)
def test_resized_as_detr(size: tuple[int, int], expected: tuple[int, int]):
    assert resized(size, 800, 1333) == expected


def generators(seed: int, index: int) -> tuple[np.random.Generator, np.random.Generator]:
    return np.random.default_rng(seed), np.random.default_rng((seed, index))


def test_training_views_have_the_distribution_of_the_paper():
    transform, H, W = TrainTransform(), 480, 640
    views = [transform((H, W), *generators(seed, 0)) for seed in range(2000)]
    whole = [view for view in views if view.window == (0, 0, W, H)]
    crops = [view for view in views if view.window != (0, 0, W, H)]
    assert 0.46 < len(whole) / len(views) < 0.54
    assert 0.46 < np.mean([view.flip for view in views]) < 0.54
    assert {min(view.size) for view in whole} == set(range(480, 801, 32))
    assert max(max(view.size) for view in views) <= 1333
    # Crops are 384 … 600 pixels a side of an image whose shorter side is 400, 500 or 600.
    heights = np.array([view.window[3] - view.window[1] for view in crops])
    widths = np.array([view.window[2] - view.window[0] for view in crops])
    assert heights.min() >= math.floor(384 * H / 600)
    assert heights.max() == H
    assert widths.min() >= math.floor(384 * H / 600)
    assert widths.max() == W  # all 533 of an image of shorter side 400
    assert all(0 <= v.window[0] < v.window[2] <= W and 0 <= v.window[1] < v.window[3] <= H for v in crops)
    assert len({view.window[0] for view in crops}) > 100


def test_images_of_a_batch_share_size_but_not_place_and_mirroring():
    transform = TrainTransform()
    for seed in range(20):
        views = [transform((480, 640), *generators(seed, index)) for index in range(20)]
        assert len({view.size for view in views}) == 1
        assert {view.flip for view in views} == {False, True}
        extents = {(view.window[2] - view.window[0], view.window[3] - view.window[1]) for view in views}
        assert len(extents) == 1
        assert extents == {(640, 480)} or len({view.window for view in views}) > 5


def test_options_switch_off_crops_and_mirroring():
    transform = TrainTransform(scales=(64,), max_size=96, crop=False, flip=False)
    for seed in range(30):
        assert transform((128, 128), *generators(seed, 0)) == View((0, 0, 128, 128), (64, 64), False)
    assert EvalTransform()((480, 640), *generators(0, 0)) == View((0, 0, 640, 480), (800, 1066))


def test_an_image_smaller_than_a_crop_is_shown_whole():
    transform = TrainTransform(crop_scales=(40,), crop_range=(384, 600))
    assert {transform((3, 5), *generators(seed, 0)).window for seed in range(20)} == {(0, 0, 5, 3)}


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_boxes_follow_the_pixels(seed: int):
    """A bright rectangle drawn into the image lies where its box says, after crop, mirroring and resize."""
    rng = np.random.default_rng(seed)
    H, W = 400, 560
    x0, y0 = int(rng.integers(0, W - 120)), int(rng.integers(0, H - 120))
    x1, y1 = x0 + int(rng.integers(40, 120)), y0 + int(rng.integers(40, 120))
    image = torch.zeros(3, H, W, dtype=torch.uint8)
    image[:, y0:y1, x0:x1] = 255
    view = TrainTransform(scales=(320, 480))((H, W), *generators(seed, 0))
    boxes, remain = clip_boxes(np.array([[x0, y0, x1, y1]], np.float32), view)
    shown = view_image(image, view)
    assert shown.shape == (3, *view.size)
    assert shown.dtype == torch.uint8
    if not remain[0]:
        assert (shown > 127).sum() <= 3 * max(view.size)
        return
    cx, cy, w, h = view_boxes(boxes, view)[0] * np.array(view.size[::-1] * 2)
    ys, xs = torch.nonzero(shown[0] > 127, as_tuple=True)
    bright = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    expected = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
    assert [float(v) for v in bright] == pytest.approx(expected, abs=1.6)


def test_boxes_are_clipped_and_dropped_below_one_pixel():
    view = View((10, 20, 110, 70), size=(100, 200))  # a pixel of the view is half a pixel of the image
    boxes = np.array([[0, 0, 60, 45], [109.6, 30, 200, 60], [109.4, 30, 200, 60], [0, 0, 5, 5], [10, 20, 110, 70]])
    clipped, remain = clip_boxes(boxes.astype(np.float32), view)
    assert remain.tolist() == [True, False, True, False, True]
    expected = [[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 1, 1]]
    assert view_boxes(clipped[[0, 4]], view) == pytest.approx(np.array(expected))
    flipped = View(view.window, view.size, flip=True)
    assert view_boxes(clipped[[0]], flipped) == pytest.approx(np.array([[0.75, 0.25, 0.5, 0.5]]))


def test_pixels_are_resampled_as_by_torchvision():
    from torchvision.transforms.v2 import functional as F

    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    view = View((5, 10, 65, 45), size=(70, 120), flip=True)
    expected = F.resize(F.horizontal_flip(image[:, 10:45, 5:65]), [70, 120], antialias=True)
    assert (view_image(image, view).int() - expected.int()).abs().max() <= 1
    assert torch.equal(view_image(image, View((5, 10, 65, 45), (35, 60))), image[:, 10:45, 5:65])
