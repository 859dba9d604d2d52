"""`solq fit-coding`: fit a PCA or sparse mask coding to the instances of a training set."""

from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from solq.commands.settings import FitCodingConfig
from solq.data.annotations import split_paths
from solq.data.coco import CocoDataset
from solq.data.transforms import EvalTransform
from solq.devices import choose_device
from solq.models.solq.mask_coding import PCACoding, SparseCoding, save
from solq.progress import console


def fit_coding(config: FitCodingConfig) -> Path:
    """Read masks, fit the coding and save it; return the path of the file."""
    device = choose_device(config.device)
    if config.coding == "pca":
        coding: PCACoding | SparseCoding = PCACoding(config.num_coefficients, config.size)
    else:
        coding = SparseCoding(config.num_coefficients, config.size, config.beta)
    paths = split_paths(config.data, config.train_split)
    dataset = CocoDataset(*paths, EvalTransform(), mask_size=config.size, train=True)
    masks = read_masks(dataset, config.max_masks, config.seed)
    with console.status(f"fitting {config.coding} coding to {len(masks)} masks"):
        coding.to(device).fit(masks, config.seed)
    output = config.output or Path(f"{config.coding}-{config.num_coefficients}-{config.size}.safetensors")
    save(coding, output)
    console.print(
        f"{output}: {config.coding} coding of {coding.num_coefficients} coefficients fitted to {len(masks)} masks, "
        f"mean IoU of {min(len(masks), 1000)} of them decoded: {reconstruction_iou(coding, masks[:1000]):.3f}",
        soft_wrap=True,
    )
    return output


def read_masks(dataset: CocoDataset, max_masks: int, seed: int) -> Tensor:
    """Read at most `max_masks` masks (K, N, N) uint8 from images in random order."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    read: list[Tensor] = []
    count = 0
    with Progress(console=console) as progress:
        task = progress.add_task("reading masks", total=max_masks)
        for index in order:
            if count >= max_masks:
                break
            sample = dataset[index]
            if sample is not None:  # None is a damaged image, which the dataset has logged
                read.append(sample[1]["masks"])
                count += len(read[-1])
                progress.update(task, completed=count)
        progress.update(task, total=count)
    return torch.cat(read)[:max_masks]


@torch.no_grad()
def reconstruction_iou(coding: PCACoding | SparseCoding, masks: Tensor) -> float:
    """Return the mean IoU of masks (K, N, N) before and after encoding and decoding."""
    masks = masks.to(coding.components.device)
    decoded, masks = coding.binarize(coding.decode(coding.encode(masks))), masks.bool()
    return float(((decoded & masks).sum((1, 2)) / (decoded | masks).sum((1, 2)).clamp(min=1)).mean())
