"""Settings: the architecture, a training run, and the presets by name."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

Preset = Literal["shapes", "r50", "r101", "swin-l"]
Backbone = Literal["resnet10", "resnet18", "resnet50", "resnet101", "swin-t", "swin-s", "swin-b", "swin-l"]


@dataclass
class ModelConfig:
    """The architecture; the defaults are the published SOLQ with ResNet-50."""

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
    """Queries from the encoder's best proposals instead of learned ones."""
    mask_coding: Literal["dct", "pca", "sparse", "flat"] = "dct"
    num_coefficients: int | None = None
    """Length n of the mask vector; 256 unless given (Table 3e), 784 for the flat coding."""
    mask_size: int | None = None
    """Side N of the coded masks; 128 unless given (Table 3d), 28 for the flat coding."""
    vector_hidden: int = 1024
    gradient_checkpointing: bool = False
    """Recompute transformer layers in the backward pass: less memory, more time."""
