"""Report on a trained model: COCO's numbers, all detections, and pictures of some."""

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from solq.data.coco import CocoDataset
from solq.evaluation import CocoEvaluator, evaluate, table
from solq.files import write_json
from solq.models.base import InstanceSegmenter
from solq.training.config import TrainConfig
from solq.training.run_log import console, say
from solq.visualize import comparison_page
from solq.weights import save


def write_report(
    model: InstanceSegmenter,
    val_set: CocoDataset,
    config: TrainConfig,
    output: Path,
    device: torch.device,
    amp_dtype: torch.dtype | None,
) -> None:
    """Score the model on the validation set; write metrics.json, results.json, predictions.png, model.safetensors.

    All processes take part; the first one writes.

    Raises:
        ValueError: no image of the validation set can be read.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    evaluator = CocoEvaluator(val_set.coco_json, val_set.category_ids, boundary=config.boundary_ap)
    evaluate(
        model,
        val_set,
        evaluator,
        device,
        batch_size=max(1, config.batch_size // config.accumulate // world_size),
        workers=config.workers,
        autocast_dtype=amp_dtype,
        console=console,
    )
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
