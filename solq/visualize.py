"""Draw ground truth and predictions side by side."""

from pathlib import Path

from PIL import Image

from solq.data.image import read_annotated_image
from solq.drawing import LEGIBLE_SIDE, compose_page, draw_instances
from solq.evaluation import CocoEvaluator


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
    panels: list[Image.Image] = []
    for image_id in seen[:: max(1, len(seen) // count)][:count]:
        entry = entries[image_id]
        image = read_annotated_image(images / entry["file_name"], (entry["height"], entry["width"]))
        truth, found = evaluator.ground_truth(image_id), evaluator.predictions(image_id)
        found = found[found.scores >= threshold]
        scale = LEGIBLE_SIDE / max(image.shape[-2:])
        panels.append(draw_instances(image, truth.boxes, truth.scores, truth.class_names, truth.masks, scale))
        panels.append(draw_instances(image, found.boxes, found.scores, found.names_and_scores, found.masks, scale))
    across = 2 if len(panels) < 8 else 4  # panels side by side
    titles = ["ground truth", f"predictions of score {threshold:g} or more"] * (across // 2)
    return compose_page([panels[i : i + across] for i in range(0, len(panels), across)], titles)
