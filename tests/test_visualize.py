"""Pages with ground truth beside predictions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from solq.detections import Detections
from solq.drawing import LEGIBLE_SIDE, MARGIN
from solq.evaluation import CocoEvaluator
from solq.visualize import comparison_page

H, W = 40, 60
COUNT = 6  # images, of gray level 101, 102, …; the object of image 3 is a crowd


@pytest.fixture
def evaluator(tmp_path: Path) -> CocoEvaluator:
    annotation = {"category_id": 9, "bbox": [10, 5, 20, 15], "segmentation": {"size": [H, W], "counts": rle()}}
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": H, "width": W} for i in range(1, COUNT + 1)],
        "categories": [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [{"id": i, "image_id": i, "iscrowd": int(i == 3), **annotation} for i in range(1, COUNT + 1)],
    }
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    for i in range(1, COUNT + 1):
        Image.new("RGB", (W, H), (100 + i,) * 3).save(tmp_path / f"{i}.png")
    return CocoEvaluator(tmp_path / "annotations.json", [4, 9])


def mask() -> np.ndarray:
    pixels = np.zeros((H, W), np.uint8, order="F")
    pixels[5:20, 10:30] = 1
    return pixels


def rle() -> str:
    return coco_mask.encode(mask())["counts"].decode()


def detections(*boxes: tuple[int, int, int, int], scores: list[float]) -> Detections:
    masks = torch.zeros(len(boxes), H, W, dtype=torch.bool)
    for drawn, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        drawn[y0:y1, x0:x1] = True
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Detections(corners, torch.tensor(scores), torch.arange(len(boxes)) % 2, masks)


def test_a_page_has_every_panel(evaluator: CocoEvaluator, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no image was evaluated"):
        comparison_page(evaluator, tmp_path)
    evaluator.update(range(1, COUNT + 1), [detections((20, 10, 50, 30), scores=[0.1])] * COUNT)
    one = np.asarray(comparison_page(evaluator, tmp_path, count=1))
    height = LEGIBLE_SIDE * H // W
    right = one[-MARGIN - height :, one.shape[1] // 2 :]  # without the title
    assert (right == 101).all(-1).sum() == LEGIBLE_SIDE * height, "the prediction below the threshold was drawn"
    assert (one == 101).all(-1).sum() < 1.9 * LEGIBLE_SIDE * height, "the ground truth was not drawn"
    found = np.asarray(comparison_page(evaluator, tmp_path, threshold=0.1, count=1))
    assert (found == 101).all(-1).sum() < (one == 101).all(-1).sum(), "the prediction was not drawn"
    everything = np.asarray(comparison_page(evaluator, tmp_path))
    assert everything.shape[1] == pytest.approx(2 * one.shape[1], abs=20), "four and more are two pairs to a line"
    assert everything.shape[0] > 3 * height


def test_images_are_spread_over_the_evaluated_ones(evaluator: CocoEvaluator, tmp_path: Path) -> None:
    evaluator.update(range(1, COUNT + 1), [detections(scores=[])] * COUNT)
    page = np.asarray(comparison_page(evaluator, tmp_path, count=3))
    levels = [101 + i for i in range(COUNT) if (page == 101 + i).all(-1).sum() > LEGIBLE_SIDE]
    assert levels == [101, 103, 105]


def test_the_evaluator_returns_truth_and_predictions(evaluator: CocoEvaluator) -> None:
    given = detections((1, 2, 30, 31), (3, 4, 10, 12), scores=[0.75, 0.5])
    evaluator.update([1, 3], [given] * 2)
    truth = evaluator.ground_truth(1)
    assert truth.boxes.tolist() == [[10, 5, 30, 20]]
    assert truth.class_names == ["dog"]
    assert torch.equal(truth.masks[0], torch.from_numpy(mask()).bool())
    assert len(evaluator.ground_truth(3)) == 0, "a crowd is not an object"
    for field in ("boxes", "scores", "labels", "masks"):
        assert torch.equal(getattr(evaluator.predictions(3), field), getattr(given, field)), field
