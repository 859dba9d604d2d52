"""Settings: the architecture, a training run, and the presets by name."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

Preset = Literal["shapes", "r50", "r101", "swin-l"]
Backbone = Literal["resnet10", "resnet18", "resnet50", "resnet101", "swin-t", "swin-s", "swin-b", "swin-l"]


@dataclass
class ModelConfig:
    """The architecture; the defaults are the published SOLQ with ResNet-50."""

    backbone: Backbone = "resnet50"
    backbone_norm: Literal["frozen", "group"] = "frozen"
    """Frozen batch norm for ImageNet weights; group norm, with every stage trained, from scratch (ResNets only)."""
    num_classes: int = 91
    """Outputs of the class head; training sets it from the dataset."""
    width: int = 384
    num_heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    feedforward: int = 1024
    dropout: float = 0.1
    num_queries: int = 300
    num_levels: int = 4
    num_points: int = 4
    two_stage: bool = False
    """Queries from the encoder's best proposals instead of learned ones."""
    mask_branch: Literal["unified", "separate", "none"] = "unified"
    """Masks from the query's own vector (UQR), from attention maps and convolutions (SQR), or none (Table 2)."""
    mask_coding: Literal["dct", "pca", "sparse", "flat"] = "dct"
    num_coefficients: int | None = None
    """Length n of the mask vector; 256 unless given (Table 3e), 784 for the flat coding."""
    mask_size: int | None = None
    """Side N of the coded masks; 128 unless given (Table 3d), 28 for the flat coding."""
    vector_hidden: int = 1024
    gradient_checkpointing: bool = False
    """Recompute transformer layers in the backward pass: less memory, more time."""


@dataclass
class ModelMeta:
    """What a trained model is used with besides its weights; travels with them in a file."""

    class_names: list[str] = field(default_factory=list)
    """Name of each label, empty for a label that no category has; an empty list if they are not known."""
    category_ids: list[int] = field(default_factory=list)
    """The dataset's category of each label; an empty list if the labels are the categories."""
    eval_scale: int = 800
    """Length of the shorter image side."""
    max_size: int = 1333
    """Bound of the longer side."""
    license: str = "Apache-2.0"
    """Of the weights."""


@dataclass
class TrainConfig:
    """A training run; the defaults are the published recipe on COCO."""

    preset: Preset = "shapes"
    """Which defaults to start from."""
    model: ModelConfig = field(default_factory=ModelConfig)

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
    freeze_detector: bool = False
    """Train the separate mask branch alone."""
    mask_coding_weights: Path | None = None
    """A fitted PCA or sparse coding, from `solq fit-coding`."""

    epochs: float = 50
    steps: int | None = None
    """Length of the run in steps, instead of epochs."""
    batch_size: int = 32
    """Images of a step, over all processes and accumulated batches."""
    accumulate: int = 1
    """Parts that a step's images are computed in: less memory, same gradients."""
    lr: float = 2e-4
    lr_backbone: float = 2e-5
    lr_points: float = 2e-5
    """Learning rate of the layers that place reference and sampling points."""
    lr_drop: float = 0.8
    """Share of the run after which the learning rates fall to a tenth."""
    warmup_steps: int = 0
    """Steps in which the learning rates rise from zero."""
    weight_decay: float = 1e-4
    clip_norm: float = 0.1
    """Bound of the gradient's norm."""
    ema_decay: float = 0.0
    """Keep an exponential moving average of the weights and evaluate that; 0 is off."""
    vector_loss_weight: float = 3.0
    """λ_vec (Table 3b)."""
    vector_loss_start: int = 0
    """First decoder layer with a vector loss (Table 3c)."""

    amp: bool = False
    """Automatic mixed precision: bfloat16 where the device has it, else float16 with loss scaling."""
    compile: bool = False
    """torch.compile the model."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0
    log_every: int = 10
    """Steps between two lines of the log."""
    save_every: int = 500
    """Steps between two checkpoints."""
    eval_every: int = 0
    """Steps between two evaluations; 0 evaluates at the end only."""
    boundary_ap: bool = False
    """Report Boundary AP too (Table 4)."""


def preset(name: Preset, *, cpu: bool) -> TrainConfig:
    """The settings called `name`, for a CPU or a GPU."""
    coco = TrainConfig(preset=name, batch_size=2 if cpu else 32, workers=1 if cpu else 4)
    match name:
        case "r50":
            return coco
        case "r101":
            return replace(coco, model=ModelConfig(backbone="resnet101"))
        case "swin-l":
            return replace(
                coco,
                model=ModelConfig(backbone="swin-l", gradient_checkpointing=True),
                scales=tuple(range(416, 1089, 32)),
                max_size=1536,
                eval_scale=1088,
            )
        case "shapes":
            # Tuned for two CPU cores; docs/shapes_preset.md says what was tried.
            return TrainConfig(
                model=ModelConfig(
                    backbone="resnet10",
                    backbone_norm="group",
                    width=128,
                    num_heads=4,
                    encoder_layers=1,
                    decoder_layers=4,
                    feedforward=512,
                    dropout=0.0,
                    num_queries=30,
                    num_levels=3,
                    two_stage=True,
                    num_coefficients=100,
                    mask_size=64,
                ),
                scales=(128,),
                max_size=128,
                crop=False,
                eval_scale=128,
                workers=1,
                backbone_weights="none",
                epochs=13 if cpu else 60,
                batch_size=16,
                lr=1e-3,
                lr_backbone=1e-3,
                lr_points=3e-4,
                warmup_steps=100,
                clip_norm=1.0,
                ema_decay=0.99,
                vector_loss_weight=1.0,
            )
    raise ValueError(f"preset is {name!r}, must be one of {', '.join(get_args(Preset))}")


def check_settings(config: TrainConfig) -> None:
    """Raise a ValueError for a number that no run can have."""
    at_least_one = ["batch_size", "accumulate", "log_every", "save_every", "eval_scale", "max_size"]
    at_least_one += [f"model.{name}" for name, value in asdict(config.model).items() if type(value) is int]
    values = asdict(config) | {f"model.{name}": value for name, value in asdict(config.model).items()}
    for name in at_least_one:
        if values[name] < 1:
            raise ValueError(f"{name} is {values[name]}, must be at least 1")
    for name in ("workers", "warmup_steps", "eval_every", "seed", "vector_loss_start"):
        if values[name] < 0:
            raise ValueError(f"{name} is {values[name]}, must be at least 0")
    if not config.scales or min(config.scales) < 1:
        raise ValueError(f"scales is {config.scales}, must be lengths in pixels")
    if (config.steps is not None and config.steps < 1) or config.epochs <= 0:
        raise ValueError(f"steps is {config.steps} and epochs is {config.epochs}, must be more than 0")
    if config.batch_size % config.accumulate:
        raise ValueError(f"batch_size is {config.batch_size}, must be a multiple of accumulate ({config.accumulate})")
    if not 0 <= config.ema_decay < 1:
        raise ValueError(f"ema_decay is {config.ema_decay}, must be at least 0 and less than 1")
    if config.vector_loss_start >= config.model.decoder_layers:
        raise ValueError(
            f"vector_loss_start is {config.vector_loss_start}, must be less than the {config.model.decoder_layers} "
            "decoder layers"
        )


# What a run cannot be continued with other values of; the weights would not fit, or its data would be in another order.
FIXED = ("batch_size", "accumulate", "seed", "freeze_detector")
FREE_OF_MODEL = ("num_classes", "dropout", "gradient_checkpointing")


def check_continues(config: TrainConfig, before: dict[str, Any], checkpoint: Path) -> None:
    """Raise a ValueError if a run with the settings `before`, as a dict, cannot be continued with `config`."""
    now = asdict(config)
    changes = [(name, before[name], now[name]) for name in FIXED]
    changes += [
        (f"model.{name}", before["model"].get(name, value), value)  # a setting may be younger than the run
        for name, value in now["model"].items()
        if name not in FREE_OF_MODEL
    ]
    for name, old, new in changes:
        if old != new:
            raise ValueError(
                f"{checkpoint} is of a run with {name} {old} but now it is {new}: "
                "give --resume the settings that the run was started with"
            )
