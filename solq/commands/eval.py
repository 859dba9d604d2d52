"""`solq eval`: score a checkpoint on a dataset by COCO's numbers, and measure its size, operations and speed."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from solq.commands.settings import EvalConfig
from solq.data.annotations import read_coco, split_paths
from solq.data.coco import CocoDataset
from solq.data.transforms import EvalTransform
from solq.devices import choose_device, choose_precision
from solq.errors import check_at_least
from solq.evaluation import CocoEvaluator, class_table, evaluate, numbers_right, table
from solq.files import write_json
from solq.models.base import InstanceSegmenter
from solq.predictor import Predictor
from solq.progress import console, say, track
from solq.weights import load

INPUT_SIZE = (512, 852)  # height and width of the image in the paper's Table 5


def evaluate_checkpoint(config: EvalConfig) -> dict[str, float]:
    """Print the tables, write metrics.json and results.json, return the metrics; none without annotations."""
    device = choose_device(config.device)
    check_at_least(1, size=config.size, max_size=config.max_size, batch_size=config.batch_size)
    check_at_least(0, workers=config.workers)
    model = load(config.checkpoint)
    config.output.mkdir(parents=True, exist_ok=True)  # before hours of computing
    folder, annotations = split_paths(config.data, config.split)
    folder = config.images or folder
    image_list = annotations.with_name(f"image_info_{config.split}.json")
    if image_list.is_file() and not annotations.is_file():
        predict_listed(config, model, folder, image_list)
        return {}
    transform = EvalTransform(config.size or model.meta.eval_scale, config.max_size or model.meta.max_size)
    dataset = CocoDataset(folder, annotations, transform, train=False)
    evaluator = CocoEvaluator(dataset.coco_json, categories_of_labels(model, dataset), boundary=config.boundary)
    precision = choose_precision(device, config.precision)
    say(f"device {device}, precision {precision}")
    costs = measure(model, device, precision.dtype)
    console.print(cost_table(costs, device))
    batch_size = config.batch_size or (8 if device.type == "cuda" else 1)
    evaluate(model, dataset, evaluator, device, precision.dtype, batch_size=batch_size, workers=config.workers)
    write_json(config.output / "results.json", evaluator.results())
    metrics = evaluator.summarize(per_class=config.per_class)
    console.print(table(metrics))
    if config.per_class:
        console.print(class_table(metrics))
    metrics |= costs
    write_json(config.output / "metrics.json", metrics, indent=1)
    console.print(f"metrics.json and results.json are in {config.output}", soft_wrap=True)
    return metrics


def predict_listed(config: EvalConfig, model: InstanceSegmenter, folder: Path, image_list: Path) -> None:
    """Write results.json for the images in a list without annotations, as COCO's test server takes it.

    Raises:
        OSError, ValueError: the list or one of the images cannot be used; the server wants all of them.
    """
    images = {folder / image["file_name"]: image["id"] for image in read_coco(image_list, ["images"])["images"]}
    predictor = Predictor(
        model,
        device=config.device,
        dtype=choose_precision(choose_device(config.device), config.precision).dtype,
        size=config.size,
        max_size=config.max_size,
        batch_size=config.batch_size,
    )
    results = []
    stream = predictor.stream(images, threshold=0)
    for prediction in track(stream, "prediction", len(images)):
        if prediction.error is not None:
            raise prediction.error
        assert prediction.detections is not None
        assert isinstance(prediction.source, Path)
        results += prediction.detections.to_coco(images[prediction.source])
    write_json(config.output / "results.json", results)
    console.print(f"{image_list} has no annotations to score against: results.json is in {config.output}")


def categories_of_labels(model: InstanceSegmenter, dataset: CocoDataset) -> list[int]:
    """Return the dataset's category for each of the model's labels.

    Raises:
        ValueError: the model's classes are not those of the dataset; names are compared where the model has them.
    """
    in_dataset = {i: name for i, name in zip(dataset.category_ids, dataset.class_names, strict=True) if name}
    ids = model.meta.category_ids or dataset.category_ids
    if len(ids) != model.config.num_classes:
        raise ValueError(
            f"the model has {model.config.num_classes} classes but {dataset.coco_json} has {len(ids)}: "
            "evaluate on the dataset that it was trained for"
        )
    in_model = {i: name for i, name in zip(ids, model.meta.class_names or [""] * len(ids), strict=True) if name}
    for category, name in in_dataset.items():
        known = in_model.get(category)
        if (in_model and known != name) or category not in ids:
            raise ValueError(
                f"category {category} of {dataset.coco_json} is {name!r}, but {known!r} in the model: "
                "evaluate on the dataset that it was trained for"
            )
    return ids


@torch.no_grad()
def measure(model: InstanceSegmenter, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure parameters, operations and time for one image of 512×852 with masks of 100 objects (paper, Table 5).

    Returns:
        `parameters`, `flops` and `seconds` of detector and masks together, and `mask_parameters`, `mask_flops` and
        `mask_seconds`, the part that the masks add. A multiplication and an addition are two operations; those of
        matrix products and convolutions are counted, in the heads of all decoder layers.
    """
    model = model.to(device).eval()
    on_meta = copy.deepcopy(model).to("meta").requires_grad_(False)  # the counter fails on views that need a gradient
    counter = FlopCounterMode(display=False)
    with counter:
        on_meta(torch.zeros(1, 3, *INPUT_SIZE, device="meta"), torch.zeros(1, *INPUT_SIZE, device="meta") > 0)
    counts = counter.get_flop_counts()

    images = torch.randn(1, 3, *INPUT_SIZE, device=device)
    padding_mask = torch.zeros(1, *INPUT_SIZE, dtype=torch.bool, device=device)

    def forward() -> Any:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(images, padding_mask)

    outputs, sizes = forward(), torch.tensor([INPUT_SIZE])
    network = seconds_of(forward, device)
    with_masks = seconds_of(lambda: model.postprocess(outputs, sizes), device)
    boxes_only = seconds_of(lambda: model.postprocess(outputs, sizes, with_masks=False), device)
    return {
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "mask_parameters": float(sum(p.numel() for p in model.masks.parameters())),
        "flops": float(counter.get_total_flops()),
        "mask_flops": float(sum(counts.get(f"{type(model).__name__}.masks", {}).values())),
        "seconds": network + with_masks,
        "mask_seconds": with_masks - boxes_only,
    }


def seconds_of(function: Callable[[], object], device: torch.device, repetitions: int = 3) -> float:
    """Return the median time of a call."""
    times = []
    for _ in range(repetitions):
        clock = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - clock)
    return median(times)


def cost_table(costs: dict[str, float], device: torch.device) -> Table:
    """Show the columns of the paper's Table 5."""
    height, width = INPUT_SIZE
    rows = Table("", "parameters (M)", "FLOPs (G)", "images/s", title=f"one image of {height}×{width} on {device}")
    for name, part, speed in (("all", "", f"{1 / costs['seconds']:.2f}"), ("masks alone", "mask_", "")):
        rows.add_row(name, f"{costs[part + 'parameters'] / 1e6:.2f}", f"{costs[part + 'flops'] / 1e9:.2f}", speed)
    return numbers_right(rows)
