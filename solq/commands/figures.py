"""`solq figures`: the paper's pictures of a trained model's own predictions."""

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import box_convert

from solq.commands.settings import FiguresConfig
from solq.data.image import ImageLike, expand_folders, pil_image, read_rgb
from solq.detections import Detections
from solq.drawing import MARGIN, TITLE_SIZE, compose_page
from solq.models.base import Attention
from solq.predictor import Predictor

PANEL_SIDE = 560  # pixels of a panel's longer side
SUPERSAMPLING = 3  # pictures are drawn so many times larger, then reduced: smooth circles and lines
COLORS = ((48, 60, 190), (40, 170, 235), (120, 230, 110), (255, 215, 40), (245, 70, 30))  # from no weight to the most


def figures(config: FiguresConfig) -> None:
    """Write NAME-attention.png for each image, and NAME-compared.png if there is a model to compare with.

    A model whose stages each predict a mask is drawn stage by stage instead, in NAME-stages.png.

    Images that cannot be used are reported in a line each, and the status is then 1.
    """
    if not config.images:
        raise ValueError("no images are given: name files or folders")
    if config.objects < 1:
        raise ValueError(f"objects is {config.objects}, must be at least 1")
    predictor = Predictor(config.checkpoint, device=config.device)
    layers = predictor.model.config.num_layers
    if not -layers <= config.layer < layers:
        raise ValueError(f"layer is {config.layer}, must be in {-layers}..{layers - 1}")
    other = None if config.compare is None else Predictor(config.compare, device=config.device)
    config.output.mkdir(parents=True, exist_ok=True)
    failed = 0
    for image in expand_folders(config.images):
        assert isinstance(image, Path)
        try:
            if predictor.model.masks.masks_in_every_layer:
                pages = {"stages": stages_figure(predictor, image, config.objects, config.threshold)}
            else:
                page = attention_figure(predictor, image, config.objects, config.layer, config.threshold)
                pages = {"attention": page}
            if other is not None:
                pages["compared"] = comparison_figure([predictor, other], image, config.threshold)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
            continue
        for name, page in pages.items():
            path = config.output / f"{image.stem}-{name}.png"
            page.save(path)
            print(path)
    if failed:
        print(f"error: {failed} of the images could not be drawn, see above", file=sys.stderr)
        raise SystemExit(1)


# ---- attention


def attend(
    predictor: Predictor, image: ImageLike, layer: int = -1, threshold: float = 0.4
) -> tuple[Detections, Attention]:
    """Return the detections of one image, and the attention of all queries in one decoder layer."""
    with predictor.model.record_attention(layer) as recorded:
        detections = predictor(image, threshold=threshold)
    assert isinstance(detections, Detections)
    return detections, recorded[0]


def attention_figure(
    predictor: Predictor, image: ImageLike, objects: int = 3, layer: int = -1, threshold: float = 0.4
) -> Image.Image:
    """Draw an image with its detections, then for each of the best the points that its query sampled, by weight.

    Raises:
        ValueError: the model finds no object in the image.
        OSError: the image cannot be read.
    """
    pixels = read_rgb(image)
    try:
        detections, attention = attend(predictor, pixels, layer, threshold)
    except ValueError as error:
        raise ValueError(f"{image}: {error}") from error
    if not len(detections):
        raise ValueError(f"{image}: nothing has a score of {threshold} or more: lower --threshold to see more")
    detections = detections.to("cpu")
    assert detections.queries is not None
    queries = detections.queries.tolist()
    panels = [("1 object" if len(detections) == 1 else f"{len(detections)} objects", detections.draw(pixels))]
    shown = [(query, n) for n, query in enumerate(queries) if query not in queries[:n]][:objects]  # a query once
    largest = max(float(attention.weights[query].max()) for query, _ in shown)
    for query, index in shown:
        weights = attention.weights[query] / largest
        panel = _draw_attention(pil_image(pixels), attention.locations[query], weights, detections[index : index + 1])
        panels.append((detections.names_and_scores[index], panel))
    return _add_scale(_page(panels), f"attention weight, 0 to {largest:.2f}")


def _draw_attention(image: Image.Image, locations: Tensor, weights: Tensor, detection: Detections) -> Image.Image:
    """Draw the image, darker outside the object, with its box and the sampling points; weights are in 0..1."""
    size = _panel_size(image, SUPERSAMPLING)
    gray = Image.blend(image.convert("L").convert("RGB"), image, 0.35).resize(size, Image.Resampling.BICUBIC)
    canvas = gray.point(lambda value: value * 0.45)
    if detection.masks is not None:
        mask = Image.fromarray(detection.masks[0].byte().numpy() * 255).resize(size, Image.Resampling.BILINEAR)
        canvas.paste(gray.point(lambda value: min(255, value * 0.8 + 25)), mask=mask)
    _draw_box(canvas, image, detection.boxes[0], (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    order = weights.flatten().argsort()  # the heaviest on top
    points, shares = locations.flatten(0, 2)[order].cpu(), weights.flatten()[order].cpu()
    for (x, y), share in zip((points * torch.tensor(size)).tolist(), shares.tolist(), strict=True):
        radius = SUPERSAMPLING * (2.5 + 5.0 * share**0.5)
        circle = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(circle, fill=_color(share), outline="black", width=SUPERSAMPLING // 2)
    return canvas.resize(_panel_size(image), Image.Resampling.LANCZOS)


def _add_scale(page: Image.Image, label: str) -> Image.Image:
    """Add the scale of colors below a page."""
    taller = Image.new("RGB", (page.width, page.height + TITLE_SIZE + MARGIN), "white")
    taller.paste(page)
    draw, font = ImageDraw.Draw(taller), ImageFont.load_default(TITLE_SIZE)
    left, top, length = page.width - MARGIN - 220, page.height, 220
    for step in range(length):
        draw.line((left + step, top, left + step, top + TITLE_SIZE), _color(step / (length - 1)))
    draw.text((left - MARGIN - draw.textlength(label, font), top - 2), label, "black", font)
    return taller


def _color(share: float) -> tuple[int, int, int]:
    """Interpolate the color of a weight in 0..1 between those of COLORS."""
    steps = list(pairwise(COLORS))
    step = min(int(share * len(steps)), len(steps) - 1)
    part = share * len(steps) - step
    red, green, blue = (round(low + part * (high - low)) for low, high in zip(*steps[step], strict=True))
    return red, green, blue


# ---- stages


def stages_figure(predictor: Predictor, image: ImageLike, objects: int = 3, threshold: float = 0.4) -> Image.Image:
    """Draw a row for each of the best objects: its box moving through the stages, and its mask after each of them.

    Raises:
        ValueError: the model finds no object in the image.
        OSError: the image cannot be read.
    """
    pixels = read_rgb(image)
    with predictor.model.record_outputs() as recorded:
        detections = predictor(pixels, threshold=threshold)
    assert isinstance(detections, Detections)
    if not len(detections):
        raise ValueError(f"{image}: nothing has a score of {threshold} or more: lower --threshold to see more")
    detections = detections[:objects]
    queries, (height, width) = detections.queries, pixels.shape[-2:]
    assert queries is not None
    centers = recorded[0]["pred_boxes"][:, 0, queries].float()  # (L, K, 4)
    boxes = box_convert(centers, "cxcywh", "xyxy")
    boxes = boxes * boxes.new_tensor([width, height, width, height])
    with torch.inference_mode():
        masks = predictor.model.masks.masks_by_layer(recorded[0], 0, queries, detections.labels, boxes, (height, width))
    picture, boxes, masks = pil_image(pixels), boxes.cpu(), masks.cpu()
    rows = [
        [_draw_path(picture, path), *(_draw_mask(picture, *stage) for stage in zip(of_object, path, strict=True))]
        for path, of_object in zip(boxes.unbind(1), masks.unbind(1), strict=True)
    ]
    return compose_page(rows, ["boxes, first to last", *(f"stage {stage}" for stage in range(1, len(boxes) + 1))])


def _draw_path(image: Image.Image, boxes: Tensor) -> Image.Image:
    """Draw the boxes (L, 4) of an object after each stage, colored from the first to the last."""
    canvas = image.resize(_panel_size(image, SUPERSAMPLING), Image.Resampling.BICUBIC)
    for stage, box in enumerate(boxes):
        _draw_box(canvas, image, box, _color(stage / max(1, len(boxes) - 1)))
    return canvas.resize(_panel_size(image), Image.Resampling.LANCZOS)


def _draw_mask(image: Image.Image, mask: Tensor, box: Tensor) -> Image.Image:
    """Draw the image, darker outside a mask (H, W), with its box (4,)."""
    size = _panel_size(image, SUPERSAMPLING)
    bright = image.resize(size, Image.Resampling.BICUBIC)
    canvas = bright.point(lambda value: value * 0.35)
    canvas.paste(bright, mask=Image.fromarray(mask.byte().numpy() * 255).resize(size, Image.Resampling.BILINEAR))
    _draw_box(canvas, image, box, (255, 255, 255))
    return canvas.resize(_panel_size(image), Image.Resampling.LANCZOS)


def _draw_box(canvas: Image.Image, image: Image.Image, box: Tensor, color: tuple[int, int, int]) -> None:
    """Draw a box (4,) in pixels of an image on an enlarged canvas of it."""
    x_scale, y_scale = canvas.width / image.width, canvas.height / image.height
    x0, y0, x1, y1 = box.tolist()
    corners = (x0 * x_scale, y0 * y_scale, max(x0, x1) * x_scale, max(y0, y1) * y_scale)
    ImageDraw.Draw(canvas).rectangle(corners, outline=color, width=2 * SUPERSAMPLING)


# ---- two models


def comparison_figure(predictors: Sequence[Predictor], image: ImageLike, threshold: float = 0.4) -> Image.Image:
    """Draw an image, and beside it the objects that each of some models finds in it.

    Raises:
        OSError, ValueError: the image cannot be read.
    """
    pixels = read_rgb(image)
    panels = [("image", pil_image(pixels))]
    for predictor in predictors:
        detections = predictor(pixels, threshold=threshold)
        assert isinstance(detections, Detections)
        panels.append((f"{predictor.model.masks.title}, {len(detections)} objects", detections.draw(pixels)))
    return _page(panels)


def _page(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Put pictures in a row, each with its title above it."""
    titles, pictures = zip(*panels, strict=True)
    row = [picture.resize(_panel_size(picture), Image.Resampling.LANCZOS) for picture in pictures]
    return compose_page([row], titles)


def _panel_size(image: Image.Image, supersampling: int = 1) -> tuple[int, int]:
    factor = supersampling * PANEL_SIDE / max(image.size)
    return max(1, round(image.width * factor)), max(1, round(image.height * factor))
