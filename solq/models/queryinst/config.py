"""The settings of QueryInst."""

from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from solq.models.backbones import Backbone


@dataclass
class QueryInstConfig:
    """The architecture of QueryInst; the defaults are the published model with ResNet-50 and 100 queries."""

    changeable: ClassVar[frozenset[str]] = frozenset({"num_classes", "gradient_checkpointing"})
    dense_labels: ClassVar[bool] = True

    backbone: Backbone = "resnet50"
    backbone_norm: Literal["running", "group"] = "running"
    """Batch norm with running statistics for ImageNet weights; group norm, with every stage trained, from scratch
    (ResNets only)."""
    num_classes: int = 80
    """Outputs of the class and mask heads; training sets it from the dataset."""
    num_queries: int = 100
    num_stages: int = 6
    width: int = 256
    num_heads: int = 8
    feedforward: int = 2048
    dynamic_width: int = 64
    """Width between the two products of a dynamic convolution."""
    mask_convs: int = 4
    """3×3 convolutions of each mask head."""
    mask_size: int = 256
    """Side N of the target masks in their box frame, from which those in the predicted boxes are resampled."""
    gradient_checkpointing: bool = False
    """Recompute stages and mask heads in the backward pass: less memory, more time."""

    @property
    def num_layers(self) -> int:
        """Number of stages."""
        return self.num_stages

    @property
    def mask_target_size(self) -> int:
        """Side N of the target masks (T, N, N)."""
        return self.mask_size

    @property
    def min_image_size(self) -> int:
        """Least side of a square image with two pixels on every level."""
        return 64

    def check(self) -> None:
        """Raise a ValueError for settings that no model can have."""
        for name, value in asdict(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f"model.{name} is {value}, must be at least 1")
        if self.width % self.num_heads:
            raise ValueError(f"model.width is {self.width}, must be a multiple of num_heads ({self.num_heads})")
