"""Open the data of a training run: both sets, the order of the images, and the loader of its batches."""

from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import DataLoader

from solq.data import shapes
from solq.data.annotations import split_paths
from solq.data.batch import Size, padded_sizes
from solq.data.coco import CocoDataset
from solq.data.loader import make_loader
from solq.data.sampler import TrainSampler
from solq.data.transforms import EvalTransform, TrainTransform
from solq.training.config import TrainConfig
from solq.training.distributed import Process, wait_for_all


@dataclass
class TrainingData:
    """The data of a run; `sizes` are the heights and widths that batches are padded to."""

    train_set: CocoDataset
    val_set: CocoDataset
    sampler: TrainSampler
    loader: DataLoader
    sizes: list[Size]
    mask_size: int


def load_data(config: TrainConfig, output: Path, process: Process, start_step: int) -> TrainingData:
    """Read both sets, and make the loader of this process's part of the batches from `start_step` on.

    Raises:
        ValueError, OSError: see :func:`load_splits`.
    """
    mask_size = config.model.mask_target_size
    train_set, val_set = load_splits(config, output, process, mask_size)
    sampler = TrainSampler(
        len(train_set),
        config.batch_size // config.accumulate,
        seed=config.seed,
        rank=process.rank,
        world_size=process.world_size,
        start_step=start_step * config.accumulate,
        groups=(train_set.image_sizes[:, 0] > train_set.image_sizes[:, 1]).tolist(),  # portraits, landscapes
    )
    sizes = padded_sizes(config.scales, config.max_size)
    loader = make_loader(train_set, sizes, config.workers, process.device, batch_sampler=sampler)
    return TrainingData(train_set, val_set, sampler, loader, sizes, mask_size)


def load_splits(config: TrainConfig, output: Path, process: Process, mask_size: int) -> tuple[CocoDataset, CocoDataset]:
    """Open the training and the validation set, and refuse files with mistakes before training starts.

    Args:
        config: names the folder; without one the shapes dataset is generated, beside the output.
        output: folder of the run.
        process: the main process generates the shapes; the others wait for it.
        mask_size: side N of the masks in their box frame.

    Raises:
        ValueError, OSError: see :class:`CocoDataset`; ValueError if the two sets differ in their categories.
    """
    data = config.data
    if data is None:
        data = output.parent / "shapes-dataset"
        if process.is_main:
            shapes.generate(data, image_size=config.eval_scale)
        wait_for_all()
    train_transform = TrainTransform(scales=config.scales, max_size=config.max_size, crop=config.crop)
    eval_transform = EvalTransform(config.eval_scale, config.max_size)
    train_set, val_set = (
        CocoDataset(
            *split_paths(data, split),
            transform,
            mask_size=mask_size,
            train=transform is train_transform,
            strict=config.strict,
            dense_labels=config.model.dense_labels,
        )
        for split, transform in ((config.train_split, train_transform), (config.val_split, eval_transform))
    )
    if (train_set.category_ids, train_set.class_names) != (val_set.category_ids, val_set.class_names):
        raise ValueError(
            f"{train_set.coco_json} and {val_set.coco_json} have different categories: use one list for both"
        )
    return train_set, val_set
