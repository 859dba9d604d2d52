"""Train, evaluate and show an instance-segmentation model: `python train.py --amp --compile`.

The whole loop, to be read from top to bottom. `python train.py --help` lists every setting; `torchrun
--nproc-per-node=N train.py …` is the same run on N processes.
"""

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from solq.commands.flags import command_line
from solq.data.batch import Batch, collate, fill_up, normalize, padded_sizes
from solq.data.coco import CocoDataset
from solq.data.sampler import TrainSampler
from solq.models.backbones.resnet import load_backbone_weights
from solq.models.solq.mask_coding import FittedCoding, build_mask_coding
from solq.models.solq.mask_coding import load as load_mask_coding
from solq.models.solq.model import SOLQ
from solq.training.checkpoint import checkpoints, load_checkpoint, load_newest, save_checkpoint
from solq.training.config import ModelMeta, TrainConfig, check_continues, check_settings
from solq.training.criterion import SetCriterion
from solq.training.matcher import HungarianMatcher
from solq.training.report import write_report
from solq.training.run_log import RunLog, say, start_logging, start_worker, stop_signals
from solq.training.splits import load_splits


def main() -> None:
    config = command_line(__doc__)
    rank, world_size, device = start_process(config)
    start_logging(is_main=rank == 0)
    try:
        check_settings(config)
        train(config, rank, world_size, device)
    except (OSError, ValueError, FloatingPointError) as error:  # of the input or the machine: it says what to do
        # The error of a worker process has its traceback before it; the last line is the message.
        message = str(error).strip().splitlines()[-1]
        sys.exit(f"error: {message.removeprefix(f'{type(error).__name__}: ')}")
    except KeyboardInterrupt:
        sys.exit("stopped by Ctrl-C outside of training: no step is lost")
    if dist.is_initialized():
        dist.destroy_process_group()


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
    is_main = rank == 0
    output = run_folder(config, is_main)
    state = load_newest(output / "checkpoints") if config.resume else None
    if state:
        check_continues(config, state["config"], output)

    # ---- data
    mask_size = build_mask_coding(config.model.mask_coding, config.model.num_coefficients, config.model.mask_size).size
    train_set, val_set = load_splits(config, output, mask_size, is_main)
    if state:
        check_same_classes(state, train_set)
    start = state["step"] if state else 0
    sampler = TrainSampler(
        len(train_set),
        config.batch_size // config.accumulate,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        start_step=start * config.accumulate,
        groups=(train_set.image_sizes[:, 0] > train_set.image_sizes[:, 1]).tolist(),  # portraits, landscapes
    )
    steps = config.steps or max(1, round(config.epochs * sampler.steps_per_epoch / config.accumulate))
    sizes = padded_sizes(config.scales, config.max_size)
    loader = DataLoader(
        train_set,
        batch_sampler=sampler,
        collate_fn=functools.partial(collate, sizes=sizes),
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=start_worker,
    )

    # ---- model
    torch.manual_seed(config.seed)
    model = SOLQ(replace(config.model, num_classes=train_set.num_classes))
    model.meta = ModelMeta(train_set.class_names, train_set.category_ids, config.eval_scale, config.max_size)
    if state is None:
        load_start_weights(model, config)
    if config.freeze_detector:
        freeze_detector(model)
    model.to(device)
    criterion = SetCriterion(
        HungarianMatcher(),
        model.mask_coding,
        model.mask_head,
        vector_loss_weight=config.vector_loss_weight,
        vector_loss_start=config.vector_loss_start,
        decoder_layers=config.model.decoder_layers,
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, config), fused=True)
    amp_dtype = mixed_precision(device) if config.amp else None
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
    ema = None
    if config.ema_decay > 0:  # buffers are copied: an average of Swin's integer ones would round them down
        ema = AveragedModel(model, use_buffers=False)
    skipped = 0  # damaged images so far
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for group, given in zip(optimizer.param_groups, parameter_groups(model, config), strict=True):
            group |= {key: value for key, value in given.items() if key != "params"}  # may have been changed
        if state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        if ema and state["ema"]:
            ema.load_state_dict(state["ema"])
        skipped = state["skipped_images"] if is_main else 0
        if is_main:
            say(f"continuing {output} after step {start}")
        state = None  # frees its memory

    # The compiled and the parallel model share the weights of `model`, which evaluation runs as it is.
    network: nn.Module = model
    if config.compile:
        torch._dynamo.config.recompile_limit = len(sizes) + 1  # one graph per padded size
        if device.type == "cpu":  # where storing the masks of ReLUs takes longer than computing them again
            torch._functorch.config.aggressive_recomputation = True
        network = torch.compile(model, fullgraph=True, dynamic=False)  # type: ignore[assignment]
    if world_size > 1:
        network = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)

    def report() -> None:
        write_report(ema.module if ema else model, val_set, config, output, device, amp_dtype)  # type: ignore[arg-type]

    def checkpoint(step: int) -> None:
        counts = sum_over_processes({"skipped_images": skipped}, device)
        if is_main:
            save_checkpoint(
                output / "checkpoints",
                step,
                {
                    "step": step,
                    "model": model.state_dict(),
                    "ema": ema.state_dict() if ema else None,
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    **counts,
                    "config": json.loads(json.dumps(asdict(config), default=str)),
                    "model_config": asdict(model.config),
                    "class_names": train_set.class_names,
                    "category_ids": train_set.category_ids,
                },
            )

    # ---- the loop
    model.train()
    batches = prefetch(iter(loader), device, sampler.batch_size // world_size, sizes[0], mask_size)
    bad_step = torch.full((), -1, device=device)  # the first step with a loss or gradient that is not finite
    clock, images, stops = time.perf_counter(), 0, False
    with stop_signals() as signals, RunLog(output, start, steps, enabled=is_main) as log:
        for step in range(start, steps):
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * lr_factor(step, config, steps)
            parts = [next(batches) for _ in range(config.accumulate)]
            # Random numbers of the model depend on seed, step and process only, so that a resumed run draws the same.
            torch.manual_seed(int(np.random.SeedSequence((config.seed, 2, step, rank)).generate_state(1, np.uint64)[0]))
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
                raise FloatingPointError(describe_bad_step(int(bad_step), config, sampler, train_set))
            if logs:
                values = sum_over_processes({"loss": total, **losses}, device)
                values = {name: value / world_size for name, value in values.items()}
                non_finite_costs = criterion.matcher.non_finite_costs
                values |= sum_over_processes({"skipped_images": skipped, "non_finite_costs": non_finite_costs}, device)
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
    elif is_main:
        cause = signals[0] if signals else "another process"
        say(f"stopped after step {done} by {cause}: continue with --resume --output {output}")


# ---- what the loop is made of, in the order of its use


def run_folder(config: TrainConfig, is_main: bool) -> Path:
    """The folder of the run: the given one, or of runs/<preset>, runs/<preset>-2, … the newest or the next."""
    if config.output is not None:
        folder = config.output
        if not config.resume and checkpoints(folder / "checkpoints") and is_main:
            raise ValueError(f"{folder} holds a run already: add --resume to continue it, or name another --output")
    else:
        names = [config.preset, *(f"{config.preset}-{number}" for number in range(2, 10_000))]
        folders = [Path("runs") / name for name in names]
        free = next(index for index, folder in enumerate(folders) if not checkpoints(folder / "checkpoints"))
        folder = folders[max(free - 1, 0)] if config.resume else folders[free]
    if config.resume and not checkpoints(folder / "checkpoints"):
        if not (folder / "log.jsonl").exists():
            raise ValueError(f"{folder} holds no run to continue: leave out --resume, or name the --output of one")
        if is_main:
            say(f"{folder} holds no checkpoint yet: starting again from step 0")
    folder.mkdir(parents=True, exist_ok=True)
    if dist.is_initialized():
        dist.barrier()  # before another process looks for a free folder
    return folder


def load_start_weights(model: SOLQ, config: TrainConfig) -> None:
    """What a new run starts from, besides random numbers."""
    if config.init_weights is not None:
        load_init_weights(model, config.init_weights)
    elif config.backbone_weights != "none":
        load_backbone_weights(model.backbone, config.model.backbone, config.backbone_weights)
    coding = model.mask_coding
    if config.mask_coding_weights is not None:
        fitted = load_mask_coding(config.mask_coding_weights)
        given, wanted = ((c.name, c.num_coefficients, c.size) for c in (fitted, coding))
        if given != wanted:
            raise ValueError(
                f"{config.mask_coding_weights} holds the coding (name, coefficients, size) {given} but the model's is "
                f"{wanted}: change --model.mask-coding, --model.num-coefficients and --model.mask-size, or fit another"
            )
        coding.load_state_dict(fitted.state_dict())
    if isinstance(coding, FittedCoding) and not coding.fitted:
        raise ValueError(
            f"the {coding.name} mask coding has to be fitted first: run `solq fit-coding --coding {coding.name}` on "
            "the training set and give its file as --mask-coding-weights"
        )


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
    rates = {"backbone": config.lr_backbone, "points": config.lr_points, "others": config.lr}
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            places_points = "reference_points" in name or "sampling_offsets" in name
            group = "backbone" if name.startswith("backbone.") else "points" if places_points else "others"
            groups[group].append(parameter)
    return [
        {"params": parameters, "base_lr": rates[name], "lr": rates[name], "weight_decay": config.weight_decay}
        for name, parameters in groups.items()
        if parameters
    ]


def lr_factor(step: int, config: TrainConfig, steps: int) -> float:
    """Linear warm-up, then constant, then a tenth."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return warmup * (0.1 if step >= config.lr_drop * steps else 1.0)


def update_average(ema: AveragedModel, model: SOLQ, decay: float) -> None:
    """Its own `update_parameters` copies a counter to the device and waits for that, in every step."""
    average = get_ema_multi_avg_fn(decay if ema.n_averaged else 0.0)  # the first time a copy
    average(list(ema.parameters()), list(model.parameters()), ema.n_averaged)
    for averaged, buffer in zip(ema.module.buffers(), model.buffers(), strict=True):
        averaged.copy_(buffer)
    ema.n_averaged += 1


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


def prefetch(
    loaded: Iterator[Batch | None], device: torch.device, num_images: int, size: tuple[int, int], mask_size: int
) -> Generator[Batch, None, None]:
    """Full batches on the device; the next one is copied while one is computed with."""
    following: Batch | None = None
    for batch in loaded:
        current, following = following, fill_up(batch, num_images, size, mask_size).to(device)
        if current is not None:
            yield current


def any_process(flag: bool, device: torch.device) -> bool:
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags)
    return bool(flags > 0)


def sum_over_processes(values: Mapping[str, Tensor | float], device: torch.device) -> dict[str, float]:
    sums = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values.values()])
    if dist.is_initialized():
        dist.all_reduce(sums)
    return dict(zip(values, sums.tolist(), strict=True))


def describe_bad_step(step: int, config: TrainConfig, sampler: TrainSampler, dataset: CocoDataset) -> str:
    """What a person needs to look into a loss that is not finite."""
    start = step * config.accumulate
    again = TrainSampler(
        len(dataset), sampler.batch_size, config.seed, start_step=start, groups=sampler.groups.tolist()
    )
    keys = [key for batch in islice(again, config.accumulate) for key in batch]
    ids = ", ".join(str(dataset.image_ids[index]) for index, _ in keys)
    return (
        f"the loss or gradient of step {step + 1} is not finite; its batch is of images {ids}. No checkpoint has been "
        "written since: look at their annotations, or lower the learning rate, and continue with --resume"
    )


if __name__ == "__main__":
    main()
