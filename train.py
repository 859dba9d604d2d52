"""Train, evaluate and show an instance-segmentation model: `python train.py --amp --compile`.

The whole loop, to be read from top to bottom. `python train.py --help` lists every setting; `torchrun
--nproc-per-node=N train.py …` is the same run on N processes.
"""

from solq.commands.flags import command_line

if __name__ == "__main__":  # before the imports that take seconds: --help and mistakes are answered at once
    SETTINGS = command_line(__doc__)

import contextlib
import json
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from solq.data.batch import Batch, Size, fill_up, normalize
from solq.data.coco import CocoDataset
from solq.data.sampler import TrainSampler
from solq.detections import ModelMeta
from solq.devices import choose_precision
from solq.models import build
from solq.models.base import InstanceSegmenter
from solq.progress import say
from solq.training.checkpoint import checkpoints, load_newest, save_checkpoint
from solq.training.compilation import can_compile
from solq.training.config import TrainConfig, check_continues, check_settings
from solq.training.criterion import SetCriterion
from solq.training.distributed import Process, any_process, start_process, sum_over_processes, wait_for_all
from solq.training.loaders import load_data
from solq.training.matcher import HungarianMatcher
from solq.training.optimization import averaged_model, lr_factor, parameter_groups, update_average
from solq.training.report import say_start, write_report
from solq.training.run_log import RunLog, start_logging, stop_signals
from solq.training.start_weights import load_start_weights


def train(config: TrainConfig, process: Process) -> None:
    """Run the steps of a training run, with a log line, a checkpoint and an evaluation every so often."""
    rank, world_size, device = process
    output = run_folder(config, process)
    state = load_newest(output / "checkpoints") if config.resume else None
    start = state["step"] if state else 0
    if state:
        check_continues(config, state["config"], output)
    data = load_data(config, output, process, start)
    sampler = data.sampler
    steps = config.steps or max(1, round(config.epochs * sampler.steps_per_epoch / config.accumulate))

    model = build_model(config, data.train_set, device, state)
    criterion = SetCriterion(HungarianMatcher(**model.matcher_settings), model)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), fused=True)
    precision = choose_precision(device, config.precision if config.amp or config.precision != "auto" else "float32")
    dtype = precision.dtype
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    ema = averaged_model(model, config.ema_decay)
    skipped = 0  # damaged images so far
    if state:
        optimizer.load_state_dict(state["optimizer"])
        for group, given in zip(optimizer.param_groups, parameter_groups(model, config), strict=True):
            group |= {key: value for key, value in given.items() if key != "params"}  # may have been changed
        if state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        if ema and state["ema"]:
            ema.load_state_dict(state["ema"])
        if process.is_main:
            skipped = state["skipped_images"]
            say(f"continuing {output} after step {start}")
        state = None  # frees its memory
    num_graphs = len(data.sizes) if config.compile and can_compile(device) else 0
    network = wrap(model, process, num_graphs)
    if process.is_main:
        say_start(config, model, data, process.device, precision, num_graphs, range(start, steps))

    def report() -> None:
        write_report(ema.module if ema else model, data.val_set, config, output, device, dtype)  # type: ignore[arg-type]

    def checkpoint(step: int) -> None:
        counts = sum_over_processes({"skipped_images": skipped}, device)
        parts = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}
        state = {name: part.state_dict() if part else None for name, part in parts.items()}
        if process.is_main:
            facts = describe_run(config, model, data.train_set)
            save_checkpoint(output / "checkpoints", step, {"step": step, **state, **counts, **facts})

    model.train()
    batches = prefetch(iter(data.loader), device, sampler.batch_size // world_size, data.sizes[0], data.mask_size)
    bad_step = torch.full((), -1, device=device)  # the first step with a loss or gradient that is not finite
    clock, images, stops = time.perf_counter(), 0, False
    with stop_signals() as signals, RunLog(output, start, steps, process.is_main, num_graphs) as log:
        for step in range(start, steps):
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * lr_factor(step, config, steps)
            parts = [next(batches) for _ in range(config.accumulate)]
            # Random numbers of the model depend on seed, step and process only, so that a resumed run draws the same.
            torch.manual_seed(int(np.random.SeedSequence((config.seed, 2, step, rank)).generate_state(1, np.uint64)[0]))
            counts = criterion.count_targets([part.targets for part in parts], config.model.num_queries)
            losses: dict[str, Tensor] = {}
            for index, part in enumerate(parts):
                log.announce_graph(part.images.shape)
                waiting = world_size > 1 and index < len(parts) - 1  # gradients are exchanged with the last part
                with network.no_sync() if waiting else contextlib.nullcontext():  # type: ignore[operator]
                    with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                        outputs = network(normalize(part.images, part.padding_mask), part.padding_mask)
                    part_losses = criterion(outputs, part.targets, counts)
                    scaler.scale(criterion.total(part_losses)).backward()
                for name, loss in part_losses.items():
                    losses[name] = losses.get(name, 0) + loss.detach()
            total = criterion.total(losses)
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            # Loss scaling skips a step whose gradient is not finite. A loss is one process's, the gradient everyone's.
            finite = total.isfinite() if scaler.is_enabled() else total.isfinite() & grad_norm.isfinite()
            bad_step = torch.where((bad_step < 0) & ~finite, step, bad_step)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if ema:
                update_average(ema, model, config.ema_decay)
            images += config.batch_size
            skipped += sum(part.skipped for part in parts)

            done = step + 1
            logs = done % config.log_every == 0 or done == steps
            saves = done % config.save_every == 0 or done == steps
            evaluates = config.eval_every > 0 and done % config.eval_every == 0 and done < steps
            # Processes agree on a stop where they wait for the device anyway.
            stops = bool(signals) if world_size == 1 else logs and any_process(bool(signals), device)
            if (logs or saves or stops or evaluates) and int(bad_step) >= 0:
                raise FloatingPointError(describe_bad_step(int(bad_step), config, sampler, data.train_set))
            if logs:
                values = sum_over_processes({"loss": total, **losses}, device)
                values = {name: value / world_size for name, value in values.items()}
                non_finite = criterion.matcher.non_finite_costs
                values |= sum_over_processes({"skipped_images": skipped, "non_finite_costs": non_finite}, device)
                values |= {"grad_norm": float(grad_norm), "lr": optimizer.param_groups[-1]["lr"]}
                values["images_per_second"] = images / (time.perf_counter() - clock)
                log.write(done, values)
                clock, images = time.perf_counter(), 0
            if saves or stops:
                checkpoint(done)
            if stops:
                break
            if evaluates:
                report()
                clock, images = time.perf_counter(), 0
    batches.close()  # ends the processes that load images
    if not stops:
        report()
    elif process.is_main:
        cause = signals[0] if signals else "another process"
        say(f"stopped after step {done} by {cause}: continue with --resume --output {output}")


# ---- the parts of the loop, in the order of their use


def run_folder(config: TrainConfig, process: Process) -> Path:
    """Return the folder of the run: the given one, or of runs/<preset>, runs/<preset>-2, … the next or the newest."""
    if config.output is not None:
        folder = config.output
        if not config.resume and checkpoints(folder / "checkpoints") and process.is_main:
            raise ValueError(f"{folder} holds a run already: add --resume to continue it, or name another --output")
    else:
        names = [config.preset, *(f"{config.preset}-{number}" for number in range(2, 10_000))]
        folders = [Path("runs") / name for name in names]
        free = next(index for index, folder in enumerate(folders) if not checkpoints(folder / "checkpoints"))
        folder = folders[max(free - 1, 0)] if config.resume else folders[free]
    if config.resume and not checkpoints(folder / "checkpoints"):
        if not (folder / "log.jsonl").exists():
            raise ValueError(f"{folder} holds no run to continue: leave out --resume, or name the --output of one")
        if process.is_main:
            say(f"{folder} holds no checkpoint yet: starting again from step 0")
    folder.mkdir(parents=True, exist_ok=True)
    wait_for_all()  # before another process looks for a free folder
    return folder


def build_model(
    config: TrainConfig, train_set: CocoDataset, device: torch.device, state: dict[str, Any] | None
) -> InstanceSegmenter:
    """Build the model with its start weights, or with the weights of the checkpoint `state`."""
    if state and state["class_names"] != train_set.class_names:
        raise ValueError(
            f"the checkpoint was trained on {len(state['class_names'])} classes, "
            f"{', '.join(filter(None, state['class_names'][:5]))}, …, but {train_set.coco_json} has others: "
            "train into a new --output"
        )
    torch.manual_seed(config.seed)
    model = build(replace(config.model, num_classes=train_set.num_classes))
    model.meta = ModelMeta(train_set.class_names, train_set.category_ids, config.eval_scale, config.max_size)
    if state:
        model.load_state_dict(state["model"])
    else:
        load_start_weights(model, config)
    model.prepare_training(resumes=state is not None)
    return model.to(device)


def wrap(model: InstanceSegmenter, process: Process, num_graphs: int) -> nn.Module:
    """Compile the model, unless `num_graphs` is 0, and spread it over the processes; the result shares its weights."""
    network: nn.Module = model
    device = process.device
    if num_graphs:
        torch._dynamo.config.recompile_limit = num_graphs + 1  # one graph per padded size
        if device.type == "cpu":  # where storing the masks of ReLUs takes longer than computing them again
            torch._functorch.config.aggressive_recomputation = True
        network = torch.compile(model, fullgraph=True, dynamic=False)  # type: ignore[assignment]
    if process.world_size > 1:
        network = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)
    return network


def prefetch(
    loaded: Iterator[Batch | None], device: torch.device, num_images: int, size: Size, mask_size: int
) -> Generator[Batch, None, None]:
    """Yield full batches on the device; the next one is copied while one is computed with."""
    upcoming: Batch | None = None
    for batch in loaded:
        current, upcoming = upcoming, fill_up(batch, num_images, size, mask_size).to(device)
        if current is not None:
            yield current


def describe_run(config: TrainConfig, model: InstanceSegmenter, train_set: CocoDataset) -> dict[str, Any]:
    """Return the settings and classes that a checkpoint is read with."""
    return {
        "config": json.loads(json.dumps(asdict(config), default=str)),
        "model_name": model.name,
        "model_config": json.loads(json.dumps(asdict(model.config), default=str)),
        "class_names": train_set.class_names,
        "category_ids": train_set.category_ids,
    }


def describe_bad_step(step: int, config: TrainConfig, sampler: TrainSampler, dataset: CocoDataset) -> str:
    """Describe a step whose loss is not finite: its images, and what to do."""
    start = step * config.accumulate
    again = TrainSampler(len(dataset), sampler.batch_size, config.seed, start_step=start, groups=sampler.groups)
    keys = [key for batch in islice(again, config.accumulate) for key in batch]
    ids = ", ".join(str(dataset.image_ids[index]) for index, _ in keys)
    return (
        f"the loss or gradient of step {step + 1} is not finite; its batch is of images {ids}. No checkpoint has been "
        "written since: look at their annotations, or lower the learning rate, and continue with --resume"
    )


def main(config: TrainConfig) -> None:
    """Train with these settings; an error of the input or the machine ends the run in one line."""
    try:
        process = start_process(config.device)
        start_logging(process.is_main)
        check_settings(config)
        train(config, process)
    except (OSError, ValueError, FloatingPointError) as error:
        # The error of a worker process has its traceback before it; the last line is the message.
        message = str(error).strip().splitlines()[-1]
        sys.exit(f"error: {message.removeprefix(f'{type(error).__name__}: ')}")
    except KeyboardInterrupt:
        sys.exit("stopped by Ctrl-C outside of training: no step is lost")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(SETTINGS)
