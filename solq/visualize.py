"""Draw ground truth and predictions side by side."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from solq.data.image import read_annotated_image
from solq.drawing import FONT_SIZE, LEGIBLE_SIDE, draw_instances
from solq.evaluation import CocoEvaluator

MARGIN = 12  # pixels between the pictures of a page


def comparison_page(evaluator: CocoEvaluator, images: Path, threshold: float = 0.5, count: int = 8) -> Image.Image:
    """Draw the ground truth and the predictions for some of the evaluated images, spread evenly over them.

    Args:
        evaluator: after `evaluate`, on a process that has gathered.
        images: folder of the images.
        threshold: predictions of a lower score are not drawn.
        count: number of images to draw.

    Raises:
        ValueError: no image was evaluated.
    """
    entries = {image["id"]: image for image in evaluator.dataset["images"]}
    seen = evaluator.image_ids
    if not seen:
        raise ValueError("no image was evaluated: a comparison needs at least one")
    pairs = []
    for image_id in seen[:: max(1, len(seen) // count)][:count]:
        entry = entries[image_id]
        image = read_annotated_image(images / entry["file_name"], (entry["height"], entry["width"]))
        truth, found = evaluator.ground_truth(image_id), evaluator.predictions(image_id)
        found = found[found.scores >= threshold]
        scale = LEGIBLE_SIDE / max(image.shape[-2:])
        left = draw_instances(image, truth.boxes, truth.scores, truth.class_names, truth.masks, scale)
        right = draw_instances(image, found.boxes, found.scores, found.names_and_scores, found.masks, scale)
        pairs.append((left, right))

    across = 1 if len(pairs) < 4 else 2  # pairs side by side
    lines = [pairs[i : i + across] for i in range(0, len(pairs), across)]
    cell = max(panel.width for pair in pairs for panel in pair) + MARGIN
    heights = [max(panel.height for pair in line for panel in pair) + MARGIN for line in lines]
    title_font = ImageFont.load_default(FONT_SIZE + 5)
    top = FONT_SIZE + 5 + 2 * MARGIN
    page = Image.new("RGB", (MARGIN + across * (2 * cell + MARGIN), top + sum(heights)), "white")
    draw = ImageDraw.Draw(page)
    columns = [MARGIN + column * (2 * cell + MARGIN) for column in range(across)]
    for x in columns:
        draw.text((x, MARGIN), "ground truth", "black", title_font)
        draw.text((x + cell, MARGIN), f"predictions of score {threshold:g} or more", "black", title_font)
    for line, height in zip(lines, heights, strict=True):
        for x, (left, right) in zip(columns, line, strict=False):
            page.paste(left, (x, top))
            page.paste(right, (x + cell, top))
        top += height
    return page
