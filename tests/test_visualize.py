"""Pictures of detections: where they change the image and where they do not."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor

from solq.detections import Detections
from solq.evaluation import CocoEvaluator
from solq.visualize import LEGIBLE_SIDE, MARGIN, comparison_grid, comparison_rows, draw_detections

NAMES = ["cat", "dog"]


def gray(height: int = 500, width: int = 600) -> Tensor:
    return torch.full((3, height, width), 100, dtype=torch.uint8)


def detections(
    *boxes: tuple[int, int, int, int], scores: list[float], size: tuple[int, int] = (500, 600)
) -> Detections:
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[max(y0, 0) : y1, max(x0, 0) : x1] = True
    labels = torch.arange(len(boxes)) % 2
    return Detections(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(scores), labels, masks)


def changed(picture: Tensor, image: Tensor) -> Tensor:
    return (picture != image).any(0)


def test_only_the_object_and_its_name_are_drawn():
    image = gray()
    picture = draw_detections(image, detections((200, 200, 300, 260), scores=[0.9]), NAMES)
    assert torch.equal(image, gray()), "the caller's image was drawn on"
    assert picture.dtype == torch.uint8
    assert picture.shape == image.shape
    where = changed(picture, image)
    assert where[200:260, 200:300].all()
    assert where[180:200, 200:240].any(), "no name above the box"
    where[180:262, 199:302] = False
    assert not where.any()
    tint = picture[:, 230, 250]
    assert (tint != picture[:, 230, 200]).any(), "the outline looks like the inside"
    assert picture[:, 205:255, 205:295].flatten(1).unique(dim=1).shape == (3, 1)


def test_nothing_to_draw():
    image = gray()
    assert torch.equal(draw_detections(image, detections((200, 200, 300, 260), scores=[0.4]), NAMES), image)
    assert torch.equal(draw_detections(image, detections(scores=[]), NAMES), image)
    assert not torch.equal(draw_detections(image, detections((200, 200, 300, 260), scores=[0.4]), NAMES, 0.3), image)


def test_the_best_is_on_top_and_colors_differ():
    both = [(100, 100, 300, 300), (200, 200, 400, 400)]
    first_best = draw_detections(gray(), detections(*both, scores=[0.9, 0.8]), NAMES)
    second_best = draw_detections(gray(), detections(*both, scores=[0.8, 0.9]), NAMES)
    assert (first_best[:, 150, 150] != first_best[:, 350, 350]).any()
    overlap = (slice(None), 250, 250)
    assert (first_best[overlap] != second_best[overlap]).any()


def test_small_images_are_enlarged():
    picture = draw_detections(gray(64, 128), detections((10, 10, 60, 50), scores=[0.9], size=(64, 128)), NAMES)
    assert picture.shape == (3, LEGIBLE_SIDE // 2, LEGIBLE_SIDE)
    factor = LEGIBLE_SIDE / 128
    where = changed(picture, gray(*picture.shape[1:]))
    rows, columns = where[round(11 * factor) : round(49 * factor)], where[:, round(11 * factor) : round(59 * factor)]
    assert rows[:, round(11 * factor) : round(59 * factor)].all()
    assert not rows[:, round(62 * factor) :].any()
    assert not columns[round(52 * factor) :].any()


@pytest.mark.parametrize("size", [(1, 1), (10, 3000), (700, 4)])
def test_images_of_any_shape(size):
    found = detections((0, 0, size[1], size[0]), (-5, -5, 9000, 9000), scores=[0.9, 0.6], size=size)
    assert changed(draw_detections(gray(*size), found, NAMES), torch.tensor(100)).any()


def test_boxes_alone():
    found = detections((200, 200, 300, 260), scores=[0.9])
    found.masks = None
    where = changed(draw_detections(gray(), found, NAMES), gray())
    assert where[200, 200:300].all()
    assert not where[210:250, 210:290].any()


def test_a_grid_has_every_panel(tmp_path):
    images = [gray(100, 200), gray(200, 100), gray(100, 100), gray(100, 100), gray(100, 100)]
    rows = []
    for image in images:
        size = tuple(image.shape[1:])
        truth = detections((10, 10, 90, 90), scores=[1.0], size=size)
        rows.append((image, truth, detections((20, 20, 80, 80), scores=[0.1], size=size)))
    path = tmp_path / "new" / "grid.png"
    comparison_grid(rows[:1], NAMES, path)
    one = np.asarray(Image.open(path))
    assert Image.open(path).format == "PNG"
    right = one[-MARGIN - LEGIBLE_SIDE // 2 :, one.shape[1] // 2 :]  # without the title
    assert (right == 100).all(-1).sum() == LEGIBLE_SIDE**2 // 2, "the prediction below the threshold was drawn"
    assert (one == 100).all(-1).sum() < 0.9 * LEGIBLE_SIDE**2, "the ground truth was not drawn"
    comparison_grid(rows, NAMES, path)
    five = np.asarray(Image.open(path))
    assert five.shape[1] == pytest.approx(2 * one.shape[1], abs=20), "four and more are two pairs to a line"
    assert five.shape[0] > 3 * LEGIBLE_SIDE
    with pytest.raises(ValueError, match="rows is empty"):
        comparison_grid([], NAMES, path)


def test_rows_of_an_evaluation(tmp_path):
    """Ground truth and predictions come back from the evaluator, for images spread over all that were seen."""
    H, W = 40, 60
    mask = np.zeros((H, W), np.uint8, order="F")
    mask[5:20, 10:30] = 1
    rle = coco_mask.encode(mask)
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": H, "width": W} for i in range(1, 7)],
        "categories": [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [
            {
                "id": i,
                "image_id": i,
                "category_id": 9,
                "bbox": [10, 5, 20, 15],
                "iscrowd": int(i == 3),
                "segmentation": {"size": [H, W], "counts": rle["counts"].decode()},
            }
            for i in range(1, 7)
        ],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    for i in range(1, 7):
        Image.new("RGB", (W, H), (i, i, i)).save(tmp_path / f"{i}.png")
    evaluator = CocoEvaluator(tmp_path / "annotations.json", [4, 9])
    given = detections((1, 2, 30, 31), (3, 4, 10, 12), scores=[0.75, 0.5], size=(H, W))
    evaluator.update(range(1, 7), [given] * 5 + [detections(scores=[], size=(H, W))])

    rows = comparison_rows(evaluator, tmp_path, count=3)
    assert [int(image[0, 0, 0]) for image, _, _ in rows] == [1, 3, 5]
    for number, (image, truth, predicted) in zip([1, 3, 5], rows, strict=True):
        assert image.shape == (3, H, W)
        assert len(truth) == (number != 3), "a crowd is not an object"
        if number != 3:
            assert truth.boxes.tolist() == [[10, 5, 30, 20]]
            assert truth.labels.tolist() == [1]
            assert torch.equal(truth.masks[0], torch.from_numpy(mask).bool())
        for field in ("boxes", "scores", "labels", "masks"):
            assert torch.equal(getattr(predicted, field), getattr(given, field)), field
    everything = comparison_rows(evaluator, tmp_path, count=99)
    assert len(everything) == 6
    comparison_grid(everything, ["cat", "dog"], tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").width > 4 * LEGIBLE_SIDE
