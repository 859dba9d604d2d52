"""Train, evaluate and show an instance-segmentation model: `python train.py --amp --compile`.

The whole loop, to be read from top to bottom. `python train.py --help` lists every setting; `torchrun
--nproc-per-node=N train.py …` is the same run on N processes.
"""

import argparse
import contextlib
import functools
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset
from torch.utils.tensorboard import SummaryWriter

from solq.checkpoint import load_checkpoint, load_newest, save_checkpoint
from solq.config import ModelMeta, Preset, TrainConfig, preset
from solq.criterion import SetCriterion
from solq.data import shapes
from solq.data.batch import Batch, PackedTargets, collate, normalize, padded_sizes
from solq.data.coco import CocoDataset
from solq.data.sampler import TrainSampler
from solq.data.transforms import EvalTransform, TrainTransform
from solq.evaluation import CocoEvaluator, evaluate, table
from solq.matcher import HungarianMatcher
from solq.models.backbone import load_backbone_weights
from solq.models.mask_coding import build_mask_coding
from solq.models.mask_coding import load as load_mask_coding
from solq.models.solq import SOLQ
from solq.visualize import draw_predictions
from solq.weights import save

console = Console()


def main() -> None:
    config = command_line()
    rank, world_size, device = start_process(config)
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_path=False, show_time=False)],
    )
    try:
        train(config, rank, world_size, device)
    except (OSError, ValueError) as error:  # of the input or the machine: the message says what to do
        # A worker process sends its traceback along; the last line is the error.
        sys.exit(f"error: {str(error).strip().splitlines()[-1]}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def command_line() -> TrainConfig:
    """The settings of the preset, changed by the flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=get_args(Preset), default="shapes")
    first.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    chosen, _ = first.parse_known_args()
    cpu = chosen.device == "cpu" or (chosen.device == "auto" and not torch.cuda.is_available())
    return tyro.cli(TrainConfig, default=preset(chosen.preset, cpu=cpu), description=__doc__)


def start_process(config: TrainConfig) -> tuple[int, int, torch.device]:
    """Join the other processes, if torchrun started any; rank, number of processes, and the device of this one."""
    kind = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda was given but torch finds no GPU: use --device cpu, or check the driver")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if "RANK" not in os.environ:
        return 0, 1, device
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def train(config: TrainConfig, rank: int, world_size: int, device: torch.device) -> None:
    output = run_folder(config, rank)
    is_main = rank == 0
    state = load_newest(output / "checkpoints") if config.resume else None

    # ---- data
    train_set, val_set = datasets(config, output, is_main)
    start = state["step"] if state else 0
    sampler = TrainSampler(
        len(train_set),
        config.batch_size // config.accumulate,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        start_step=start * config.accumulate,
        groups=train_set.image_sizes[:, 0] > train_set.image_sizes[:, 1],  # portraits, landscapes
    )
    steps = config.steps or round(config.epochs * sampler.steps_per_epoch / config.accumulate)
    loading = {
        "num_workers": config.workers,
        "pin_memory": device.type == "cuda",
        "persistent_workers": False,
        "worker_init_fn": ignore_signals,
    }
    sizes = padded_sizes(config.scales, config.max_size)
    loader = DataLoader(train_set, batch_sampler=sampler, collate_fn=functools.partial(collate, sizes=sizes), **loading)

    # ---- model
    torch.manual_seed(config.seed)
    model = SOLQ(replace(config.model, num_classes=train_set.num_classes))
    model.meta = ModelMeta(train_set.class_names, train_set.category_ids, config.eval_scale, config.max_size)
    if state is None and config.init_weights is not None:
        load_init_weights(model, config.init_weights)
    elif state is None and config.backbone_weights != "none":
        load_backbone_weights(model.backbone, config.model.backbone, config.backbone_weights)
    if config.freeze_detector:
        freeze_detector(model)
    if config.mask_coding_weights is not None:
        model.mask_coding.load_state_dict(load_mask_coding(config.mask_coding_weights).state_dict())
    model.to(device)
    criterion = SetCriterion(
        HungarianMatcher(),
        model.mask_coding,
        model.mask_head,
        vector_loss_weight=config.vector_loss_weight,
        vector_loss_start=config.vector_loss_start,
        decoder_layers=config.model.decoder_layers,
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, config), weight_decay=config.weight_decay, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(lr_factor, config=config, steps=steps))
    amp_dtype = mixed_precision(device) if config.amp else None
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
    ema = None
    if config.ema_decay > 0:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
    if state:
        check_same_classes(state, train_set)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        scaler.load_state_dict(state["scaler"])
        if ema:
            ema.load_state_dict(state["ema"])
        console.print(f"continuing {output} after step {start}")

    # The compiled and the parallel model share the weights of `model`, which evaluation runs as it is.
    network: nn.Module = model
    if config.compile:
        torch._dynamo.config.recompile_limit = len(sizes) + 1  # one graph per padded size
        network = torch.compile(model, fullgraph=True, dynamic=False)  # type: ignore[assignment]
    if world_size > 1:
        network = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)

    def report() -> None:
        shown = ema.module if ema else model
        evaluate_and_show(shown, val_set, config, output, rank, world_size, device, amp_dtype)

    def checkpoint(step: int) -> None:
        if is_main:
            save_checkpoint(
                output / "checkpoints",
                step,
                {
                    "step": step,
                    "model": model.state_dict(),
                    "ema": ema.state_dict() if ema else None,
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "scaler": scaler.state_dict(),
                    "config": json.loads(json.dumps(asdict(config), default=str)),
                    "model_config": asdict(model.config),
                    "class_names": train_set.class_names,
                    "category_ids": train_set.category_ids,
                },
            )

    # ---- the loop
    model.train()
    signals = stop_signals()
    log = Log(output, start, steps) if is_main else None
    batches = prefetch(loader, device, blank_batch(sizes[0], train_set.mask_size))
    bad_step = torch.full((), -1, device=device)  # the first step with a loss that is not finite
    clock, images, skipped = time.perf_counter(), 0, 0
    for step in range(start, steps):
        # Random numbers depend on seed, step and process only: a resumed run draws the same ones.
        torch.manual_seed(int(np.random.SeedSequence((config.seed, 2, step, rank)).generate_state(1, np.uint64)[0]))
        parts = [next(batches) for _ in range(config.accumulate)]
        num_boxes = criterion.count_boxes([part.targets for part in parts], config.model.num_queries)
        losses: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            waiting = world_size > 1 and index < len(parts) - 1  # gradients are exchanged with the last part
            with network.no_sync() if waiting else contextlib.nullcontext():  # type: ignore[operator]
                with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
                    outputs = network(normalize(part.images, part.padding_mask), part.padding_mask)
                part_losses = criterion(outputs, part.targets, num_boxes)
                scaler.scale(criterion.total(part_losses)).backward()
            for name, loss in part_losses.items():
                losses[name] = losses.get(name, 0) + loss.detach()
        total = criterion.total(losses)
        bad_step = torch.where((bad_step < 0) & ~total.isfinite(), step, bad_step)
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scheduler.step()
        if ema:
            ema.update_parameters(model)
        images += config.batch_size
        skipped += sum(part.skipped for part in parts)

        done = step + 1
        logs = done % config.log_every == 0 or done == steps
        saves = done % config.save_every == 0 or done == steps
        # Processes agree on a stop where they wait for the device anyway.
        stops = bool(signals) if world_size == 1 else logs and any_process(bool(signals), device)
        if (logs or saves or stops) and int(bad_step) >= 0:
            sys.exit(f"error: {describe_bad_step(int(bad_step), config, sampler, train_set)}")
        if logs:
            values = mean_over_processes({"loss": total, **losses}, device)
            if log:
                seconds = time.perf_counter() - clock
                extra = {"grad_norm": float(grad_norm), "lr": scheduler.get_last_lr()[0], "skipped_images": skipped}
                log.write(done, values | extra, images / seconds)
            clock, images = time.perf_counter(), 0
        if saves or stops:
            checkpoint(done)
        if stops:
            if log:
                log.close()
                console.print(
                    f"stopped after step {done} by {signals[0] if signals else 'another process'}: "
                    f"continue with --resume --output {output}"
                )
            return
        if config.eval_every and done % config.eval_every == 0 and done < steps:
            report()
            clock, images = time.perf_counter(), 0
    if log:
        log.close()
    report()


# ---- what the loop is made of, in the order of its use


def run_folder(config: TrainConfig, rank: int) -> Path:
    """The folder of the run: the given one, or of runs/<preset>, runs/<preset>-2, … the newest or the next."""
    if config.output is not None:
        folder = config.output
        if not config.resume and (folder / "checkpoints").exists() and rank == 0:
            raise ValueError(f"{folder} holds a run already: add --resume to continue it, or name another --output")
    else:
        names = [config.preset, *(f"{config.preset}-{number}" for number in range(2, 10_000))]
        folders = [Path("runs") / name for name in names]
        following = next(index for index, folder in enumerate(folders) if not (folder / "checkpoints").exists())
        folder = folders[max(following - 1, 0)] if config.resume else folders[following]
    if config.resume and not (folder / "checkpoints").exists():
        raise ValueError(f"{folder} holds no checkpoint to continue: leave out --resume, or name its --output")
    folder.mkdir(parents=True, exist_ok=True)
    if dist.is_initialized():
        dist.barrier()  # before another process looks for a free folder
    return folder


def datasets(config: TrainConfig, output: Path, is_main: bool) -> tuple[CocoDataset, CocoDataset]:
    """The training and the validation set; every mistake in their files is found here, before training starts."""
    data = config.data
    if data is None:
        data = output.parent / "shapes-dataset"
        if is_main:
            shapes.generate(data, image_size=config.eval_scale)
        if dist.is_initialized():
            dist.barrier()
    mask_size = build_mask_coding(config.model.mask_coding, config.model.num_coefficients, config.model.mask_size).size
    train_transform = TrainTransform(scales=config.scales, max_size=config.max_size, crop=config.crop)
    eval_transform = EvalTransform(config.eval_scale, config.max_size)
    train_set, val_set = (
        CocoDataset(
            data / split,
            data / "annotations" / f"instances_{split}.json",
            transform,
            mask_size=mask_size,
            train=split == config.train_split,
            strict=config.strict,
        )
        for split, transform in ((config.train_split, train_transform), (config.val_split, eval_transform))
    )
    if train_set.category_ids != val_set.category_ids:
        raise ValueError(
            f"{train_set.coco_json} and {val_set.coco_json} have different categories: use one list for both"
        )
    return train_set, val_set


def load_init_weights(model: SOLQ, path: Path) -> None:
    """Take over the weights of a checkpoint, whose mask branch may be another or none."""
    weights, wanted = load_checkpoint(path)["model"], model.state_dict()
    fitting = {key for key in weights.keys() & wanted.keys() if weights[key].shape == wanted[key].shape}
    branch = ("vector_embed.", "mask_head.", "mask_coding.")
    different = [key for key in (weights.keys() | wanted.keys()) - fitting if not key.startswith(branch)]
    if different:
        raise ValueError(
            f"{path} does not fit this model: {len(different)} tensors are missing or of another shape, "
            f"for example {min(different)}: use the --model settings and the classes that it was trained with"
        )
    model.load_state_dict({key: weights[key] for key in fitting}, strict=False)


def freeze_detector(model: SOLQ) -> None:
    """Leave only the separate mask branch to be trained."""
    if model.mask_head is None:
        raise ValueError("freeze_detector leaves nothing to train without --model.mask-branch separate")
    model.requires_grad_(False)
    model.mask_head.requires_grad_(True)


def parameter_groups(model: SOLQ, config: TrainConfig) -> list[dict[str, Any]]:
    """Backbone, layers that place points, and all others, each with its learning rate."""
    groups: dict[str, list[nn.Parameter]] = {"backbone": [], "points": [], "others": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            places_points = "reference_points" in name or "sampling_offsets" in name
            groups["backbone" if name.startswith("backbone.") else "points" if places_points else "others"].append(
                parameter
            )
    rates = {"backbone": config.lr_backbone, "points": config.lr_points, "others": config.lr}
    return [{"params": parameters, "lr": rates[name]} for name, parameters in groups.items() if parameters]


def lr_factor(step: int, config: TrainConfig, steps: int) -> float:
    """Linear warm-up, then constant, then a tenth."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return warmup * (0.1 if step >= config.lr_drop * steps else 1.0)


def mixed_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it, else float16."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def check_same_classes(state: dict[str, Any], dataset: CocoDataset) -> None:
    if state["class_names"] != dataset.class_names:
        raise ValueError(
            f"the checkpoint was trained on {len(state['class_names'])} classes, "
            f"{', '.join(filter(None, state['class_names'][:5]))}, …, but {dataset.coco_json} has others: "
            "train into a new --output"
        )


def ignore_signals(_: int) -> None:
    """Worker processes go on until the training process, which handles Ctrl-C, is done with them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def stop_signals() -> list[str]:
    """A list that the names of SIGTERM and SIGINT (Ctrl-C) are added to when they arrive; a second Ctrl-C kills."""
    received: list[str] = []

    def receive(number: int, _: object) -> None:
        received.append(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, receive)
    signal.signal(signal.SIGINT, receive)
    return received


def prefetch(loader: DataLoader, device: torch.device, blank: Batch) -> Iterator[Batch]:
    """Batches on the device; the next one is copied while one is computed with.

    A batch whose images are all damaged is replaced by `blank`, so that all processes make the same steps.
    """
    following: Batch | None = None
    for batch in loader:
        current, following = following, (batch if batch is not None else blank).to(device)
        if current is not None:
            yield current


def blank_batch(size: tuple[int, int], mask_size: int) -> Batch:
    """A black image without objects."""
    return Batch(
        torch.zeros(1, 3, *size, dtype=torch.uint8),
        torch.zeros(1, *size, dtype=torch.bool),
        PackedTargets(
            labels=torch.zeros(0, dtype=torch.int64),
            boxes=torch.zeros(0, 4),
            masks=torch.zeros(0, mask_size, mask_size, dtype=torch.uint8),
            offsets=torch.zeros(2, dtype=torch.int64),
            image_ids=torch.tensor([-1]),
            orig_sizes=torch.tensor([size]),
            sizes=torch.tensor([size]),
        ),
    )


def any_process(flag: bool, device: torch.device) -> bool:
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags)
    return bool(flags > 0)


def mean_over_processes(losses: dict[str, Tensor], device: torch.device) -> dict[str, float]:
    values = torch.stack([loss.float() for loss in losses.values()])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return dict(zip(losses, values.tolist(), strict=True))


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True) if path.exists() else []


def describe_bad_step(step: int, config: TrainConfig, sampler: TrainSampler, dataset: CocoDataset) -> str:
    """What a person needs to look into a loss that is not finite."""
    start = step * config.accumulate
    again = TrainSampler(len(dataset), sampler.batch_size, config.seed, start_step=start, groups=sampler.groups)
    keys = [key for batch in islice(again, config.accumulate) for key in batch]
    ids = ", ".join(str(dataset.image_ids[index]) for index, _ in keys)
    return (
        f"the loss of step {step + 1} is not finite; its batch is of images {ids}. No checkpoint has been written "
        "since: look at their annotations, or lower the learning rate, and continue with --resume"
    )


class Log:
    """Progress bar, TensorBoard, and one JSON line per logged step, in log.jsonl."""

    def __init__(self, output: Path, start: int, steps: int) -> None:
        path = output / "log.jsonl"
        kept = [line for line in read_lines(path) if json.loads(line)["step"] <= start]  # later ones are repeated now
        path.write_text("".join(kept))
        self.file = open(path, "a", buffering=1)  # noqa: SIM115
        self.board = SummaryWriter(output / "tensorboard", purge_step=start + 1)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task("training", total=steps, completed=start, status="")
        self.progress.start()

    def write(self, step: int, values: dict[str, float], images_per_second: float) -> None:
        line = {"step": step, **values, "images_per_second": round(images_per_second, 2)}
        self.file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            self.board.add_scalar(f"train/{name}", value, step)
        status = f"loss {values['loss']:.3f}  {images_per_second:.1f} images/s"
        self.progress.update(self.task, completed=step, status=status)

    def close(self) -> None:
        self.progress.stop()
        self.file.close()
        self.board.close()


def evaluate_and_show(
    model: SOLQ,
    val_set: CocoDataset,
    config: TrainConfig,
    output: Path,
    rank: int,
    world_size: int,
    device: torch.device,
    amp_dtype: torch.dtype | None,
) -> None:
    """Score the model on the validation set; write metrics.json, results.json, predictions.png, model.safetensors."""
    part = Subset(val_set, range(rank, len(val_set), world_size))
    loader = DataLoader(
        part,
        batch_size=max(1, config.batch_size // config.accumulate // world_size),
        collate_fn=functools.partial(collate, sizes=padded_sizes((config.eval_scale,), config.max_size)),
        num_workers=config.workers,
        worker_init_fn=ignore_signals,
    )
    evaluator = CocoEvaluator(val_set.coco_json, val_set.category_ids, boundary=config.boundary_ap)
    with Progress(console=console, disable=rank != 0) as progress:
        task = progress.add_task("evaluation", total=len(part))
        evaluate(
            model,
            loader,
            evaluator,
            device,
            autocast_dtype=amp_dtype,
            progress=functools.partial(progress.advance, task),
        )
    if rank != 0:
        return
    metrics = evaluator.summarize()
    console.print(table(metrics))
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    evaluator.save(output / "results.json")
    draw_predictions(model, val_set, output / "predictions.png", device)
    save(model, output / "model.safetensors")
    console.print(
        f"metrics, results in COCO's format and pictures are in {output}; look at {output / 'predictions.png'}, or at "
        "any image with the trained model:"
    )
    image = val_set.images / evaluator.dataset["images"][0]["file_name"]
    pictures = output / "pictures"
    console.print(f"solq predict {output / 'model.safetensors'} {image} --output {pictures}", soft_wrap=True)


if __name__ == "__main__":
    main()
