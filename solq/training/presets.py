"""The presets of train.py by name."""

from dataclasses import replace
from typing import Any, get_args

from solq.models.solq.config import SOLQConfig
from solq.training.config import Preset, TrainConfig
from solq.training.queryinst_presets import queryinst_preset


def preset(name: Preset, *, cpu: bool) -> TrainConfig[Any]:
    """Return the settings called `name`, for a CPU or a GPU."""
    coco: TrainConfig[SOLQConfig] = TrainConfig(preset=name, batch_size=2 if cpu else 32, workers=1 if cpu else 4)
    match name:
        case "r50":
            return coco
        case "r101":
            return replace(coco, model=SOLQConfig(backbone="resnet101"))
        case "swin-l":
            return replace(
                coco,
                model=SOLQConfig(backbone="swin-l", gradient_checkpointing=True),
                scales=tuple(range(416, 1089, 32)),
                max_size=1536,
                eval_scale=1088,
            )
        case "shapes":
            # Tuned for two CPU cores; docs/shapes_preset.md says what was tried.
            return TrainConfig(
                model=SOLQConfig(
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
                    lr_points=3e-4,
                    vector_loss_weight=1.0,
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
                warmup_steps=100,
                clip_norm=1.0,
                ema_decay=0.99,
            )
        case _ if name.startswith("queryinst"):
            return queryinst_preset(name, cpu=cpu)
    raise ValueError(f"preset is {name!r}, must be one of {', '.join(get_args(Preset))}")
