"""The settings of SOLQ."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

from solq.models.backbones import Backbone

DEFAULT_MASK_CODES = {"dct": (256, 128), "pca": (256, 128), "sparse": (256, 128), "flat": (28**2, 28)}
"""Length n of the mask vector and side N of the coded masks, unless given (Tables 3d and 3e)."""


@dataclass
class SOLQConfig:
    """The architecture and the losses of SOLQ; the defaults are the published model with ResNet-50."""

    changeable: ClassVar[frozenset[str]] = frozenset(
        {
            "num_classes",
            "dropout",
            "gradient_checkpointing",
            "lr_points",
            "vector_loss_weight",
            "vector_loss_start",
            "mask_coding_weights",
        }
    )
    dense_labels: ClassVar[bool] = False

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
    """Take the queries from the encoder's best proposals instead of learned ones."""
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

    lr_points: float = 2e-5
    """Learning rate of the layers that predict reference and sampling points."""
    vector_loss_weight: float = 3.0
    """λ_vec (Table 3b)."""
    vector_loss_start: int = 0
    """First decoder layer with a vector loss (Table 3c)."""
    mask_coding_weights: Path | None = None
    """A fitted PCA or sparse coding, from `solq fit-coding`."""
    freeze_detector: bool = False
    """Train the separate mask branch alone."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.decoder_layers

    @property
    def mask_target_size(self) -> int:
        """Side N of the target masks (T, N, N)."""
        return self.mask_size or DEFAULT_MASK_CODES[self.mask_coding][1]

    @property
    def min_image_size(self) -> int:
        """Least side of a square image with two pixels on every level, and a proposal for every query in two stages."""
        side = 0
        while True:
            side += 32
            sides = [side // 8, side // 16, side // 32]
            while len(sides) < self.num_levels:
                sides.append((sides[-1] + 1) // 2)
            enough = not self.two_stage or sum(n * n for n in sides[: self.num_levels]) >= self.num_queries
            if sides[-1] >= 2 and enough:
                return side

    def check(self) -> None:
        """Raise a ValueError for settings that no model can have."""
        for name, value in asdict(self).items():
            if type(value) is int and name != "vector_loss_start" and value < 1:
                raise ValueError(f"model.{name} is {value}, must be at least 1")
        if not 0 <= self.vector_loss_start < self.decoder_layers:
            raise ValueError(
                f"model.vector_loss_start is {self.vector_loss_start}, must be 0 to {self.decoder_layers - 1}, "
                f"less than the {self.decoder_layers} decoder layers"
            )
        if self.freeze_detector and self.mask_branch != "separate":
            raise ValueError("model.freeze_detector leaves nothing to train without --model.mask-branch separate")
