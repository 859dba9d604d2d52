"""Settings of every command of `solq`, shown as its flags; apart from the commands, whose imports take seconds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

Checkpoint = Annotated[Path, Positional, arg(help="A file of solq.save, of train.py, or an official SOLQ checkpoint.")]
Format = Literal["torch-export", "aoti", "onnx"]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    arg(aliases=["--dtype"], help="Of products and convolutions; auto is the fastest that the device computes well."),
]


@dataclass
class PredictConfig:
    """Find the objects in images and videos; write pictures of them, and results.json in COCO's format."""

    checkpoint: Checkpoint
    images: Annotated[tuple[Path, ...], Positional]
    """Images, folders of images, videos, or `webcam` (`webcam:1` for the second one; Ctrl-C ends it)."""
    output: Path = Path("predictions")
    """Folder to write to."""
    threshold: float = 0.4
    """Least score of an object; give 0 for results that are to be scored."""
    top_k: int = 100
    """Most objects of an image."""
    class_names: Path | None = None
    """Text file with the name of each class on a line, instead of the names in the checkpoint."""
    size: int | None = None
    """Length of the shorter image side in the model; as in training unless given."""
    max_size: int | None = None
    """Bound of the longer side; as in training unless given."""
    device: str = "auto"
    precision: Precision = "auto"
    compile: bool = False
    """Compile the model first, which pays for many images."""
    batch_size: int | None = None
    """Most images computed at once; 8 on a GPU, 1 on a CPU unless given."""
    workers: int = 4
    """Threads that read and write images."""


@dataclass
class EvalConfig:
    """Score a model on a dataset in COCO's layout, and measure what it costs (Table 5 of the paper)."""

    checkpoint: Checkpoint
    data: Path
    """Folder of the dataset."""
    split: str = "val2017"
    """Images in DATA/<split>/, annotations in DATA/annotations/instances_<split>.json. A split without annotations, as
    COCO's test-dev2017, has its list of images in image_info_<split>.json; then only results.json is written."""
    images: Path | None = None
    """Folder of the images, if it is another one, such as DATA/test2017 for test-dev2017."""
    output: Path = Path("evaluation")
    """Folder for metrics.json, and results.json in the format of COCO's test server."""
    boundary: bool = False
    """Report Boundary AP too (Table 4)."""
    per_class: bool = False
    """Report the AP of every class too."""
    size: int | None = None
    """Length of the shorter image side; as in training unless given."""
    max_size: int | None = None
    """Bound of the longer side; as in training unless given."""
    batch_size: int | None = None
    """8 on a GPU, 1 on a CPU unless given."""
    device: str = "auto"
    precision: Precision = "auto"
    workers: int = 2
    """Processes that load images."""


@dataclass
class ExportConfig:
    """Write a model as one file: images in, detections out. docs/export.md shows how each format is run."""

    checkpoint: Checkpoint
    format: Format = "torch-export"
    """A torch.export program, an AOTInductor package (needs a C++ compiler), or ONNX."""
    output: Path | None = None
    """File to write; the checkpoint's name with another ending unless given."""
    top_k: int = 100
    """Detections of an image, whatever their scores; fixed in the file."""
    max_batch: int = 16
    """Most images of a batch."""
    min_size: int | None = None
    """Least height and width of a padded image, a multiple of 32; the least that the model takes unless given."""
    max_size: int | None = None
    """Most height and width of a padded image, a multiple of 32; as in the model's evaluation unless given."""
    device: str = "cpu"
    """The kind of device that the file is for: cpu or cuda."""


@dataclass
class FiguresConfig:
    """Draw where the decoder looks for an object (the paper's Figure 4), and two models side by side (3 and 5)."""

    checkpoint: Checkpoint
    images: Annotated[tuple[Path, ...], Positional]
    """Images, or folders of images."""
    compare: Path | None = None
    """Another checkpoint, for example with separate masks, whose predictions are drawn beside."""
    output: Path = Path("figures")
    """Folder to write to."""
    objects: int = 3
    """Most objects of an image whose attention is drawn, the best first."""
    layer: int = -1
    """Decoder layer, from 0, or from -1 backwards."""
    threshold: float = 0.4
    """Least score of an object."""
    device: str = "auto"


@dataclass
class DemoConfig:
    """Try a model on a local web page: upload a picture, move the threshold, see the masks."""

    checkpoint: Checkpoint
    device: str = "auto"
    host: str = "127.0.0.1"
    """Address to serve; 0.0.0.0 lets other machines see the page."""
    port: int | None = None
    """The first free one from 7860 unless given."""
    threshold: float = 0.4
    """Least score of an object, where the slider starts."""


@dataclass
class InfoConfig:
    """Show versions, device and backend; test each kernel against its definition."""

    device: str = "auto"


@dataclass
class FitCodingConfig:
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
    """Side of the coded masks."""
    beta: float = 1.0
    """Weight of the L1 norm of a sparse vector; larger is sparser."""
    max_masks: int = 10_000
    """Masks of randomly chosen images are read until there are this many."""
    seed: int = 0
    device: str = "auto"
