"""The training and the validation set of a run."""

from pathlib import Path

import torch.distributed as dist

from solq.data import shapes
from solq.data.coco import CocoDataset
from solq.data.transforms import EvalTransform, TrainTransform
from solq.training.config import TrainConfig


def load_splits(config: TrainConfig, output: Path, mask_size: int, is_main: bool) -> tuple[CocoDataset, CocoDataset]:
    """Both sets; every mistake in their files is found here, before training starts.

    Args:
        config: names the folder; without one the shapes dataset is generated, beside the output.
        output: folder of the run.
        mask_size: side N of the masks in their box frame.
        is_main: false for all processes but the one that generates.

    Raises:
        ValueError, OSError: as `CocoDataset` does; ValueError if the two differ in their categories.
    """
    data = config.data
    if data is None:
        data = output.parent / "shapes-dataset"
        if is_main:
            shapes.generate(data, image_size=config.eval_scale)
        if dist.is_initialized():
            dist.barrier()
    train_transform = TrainTransform(scales=config.scales, max_size=config.max_size, crop=config.crop)
    eval_transform = EvalTransform(config.eval_scale, config.max_size)
    train_set, val_set = (
        CocoDataset(
            data / split,
            data / "annotations" / f"instances_{split}.json",
            transform,
            mask_size=mask_size,
            train=transform is train_transform,
            strict=config.strict,
        )
        for split, transform in ((config.train_split, train_transform), (config.val_split, eval_transform))
    )
    if (train_set.category_ids, train_set.class_names) != (val_set.category_ids, val_set.class_names):
        raise ValueError(
            f"{train_set.coco_json} and {val_set.coco_json} have different categories: use one list for both"
        )
    return train_set, val_set
