"""Pictures of instances: where they change the image and where they do not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from solq.data.image import rgb_pixels
from solq.drawing import LEGIBLE_SIDE, draw_instances


def gray(height: int = 500, width: int = 600) -> Tensor:
    return torch.full((3, height, width), 100, dtype=torch.uint8)


def instances(
    *boxes: tuple[int, int, int, int], scores: list[float], size: tuple[int, int] = (500, 600)
) -> dict[str, Any]:
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[max(y0, 0) : y1, max(x0, 0) : x1] = True
    names = ["cat", "dog"][: len(boxes)]
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return {"boxes": corners, "scores": torch.tensor(scores), "labels": names, "masks": masks}


def draw(image: Tensor, found: dict[str, Any]) -> Tensor:
    return rgb_pixels(draw_instances(image, **found))


def changed(picture: Tensor, image: Tensor) -> Tensor:
    return (picture != image).any(0)


def test_only_the_object_and_its_name_are_drawn():
    image = gray()
    picture = draw(image, instances((200, 200, 300, 260), scores=[0.9]))
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
    assert torch.equal(draw(image, instances(scores=[])), image)


def test_the_best_is_on_top_and_colors_differ():
    both = [(100, 100, 300, 300), (200, 200, 400, 400)]
    first_best = draw(gray(), instances(*both, scores=[0.9, 0.8]))
    second_best = draw(gray(), instances(*both, scores=[0.8, 0.9]))
    assert (first_best[:, 150, 150] != first_best[:, 350, 350]).any()
    overlap = (slice(None), 250, 250)
    assert (first_best[overlap] != second_best[overlap]).any()


def test_small_images_are_enlarged():
    picture = draw(gray(64, 128), instances((10, 10, 60, 50), scores=[0.9], size=(64, 128)))
    assert picture.shape == (3, LEGIBLE_SIDE // 2, LEGIBLE_SIDE)
    factor = LEGIBLE_SIDE / 128
    where = changed(picture, gray(*picture.shape[1:]))
    rows, columns = where[round(11 * factor) : round(49 * factor)], where[:, round(11 * factor) : round(59 * factor)]
    assert rows[:, round(11 * factor) : round(59 * factor)].all()
    assert not rows[:, round(62 * factor) :].any()
    assert not columns[round(52 * factor) :].any()


@pytest.mark.parametrize("size", [(1, 1), (10, 3000), (700, 4)])
def test_images_of_any_shape(size):
    found = instances((0, 0, size[1], size[0]), (-5, -5, 9000, 9000), scores=[0.9, 0.6], size=size)
    assert changed(draw(gray(*size), found), torch.tensor(100)).any()


def test_boxes_alone():
    found = instances((200, 200, 300, 260), scores=[0.9])
    found["masks"] = None
    where = changed(draw(gray(), found), gray())
    assert where[200, 200:300].all()
    assert not where[210:250, 210:290].any()
