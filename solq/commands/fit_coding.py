"""Fit a PCA or sparse mask coding to the instances of a training set: `solq fit-coding`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from solq.data.coco import CocoDataset
from solq.data.transforms import EvalTransform
from solq.models.solq.mask_coding import PCACoding, SparseCoding, save


@dataclass
class FitCoding:
    """Fit a mask coding (paper, Table 3a) to the masks of a training set in COCO's layout."""

    data: Path
    """Folder of the training set."""
    coding: Literal["pca", "sparse"] = "pca"
    output: Path | None = None
    """File to write; `<coding>-<num coefficients>-<size>.safetensors` in the current folder unless given."""
    train_split: str = "train2017"
    """Images in DATA/<split>/, annotations in DATA/annotations/instances_<split>.json."""
    num_coefficients: int = 256
    size: int = 128
    """Side of the masks that are coded."""
    beta: float = 1.0
    """Weight of the L1 norm of a sparse vector; larger is sparser."""
    max_masks: int = 10_000
    """Masks of randomly chosen images are read until there are this many."""
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def fit_coding(args: FitCoding) -> Path:
    """Read masks, fit the coding, save it; the path of the file.

    Raises:
        FileNotFoundError: the annotation file or an image is missing.
        ValueError: the dataset is not in COCO's format, or has fewer masks than coefficients are wanted.
        ImportError: the sparse coding is wanted but scikit-learn is not installed.
    """
    if args.coding == "pca":
        coding: PCACoding | SparseCoding = PCACoding(args.num_coefficients, args.size)
    else:
        coding = SparseCoding(args.num_coefficients, args.size, args.beta)
    annotations = args.data / "annotations" / f"instances_{args.train_split}.json"
    dataset = CocoDataset(args.data / args.train_split, annotations, EvalTransform(), mask_size=args.size, train=True)
    console = Console()
    masks = read_masks(dataset, args.max_masks, args.seed, console)
    with console.status(f"fitting {args.coding} coding to {len(masks)} masks"):
        coding.to(args.device).fit(masks, args.seed)
    output = args.output or Path(f"{args.coding}-{args.num_coefficients}-{args.size}.safetensors")
    output.parent.mkdir(parents=True, exist_ok=True)
    save(coding, output)
    console.print(
        f"{output}: {args.coding} coding of {coding.num_coefficients} coefficients fitted to {len(masks)} masks, "
        f"mean IoU of {min(len(masks), 1000)} of them decoded: {reconstruction_iou(coding, masks[:1000]):.3f}",
        soft_wrap=True,
    )
    return output


def read_masks(dataset: CocoDataset, max_masks: int, seed: int, console: Console) -> Tensor:
    """At most `max_masks` masks (K, N, N) uint8 of images in random order."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    read: list[Tensor] = []
    count = 0
    with Progress(console=console) as progress:
        task = progress.add_task("reading masks", total=max_masks)
        for index in order:
            if count >= max_masks:
                break
            sample = dataset[index]
            if sample is not None:  # a damaged image, which the dataset has reported
                read.append(sample[1]["masks"])
                count += len(read[-1])
                progress.update(task, completed=count)
        progress.update(task, total=count)
    return torch.cat(read)[:max_masks]


@torch.no_grad()
def reconstruction_iou(coding: PCACoding | SparseCoding, masks: Tensor) -> float:
    """Mean IoU of masks (K, N, N) with what is left of them after encoding and decoding."""
    masks = masks.to(coding.components.device)
    decoded, masks = coding.binarize(coding.decode(coding.encode(masks))), masks.bool()
    return float(((decoded & masks).sum((1, 2)) / (decoded | masks).sum((1, 2)).clamp(min=1)).mean())
