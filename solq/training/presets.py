"""The presets of train.py by name."""

from dataclasses import replace
from typing import Any, get_args

from solq.models.queryinst.config import QueryInstConfig
from solq.models.solq.config import SOLQConfig
from solq.training.config import Preset, TrainConfig


def preset(name: Preset, *, cpu: bool) -> TrainConfig[Any]:
    """Return the settings called `name`, for a CPU or a GPU.

    Raises:
        ValueError: if there is no such preset.
    """
    if name not in get_args(Preset):
        raise ValueError(f"preset is {name!r}, must be one of {', '.join(get_args(Preset))}")
    if name.endswith("shapes"):
        return replace(_shapes(name, cpu), preset=name)
    recipe: TrainConfig[Any] = _queryinst(name) if name.startswith("queryinst") else _solq(name)
    fits_cpu: dict[str, Any] = {"batch_size": 2, "workers": 1}
    return replace(recipe, preset=name, **(fits_cpu if cpu else {}))


def _solq(name: str) -> TrainConfig[SOLQConfig]:
    """Return the published recipe of SOLQ (section 4.1 and the published code)."""
    match name:
        case "r101":
            return TrainConfig(model=SOLQConfig(backbone="resnet101"))
        case "swin-l":
            model = SOLQConfig(backbone="swin-l", gradient_checkpointing=True)
            return TrainConfig(model=model, scales=tuple(range(416, 1089, 32)), max_size=1536, eval_scale=1088)
    return TrainConfig()  # r50


def _queryinst(name: str) -> TrainConfig[QueryInstConfig]:
    """Return the recipe of a row of QueryInst's model card: 12 epochs at one size for the first, else 36 at several.

    The learning rates are for 16 images a step and follow the batch size.
    """
    model = QueryInstConfig(
        backbone="resnet101" if "r101" in name else "resnet50", num_queries=300 if name.endswith("300") else 100
    )
    short = name == "queryinst-r50"
    return TrainConfig(
        model=model,
        scales=(800,) if short else tuple(range(480, 801, 32)),
        crop=model.num_queries == 300,
        epochs=12 if short else 36,
        batch_size=16,
        lr=1e-4,
        lr_backbone=1e-5,
        lr_batch_size=16,
        lr_drop=(8 / 12, 11 / 12) if short else (27 / 36, 33 / 36),
        warmup_steps=1000,
    )


def _shapes(name: str, cpu: bool) -> TrainConfig[Any]:
    """Return the recipe for the dataset of shapes, tuned for two CPU cores (docs/shapes_preset.md)."""
    model: Any
    small: dict[str, Any] = {
        "backbone": "resnet10",
        "backbone_norm": "group",
        "num_heads": 4,
        "num_queries": 30,
        "mask_size": 64,
    }
    if name == "queryinst-shapes":
        model = QueryInstConfig(**small, num_stages=3, width=64, feedforward=256, dynamic_width=16, mask_convs=1)
    else:
        layers = {"encoder_layers": 1, "decoder_layers": 4, "num_levels": 3, "dropout": 0.0, "two_stage": True}
        small |= layers | {"num_coefficients": 100, "vector_loss_weight": 1.0, "lr_points": 3e-4}
        model = SOLQConfig(**small, width=128, feedforward=512)
    return TrainConfig(
        model=model,
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
        warmup_steps=100,
        clip_norm=1.0,
        ema_decay=0.99,
    )
