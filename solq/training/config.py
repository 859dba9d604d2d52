"""The settings of a training run."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from solq.errors import check_at_least
from solq.models.solq.config import SOLQConfig

Preset = Literal[
    "shapes",
    "r50",
    "r101",
    "swin-l",
    "queryinst-shapes",
    "queryinst-r50",
    "queryinst-r50-3x",
    "queryinst-r50-300",
    "queryinst-r101",
    "queryinst-r101-300",
]

Model = TypeVar("Model")


@dataclass
class TrainConfig(Generic[Model]):
    """The settings of a training run of one model; the defaults are the published recipe of SOLQ on COCO."""

    preset: Preset = "shapes"
    """Which defaults to start from."""
    model: Model = field(default_factory=SOLQConfig)  # type: ignore[assignment]

    data: Path | None = None
    """Folder in COCO's layout; without it the shapes dataset is generated beside the output."""
    train_split: str = "train2017"
    """Images in DATA/<split>/, annotations in DATA/annotations/instances_<split>.json."""
    val_split: str = "val2017"
    scales: tuple[int, ...] = tuple(range(480, 801, 32))
    """Lengths of the shorter image side in training, one is drawn per batch."""
    max_size: int = 1333
    """Bound of the longer side."""
    crop: bool = True
    """Half of the training images are cropped."""
    eval_scale: int = 800
    """Length of the shorter image side in evaluation."""
    workers: int = 4
    """Processes that load images, per training process."""
    strict: bool = False
    """Stop at a damaged image instead of skipping it."""

    output: Path | None = None
    """Folder of the run; runs/<preset>, or the next free runs/<preset>-<number>, unless given."""
    resume: bool = False
    """Continue the run in the output folder, exactly where its last checkpoint left it."""
    backbone_weights: str = "imagenet"
    """"imagenet" to download, the path of a file, or "none" to train from scratch."""
    init_weights: Path | None = None
    """Start from the weights of this checkpoint, for example a detector that is to get a separate mask branch."""

    epochs: float = 50
    steps: int | None = None
    """Length of the run in steps, instead of epochs."""
    batch_size: int = 32
    """Images of a step, over all processes and accumulated batches."""
    accumulate: int = 1
    """Parts that a step's images are computed in: less memory, same gradients."""
    lr: float = 2e-4
    lr_backbone: float = 2e-5
    lr_batch_size: int | None = None
    """Batch size that the learning rates are meant for; with another one they change in proportion."""
    lr_drop: tuple[float, ...] = (0.8,)
    """Shares of the run after each of which the learning rates fall to a tenth."""
    warmup_steps: int = 0
    """Steps in which the learning rates rise from zero."""
    weight_decay: float = 1e-4
    clip_norm: float = 0.1
    """Bound of the gradient's norm."""
    ema_decay: float = 0.0
    """Keep an exponential moving average of the weights and evaluate that; 0 is off."""

    amp: bool = False
    """Automatic mixed precision: compute in what the device is fastest in, which may be float32."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute in this precision, whatever the device is fastest in; float16 with loss scaling."""
    compile: bool = False
    """torch.compile the model."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    seed: int = 0
    log_every: int = 10
    """Steps between two lines of the log."""
    save_every: int = 500
    """Steps between two checkpoints."""
    eval_every: int = 0
    """Steps between two evaluations; 0 evaluates at the end only."""
    boundary_ap: bool = False
    """Report Boundary AP too (Table 4)."""


def check_settings(config: TrainConfig) -> None:
    """Raise a ValueError for a setting that no run can have."""
    config.model.check()
    for least, names in (
        (1, ("batch_size", "lr_batch_size", "accumulate", "log_every", "save_every", "eval_scale", "max_size")),
        (0, ("workers", "warmup_steps", "eval_every", "seed")),
    ):
        check_at_least(least, **{name: getattr(config, name) for name in names})
    if not config.scales or min(config.scales) < 1:
        raise ValueError(f"scales is {config.scales}, must be lengths in pixels")
    if (config.steps is not None and config.steps < 1) or config.epochs <= 0:
        raise ValueError(f"steps is {config.steps} and epochs is {config.epochs}, must be more than 0")
    if config.batch_size % config.accumulate:
        raise ValueError(f"batch_size is {config.batch_size}, must be a multiple of accumulate ({config.accumulate})")
    if not 0 <= config.ema_decay < 1:
        raise ValueError(f"ema_decay is {config.ema_decay}, must be at least 0 and less than 1")


# Settings that must not change on --resume, because they decide the order of the data.
FIXED_ON_RESUME = ("batch_size", "accumulate", "seed")


def check_continues(config: TrainConfig, before: dict[str, Any], checkpoint: Path) -> None:
    """Raise a ValueError if a run with the settings `before`, as a dict, cannot be continued with `config`."""
    now = asdict(config)
    changes = [(name, before[name], now[name]) for name in FIXED_ON_RESUME]
    changes += [
        (f"model.{name}", before["model"].get(name, value), value)  # a setting may be younger than the run
        for name, value in now["model"].items()
        if name not in config.model.changeable
    ]
    for name, old, new in changes:
        if old != new:
            raise ValueError(
                f"{checkpoint} is of a run with {name} {old} but now it is {new}: "
                "give --resume the settings that the run was started with"
            )
