"""Report on a trained model: COCO's numbers, all detections, and pictures of some."""

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from solq.data.coco import CocoDataset
from solq.devices import Precision
from solq.evaluation import CocoEvaluator, evaluate, table
from solq.files import write_json
from solq.models.base import InstanceSegmenter
from solq.progress import console, say
from solq.training.config import TrainConfig
from solq.training.loaders import TrainingData
from solq.visualize import comparison_page
from solq.weights import save


def say_start(
    config: TrainConfig,
    model: InstanceSegmenter,
    data: TrainingData,
    device: torch.device,
    precision: Precision,
    num_graphs: int,
    steps: range,
) -> None:
    """Say what a run is about to do: model, data, device and length."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    kind = f"{type(model).__name__} on {config.model.backbone}"
    say(f"model   {config.preset}: {kind}, {parameters / 1e6:.1f} million parameters")
    train_set, val_set = data.train_set, data.val_set
    classes = sum(map(bool, train_set.class_names))
    say(
        f"data    {len(train_set):,} images with {train_set.num_instances:,} objects of {classes} classes, "
        f"{len(val_set):,} images to evaluate on, in {train_set.images.parent}"
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    graphs = f"graphs to compile: {num_graphs}" if num_graphs else "not compiled"
    say(f"device  {device} ({name}), precision {precision}, {graphs}")
    say(f"steps   {steps.start + 1:,} to {steps.stop:,}, of {config.batch_size} images")


def write_report(
    model: InstanceSegmenter,
    val_set: CocoDataset,
    config: TrainConfig,
    output: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Score the model on the validation set; write metrics.json, results.json, predictions.png, model.safetensors.

    All processes take part; the first one writes.

    Raises:
        ValueError: no image of the validation set can be read.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    evaluator = CocoEvaluator(val_set.coco_json, val_set.category_ids, boundary=config.boundary_ap)
    batch_size = max(1, config.batch_size // config.accumulate // world_size)
    evaluate(model, val_set, evaluator, device, dtype, batch_size=batch_size, workers=config.workers)
    if rank != 0:
        return
    metrics = evaluator.summarize()
    console.print(table(metrics))
    write_json(output / "metrics.json", metrics, indent=1)
    write_json(output / "results.json", evaluator.results())
    comparison_page(evaluator, val_set.images, threshold=0.4).save(output / "predictions.png")
    save(model, output / "model.safetensors")
    say(
        f"metrics, results in COCO's format and pictures are in {output}; look at {output / 'predictions.png'}, or at "
        "any image with the trained model:"
    )
    image = val_set.images / evaluator.dataset["images"][0]["file_name"]
    command = "solq" if shutil.which("solq") else f"{sys.executable} -m solq"
    say(f"{command} predict {output / 'model.safetensors'} {image} --output {output / 'pictures'}")
