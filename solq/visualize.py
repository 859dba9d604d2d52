"""Pictures of detections: masks, boxes, names and scores on the image, and ground truth beside predictions."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from solq.data.image import read_image
from solq.detections import Detections
from solq.evaluation import CocoEvaluator

LEGIBLE_SIDE = 480  # pixels: images with a shorter longer side are enlarged, so that names on them can be read
FONT_SIZE = 13
MARGIN = 12

Color = tuple[int, int, int]


def draw_detections(
    image: Tensor,
    detections: Detections,
    class_names: Sequence[str],
    threshold: float = 0.5,
    show_scores: bool = True,
) -> Tensor:
    """The image (3, H, W) uint8 with the detections of at least `threshold` on it, in a colour each.

    Small images come back enlarged, their longer side 480 pixels. The best detection is drawn last, on top.
    """
    height, width = image.shape[-2:]
    factor = max(1.0, LEGIBLE_SIDE / max(height, width))
    return _draw(image, detections, class_names, threshold, show_scores, factor)


def comparison_rows(
    evaluator: CocoEvaluator, images: Path, count: int = 8
) -> list[tuple[Tensor, Detections, Detections]]:
    """What `comparison_grid` takes, for `count` of the images that were evaluated, spread evenly over them.

    Args:
        evaluator: after `evaluate`, on a process that has gathered.
        images: the folder of the images.
    """
    by_id = {image["id"]: image for image in evaluator.dataset["images"]}
    seen = evaluator.image_ids
    rows = []
    for image_id in seen[:: max(1, len(seen) // count)][:count]:
        entry = by_id[image_id]
        image = read_image(Path(images) / entry["file_name"], (entry["height"], entry["width"]))
        rows.append((image, evaluator.ground_truth(image_id), evaluator.predictions(image_id)))
    return rows


def comparison_grid(
    rows: Sequence[tuple[Tensor, Detections, Detections]],
    class_names: Sequence[str],
    path: Path,
    threshold: float = 0.5,
) -> None:
    """Write a PNG with the ground truth of each image beside what was predicted for it.

    Args:
        rows: image (3, H, W) uint8, its ground truth, its predictions, both in the image's pixels.
        class_names: the name of every label.
        path: of the PNG; its folder is made if it is not there.
        threshold: predictions of a lower score are not drawn.
    """
    if not rows:
        raise ValueError("rows is empty: a comparison needs at least one image")
    pairs = []
    for image, truth, predictions in rows:
        factor = LEGIBLE_SIDE / max(image.shape[-2:])
        left = _draw(image, truth, class_names, 0.0, False, factor)
        right = _draw(image, predictions, class_names, threshold, True, factor)
        pairs.append((to_pil_image(left), to_pil_image(right)))

    across = 1 if len(pairs) < 4 else 2  # pairs side by side
    lines = [pairs[i : i + across] for i in range(0, len(pairs), across)]
    cell = max(panel.width for pair in pairs for panel in pair) + MARGIN
    heights = [max(panel.height for pair in line for panel in pair) + MARGIN for line in lines]
    title_font = ImageFont.load_default(FONT_SIZE + 5)
    header = FONT_SIZE + 5 + 2 * MARGIN
    page = Image.new("RGB", (MARGIN + across * (2 * cell + MARGIN), header + sum(heights)), "white")
    draw = ImageDraw.Draw(page)
    for column in range(across):
        left = MARGIN + column * (2 * cell + MARGIN)
        draw.text((left, MARGIN), "ground truth", "black", title_font)
        draw.text((left + cell, MARGIN), f"predictions of score {threshold:g} or more", "black", title_font)
    top = header
    for line, line_height in zip(lines, heights, strict=True):
        for column, pair in enumerate(line):
            for side, panel in enumerate(pair):
                page.paste(panel, (MARGIN + column * (2 * cell + MARGIN) + side * cell, top))
        top += line_height
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path, format="PNG")


def _draw(
    image: Tensor,
    detections: Detections,
    class_names: Sequence[str],
    threshold: float,
    show_scores: bool,
    factor: float,
) -> Tensor:
    """The image resized by `factor` with the detections on it."""
    size = [max(1, round(side * factor)) for side in image.shape[-2:]]
    image = _resized(image.cpu(), size)
    detections = detections[detections.scores >= threshold]
    if len(detections) == 0:
        return image
    worst_first = detections.scores.argsort(stable=True).cpu()
    colors = [_color(int(index)) for index in worst_first]
    detections = detections[worst_first.to(detections.scores.device)]
    height, width = size
    limits = torch.tensor([width - 1, height - 1, width - 1, height - 1])
    boxes = (detections.boxes.cpu() * factor).clamp(min=0).minimum(limits)

    if detections.masks is not None:
        for mask, color in zip(detections.masks, colors, strict=True):
            _paint(image, _resized(mask[None].cpu().byte() * 255, size)[0] > 127, color)
    image = draw_bounding_boxes(image, boxes, colors=colors)
    labels = [class_names[label] for label in detections.labels.tolist()]
    if show_scores:
        labels = [f"{name} {score:.2f}" for name, score in zip(labels, detections.scores.tolist(), strict=True)]
    return _write_labels(image, boxes, labels, colors)


def _resized(image: Tensor, size: list[int]) -> Tensor:
    """A copy of the image (C, H, W) uint8 in another size."""
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0].clone()


def _paint(image: Tensor, mask: Tensor, color: Color) -> None:
    """Tint the pixels (3, H, W) uint8 where `mask` (H, W) is true, and fill its outline."""
    inner = mask.clone()
    for axis in (0, 1):
        inner.narrow(axis, 1, mask.shape[axis] - 1).logical_and_(mask.narrow(axis, 0, mask.shape[axis] - 1))
        inner.narrow(axis, 0, mask.shape[axis] - 1).logical_and_(mask.narrow(axis, 1, mask.shape[axis] - 1))
    paint = torch.tensor(color, dtype=torch.uint8)[:, None]
    image[:, mask] = (0.55 * image[:, mask] + 0.45 * paint).byte()
    image[:, mask & ~inner] = paint


def _color(index: int) -> Color:
    """Hues a golden angle apart: near indices look different, and no two are the same."""
    red, green, blue = colorsys.hsv_to_rgb(0.61803398875 * index % 1, 0.85 if index % 2 else 0.65, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def _text_color(background: Color) -> str:
    red, green, blue = background
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else "white"  # luma of ITU-R BT.601


def _write_labels(image: Tensor, boxes: Tensor, labels: list[str], colors: list[Color]) -> Tensor:
    """Names above their boxes, inside, or below, where no other name is yet. The last box chooses first."""
    picture = to_pil_image(image)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(FONT_SIZE)
    taken: list[tuple[float, float, float, float]] = []
    for (x0, y0, _, y1), label, color in reversed(list(zip(boxes.tolist(), labels, colors, strict=True))):
        width, height = draw.textlength(label, font) + 4, FONT_SIZE + 4
        x = max(0.0, min(x0, picture.width - width))
        places = [(x, y, x + width, y + height) for y in (y0 - height, y0, y1, y1 - height)]
        visible = [p for p in places if p[1] >= 0 and p[3] <= picture.height] or [(x, 0.0, x + width, float(height))]
        place = next((p for p in visible if not any(_overlap(p, other) for other in taken)), visible[0])
        taken.append(place)
        draw.rectangle(place, fill=color)
        draw.text((place[0] + 2, place[1] + 1), label, _text_color(color), font)
    return pil_to_tensor(picture)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
