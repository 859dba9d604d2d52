"""The presets of train.py for QueryInst by name."""

from solq.models.queryinst.config import QueryInstConfig
from solq.training.config import Preset, TrainConfig


def queryinst_preset(name: Preset, *, cpu: bool) -> TrainConfig[QueryInstConfig]:
    """Return the settings called `name`, for a CPU or a GPU.

    The first five are the rows of the published model card, in mmdetection's recipe. Its learning rates are for 16
    images a step and follow the batch size.
    """
    match name:
        case "queryinst-r50":
            return _coco(name, QueryInstConfig(), cpu, short=True)
        case "queryinst-r50-3x":
            return _coco(name, QueryInstConfig(), cpu)
        case "queryinst-r50-300":
            return _coco(name, QueryInstConfig(num_queries=300), cpu, crop=True)
        case "queryinst-r101":
            return _coco(name, QueryInstConfig(backbone="resnet101"), cpu)
        case "queryinst-r101-300":
            return _coco(name, QueryInstConfig(backbone="resnet101", num_queries=300), cpu, crop=True)
        case "queryinst-shapes":
            return TrainConfig(
                preset=name,
                model=QueryInstConfig(
                    backbone="resnet10",
                    backbone_norm="group",
                    num_queries=30,
                    num_stages=3,
                    width=64,
                    num_heads=4,
                    feedforward=256,
                    dynamic_width=16,
                    mask_convs=1,
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
                warmup_steps=100,
                clip_norm=1.0,
                ema_decay=0.99,
            )
    raise ValueError(f"preset is {name!r}, not one of QueryInst")


def _coco(
    name: Preset, model: QueryInstConfig, cpu: bool, *, short: bool = False, crop: bool = False
) -> TrainConfig[QueryInstConfig]:
    """Return the recipe of 12 epochs at one image size (`short`), or of 36 epochs at several."""
    return TrainConfig(
        preset=name,
        model=model,
        scales=(800,) if short else tuple(range(480, 801, 32)),
        crop=crop,
        workers=1 if cpu else 4,
        epochs=12 if short else 36,
        batch_size=2 if cpu else 16,
        lr=1e-4,
        lr_backbone=1e-5,
        lr_batch_size=16,
        lr_drop=(8 / 12, 11 / 12) if short else (27 / 36, 33 / 36),
        warmup_steps=1000,
    )
