"""`solq eval`: a checkpoint and a dataset to COCO's numbers, and to what the model costs."""

import copy
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from solq.commands.predict import DTYPES
from solq.data.batch import collate, padded_sizes
from solq.data.coco import CocoDataset
from solq.data.transforms import EvalTransform
from solq.devices import choose_device
from solq.evaluation import CocoEvaluator, class_table, evaluate, table
from solq.models.base import InstanceSegmenter
from solq.predictor import Predictor
from solq.weights import load

INPUT_SIZE = (512, 852)  # height and width of the images of the paper's Table 5


@dataclass
class EvalConfig:
    """Score a model on a dataset in COCO's layout, and measure what it costs (Table 5 of the paper)."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A file of solq.save, of train.py, or an official SOLQ checkpoint."""
    data: Path
    """Folder of the dataset."""
    split: str = "val2017"
    """Images in DATA/<split>/, annotations in DATA/annotations/instances_<split>.json; or, of a split without
    annotations as COCO's test-dev2017, their list in image_info_<split>.json: then results.json is all there is."""
    images: Path | None = None
    """Folder of the images, if it is another one, as DATA/test2017 for test-dev2017."""
    output: Path = Path("evaluation")
    """Folder for metrics.json, and results.json in the format of COCO's test server."""
    boundary: bool = False
    """Boundary AP too (Table 4)."""
    per_class: bool = False
    """The AP of every class too."""
    size: int | None = None
    """Length of the shorter image side; as in training unless given."""
    max_size: int | None = None
    """Bound of the longer side; as in training unless given."""
    batch_size: int | None = None
    """8 on a GPU, 1 on a CPU unless given."""
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Lower than float32 is automatic mixed precision."""
    workers: int = 2
    """Processes that load images."""


def evaluate_checkpoint(config: EvalConfig) -> dict[str, float]:
    """Print the tables, write metrics.json and results.json, return the metrics; none without annotations.

    Raises:
        OSError, ValueError: the checkpoint or the dataset cannot be used, or their classes are not the same.
    """
    console = Console()
    device = choose_device(config.device)
    for name, least in (("size", 1), ("max_size", 1), ("batch_size", 1), ("workers", 0)):
        if (number := getattr(config, name)) is not None and number < least:
            raise ValueError(f"{name} is {number}, must be at least {least}")
    model = load(config.checkpoint)
    config.output.mkdir(parents=True, exist_ok=True)  # before hours of computing
    size, max_size = config.size or model.meta.eval_scale, config.max_size or model.meta.max_size
    folder = config.images or config.data / config.split
    annotations = config.data / "annotations" / f"instances_{config.split}.json"
    image_list = annotations.with_name(f"image_info_{config.split}.json")
    if image_list.is_file() and not annotations.is_file():
        predict_listed(config, model, folder, image_list, console)
        return {}
    dataset = CocoDataset(
        folder,
        annotations,
        EvalTransform(size, max_size),
        train=False,
    )
    evaluator = CocoEvaluator(dataset.coco_json, categories_of_labels(model, dataset), boundary=config.boundary)
    costs = measure(model, device, DTYPES[config.dtype])
    console.print(cost_table(costs, device))
    loader = DataLoader(
        dataset,
        batch_size=config.batch_size or (8 if device.type == "cuda" else 1),
        collate_fn=functools.partial(collate, sizes=padded_sizes((size,), max_size)),
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
    )
    amp_dtype = None if config.dtype == "float32" else DTYPES[config.dtype]
    with Progress(console=console) as progress:
        task = progress.add_task("evaluation", total=len(dataset))
        advance = functools.partial(progress.advance, task)
        evaluate(model, loader, evaluator, device, autocast_dtype=amp_dtype, progress=advance)
    if not evaluator.image_ids:
        raise ValueError(f"no image of {dataset.coco_json} can be read: restore the files in {dataset.images}")

    evaluator.save(config.output / "results.json")
    metrics = evaluator.summarize(per_class=config.per_class)
    console.print(table(metrics))
    if config.per_class:
        console.print(class_table(metrics))
    metrics |= costs
    (config.output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    console.print(f"metrics.json and results.json are in {config.output}", soft_wrap=True)
    return metrics


def predict_listed(
    config: EvalConfig, model: InstanceSegmenter, folder: Path, image_list: Path, console: Console
) -> None:
    """Write results.json of the images in a list without annotations, for COCO's test server.

    Raises:
        OSError, ValueError: the list or one of the images cannot be used; the server wants all of them.
    """
    try:
        images = {folder / image["file_name"]: image["id"] for image in json.loads(image_list.read_bytes())["images"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{image_list} is no list of images in COCO's format: {error!r}") from error
    predictor = Predictor(
        model,
        device=config.device,
        dtype=DTYPES[config.dtype],
        size=config.size,
        max_size=config.max_size,
        batch_size=config.batch_size,
    )
    results = []
    with Progress(console=console) as progress:
        task = progress.add_task("prediction", total=len(images))
        for prediction in predictor.stream(images, threshold=0):
            if prediction.error is not None:
                raise prediction.error
            assert prediction.detections is not None
            assert isinstance(prediction.source, Path)
            results += prediction.detections.to_coco(images[prediction.source])
            progress.advance(task)
    (config.output / "results.json").write_text(json.dumps(results))
    console.print(f"{image_list} has no annotations to score against: results.json is in {config.output}")


def categories_of_labels(model: InstanceSegmenter, dataset: CocoDataset) -> list[int]:
    """The dataset's category of each of the model's labels.

    Raises:
        ValueError: if the model's classes are not those of the dataset, by their names where these are known.
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
        if (in_model and in_model.get(category) != name) or category not in ids:
            raise ValueError(
                f"category {category} of {dataset.coco_json} is {name!r}, but {in_model.get(category)!r} in the model: "
                "evaluate on the dataset that it was trained for"
            )
    return ids


@torch.no_grad()
def measure(model: InstanceSegmenter, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Parameters, operations and time of one image of 512×852, with masks of 100 objects, as in the paper's Table 5.

    Returns:
        `parameters`, `flops`, `seconds` of detector and masks together, and `mask_parameters`, `mask_flops`,
        `mask_seconds` of what masks add. A multiplication and an addition are two operations; those of matrix products
        and convolutions are counted, of all decoder layers' heads.
    """
    model = model.to(device).eval()
    on_meta = copy.deepcopy(model).to("meta").requires_grad_(False)  # the counter asks views of weights for their graph
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
    """The median time of a call."""
    times = []
    for _ in range(repetitions):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        clock = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - clock)
    return median(times)


def cost_table(costs: dict[str, float], device: torch.device) -> Table:
    """The columns of the paper's Table 5."""
    height, width = INPUT_SIZE
    rows = Table("", "parameters (M)", "FLOPs (G)", "images/s", title=f"one image of {height}×{width} on {device}")
    for column in rows.columns[1:]:
        column.justify = "right"
    rows.add_row(
        "all", f"{costs['parameters'] / 1e6:.2f}", f"{costs['flops'] / 1e9:.2f}", f"{1 / costs['seconds']:.2f}"
    )
    rows.add_row("of it masks", f"{costs['mask_parameters'] / 1e6:.2f}", f"{costs['mask_flops'] / 1e9:.2f}", "")
    return rows
