"""Draw masks, boxes and names of instances on an image."""

import colorsys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from solq.data.image import pil_image

LEGIBLE_SIDE = 480  # pixels: images with a shorter longer side are enlarged, so that names on them can be read
FONT_SIZE = 13
TITLE_SIZE = 18
MARGIN = 12  # pixels between the pictures of a page

Color = tuple[int, int, int]


def draw_instances(
    image: Tensor,
    boxes: Tensor,
    scores: Tensor,
    labels: Sequence[str],
    masks: Tensor | None = None,
    scale: float | None = None,
) -> Image.Image:
    """Draw K instances on an image, each in a color of its own, in rising order of scores: the best is on top.

    Args:
        image: (3, H, W) uint8, on the CPU like all tensors here.
        boxes: (K, 4) x0 y0 x1 y1 in pixels of the image; they may reach beyond it.
        scores: (K,).
        labels: K texts, written at the boxes.
        masks: (K, H, W) bool; None draws the boxes alone.
        scale: factor to resize the image by; None enlarges small images to a longer side of 480 pixels.
    """
    height, width = image.shape[-2:]
    if scale is None:
        scale = max(1.0, LEGIBLE_SIDE / max(height, width))
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    pixels = _resized(image, (height, width))
    limits = torch.tensor([width - 1, height - 1, width - 1, height - 1])
    corners = (boxes * scale).clamp(min=0).minimum(limits)
    order = scores.argsort(stable=True).tolist()
    if masks is not None:
        for index in order:
            _tint(pixels, _resized(masks[index, None].byte() * 255, (height, width))[0] > 127, _color(index))
    picture = pil_image(pixels)
    draw = ImageDraw.Draw(picture)
    for index in order:
        draw.rectangle(corners[index].long().tolist(), outline=_color(index))
    taken: list[tuple[float, ...]] = []
    for index in reversed(order):  # the best one chooses its place first
        _write_label(draw, picture.size, labels[index], corners[index].tolist(), _color(index), taken)
    return picture


def compose_page(rows: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> Image.Image:
    """Paste rows of pictures on a white page, with a title above each column; the last row may be shorter."""
    widths = [max(row[column].width for row in rows if column < len(row)) + MARGIN for column in range(len(titles))]
    heights = [max(picture.height for picture in row) + MARGIN for row in rows]
    top = TITLE_SIZE + 2 * MARGIN
    page = Image.new("RGB", (MARGIN + sum(widths), top + sum(heights)), "white")
    draw = ImageDraw.Draw(page)
    lefts = [MARGIN + sum(widths[:column]) for column in range(len(titles))]
    for left, title in zip(lefts, titles, strict=True):
        draw.text((left, MARGIN), title, "black", ImageFont.load_default(TITLE_SIZE))
    for row, height in zip(rows, heights, strict=True):
        for left, picture in zip(lefts, row, strict=False):
            page.paste(picture, (left, top))
        top += height
    return page


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a copy of an image (C, H, W) uint8 in another size."""
    return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0].clone()


def _tint(pixels: Tensor, mask: Tensor, color: Color) -> None:
    """Tint pixels (3, H, W) uint8 in place where `mask` (H, W) is true, and fill the mask's outline."""
    inner = mask.clone()
    for axis in (0, 1):
        inner.narrow(axis, 1, mask.shape[axis] - 1).logical_and_(mask.narrow(axis, 0, mask.shape[axis] - 1))
        inner.narrow(axis, 0, mask.shape[axis] - 1).logical_and_(mask.narrow(axis, 1, mask.shape[axis] - 1))
    paint = torch.tensor(color, dtype=torch.uint8)[:, None]
    pixels[:, mask] = (0.55 * pixels[:, mask] + 0.45 * paint).byte()
    pixels[:, mask & ~inner] = paint


def _color(index: int) -> Color:
    """Choose the color of an instance: hues a golden angle apart differ between neighbors and never repeat."""
    red, green, blue = colorsys.hsv_to_rgb(0.61803398875 * index % 1, 0.85 if index % 2 else 0.65, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def _write_label(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    label: str,
    box: Sequence[float],
    color: Color,
    taken: list[tuple[float, ...]],
) -> None:
    """Write a label above its box, inside or below, where `taken` has no other label; add its place to `taken`."""
    font = ImageFont.load_default(FONT_SIZE)
    x0, y0, _, y1 = box
    width, height = draw.textlength(label, font) + 4, FONT_SIZE + 4
    x = max(0.0, min(x0, size[0] - width))
    candidates = [(x, y, x + width, y + height) for y in (y0 - height, y0, y1, y1 - height)]
    candidates = [p for p in candidates if p[1] >= 0 and p[3] <= size[1]] or [(x, 0.0, x + width, float(height))]
    place = next((p for p in candidates if not any(_overlap(p, other) for other in taken)), candidates[0])
    taken.append(place)
    red, green, blue = color
    text_color = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else "white"  # luma of ITU-R BT.601
    draw.rectangle(place, fill=color)
    draw.text((place[0] + 2, place[1] + 1), label, text_color, font)


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
