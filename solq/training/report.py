"""The report on a trained model: COCO's numbers, its detections, and a picture of some of them."""

import functools
import json
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import Progress
from torch.utils.data import DataLoader, Subset

from solq.data.batch import collate, padded_sizes
from solq.data.coco import CocoDataset
from solq.evaluation import CocoEvaluator, evaluate, table
from solq.models.base import InstanceSegmenter
from solq.training.config import TrainConfig
from solq.training.run_log import console, say, start_worker
from solq.visualize import comparison_grid, comparison_rows
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
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    part = Subset(val_set, range(rank, len(val_set), world_size))
    loader = DataLoader(
        part,
        batch_size=max(1, config.batch_size // config.accumulate // world_size),
        collate_fn=functools.partial(collate, sizes=padded_sizes((config.eval_scale,), config.max_size)),
        num_workers=config.workers,
        worker_init_fn=start_worker,
    )
    evaluator = CocoEvaluator(val_set.coco_json, val_set.category_ids, boundary=config.boundary_ap)
    with Progress(console=console, disable=rank != 0) as progress:
        task = progress.add_task("evaluation", total=len(part))
        advance = functools.partial(progress.advance, task)
        evaluate(model, loader, evaluator, device, autocast_dtype=amp_dtype, progress=advance)
    if rank != 0:
        return
    if not evaluator.image_ids:
        raise ValueError(f"no image of {val_set.coco_json} can be read: restore the files in {val_set.images}")
    metrics = evaluator.summarize()
    console.print(table(metrics))
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    evaluator.save(output / "results.json")
    rows = comparison_rows(evaluator, val_set.images)
    comparison_grid(rows, val_set.class_names, output / "predictions.png", threshold=0.4)
    save(model, output / "model.safetensors")
    say(
        f"metrics, results in COCO's format and pictures are in {output}; look at {output / 'predictions.png'}, or at "
        "any image with the trained model:"
    )
    image = val_set.images / evaluator.dataset["images"][0]["file_name"]
    command = "solq" if shutil.which("solq") else f"{sys.executable} -m solq"
    say(f"{command} predict {output / 'model.safetensors'} {image} --output {output / 'pictures'}")
