"""Small models and datasets that many tests need."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from solq.data.annotations import split_paths
from solq.detections import ModelMeta
from solq.models.queryinst.config import QueryInstConfig
from solq.models.queryinst.model import QueryInst
from solq.models.solq.config import SOLQConfig
from solq.models.solq.model import SOLQ

CLASS_NAMES = ["disc", "ring", "star"]


def solq_config(**changes: Any) -> SOLQConfig:
    """Settings of a SOLQ that takes images of 64×64 pixels and more."""
    settings: dict[str, Any] = {
        "backbone": "resnet10",
        "backbone_norm": "group",
        "num_classes": len(CLASS_NAMES),
        "width": 64,
        "num_heads": 2,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "feedforward": 32,
        "num_queries": 10,
        "num_levels": 3,
        "num_coefficients": 64,
        "mask_size": 64,
        "vector_hidden": 32,
    }
    return SOLQConfig(**settings | changes)


def queryinst_config(**changes: Any) -> QueryInstConfig:
    """Settings of a QueryInst that takes images of 64×64 pixels and more."""
    settings: dict[str, Any] = {
        "backbone": "resnet10",
        "backbone_norm": "group",
        "num_classes": len(CLASS_NAMES),
        "num_queries": 10,
        "num_stages": 2,
        "width": 64,
        "num_heads": 2,
        "feedforward": 64,
        "dynamic_width": 16,
        "mask_convs": 1,
        "mask_size": 64,
    }
    return QueryInstConfig(**settings | changes)


def solq_model(meta: ModelMeta | None = None, **changes: Any) -> SOLQ:
    """Build an untrained SOLQ in eval mode that finds something different in every image."""
    torch.manual_seed(0)
    model = SOLQ(solq_config(**changes)).eval()
    for name, parameter in model.named_parameters():
        if name.startswith(("class_embed.", "bbox_embed.")):
            torch.nn.init.normal_(parameter, std=0.2)
        elif name == "masks.vector_embed.layers.2.weight":
            torch.nn.init.normal_(parameter)
    model.meta = meta or ModelMeta(CLASS_NAMES, [], 64, 64)
    return model


def picture(height: int = 40, width: int = 60) -> np.ndarray:
    """Draw an image, black but for its upper left quarter, which is red above green, so that nothing is symmetric."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 4, : width // 2, 0] = 255
    pixels[height // 4 : height // 2, : width // 2, 1] = 255
    return pixels


def as_tensor(pixels: np.ndarray) -> Tensor:
    """Convert pixels (H, W, C) to a tensor (C, H, W)."""
    return torch.from_numpy(pixels).permute(2, 0, 1)


def queryinst_model(meta: ModelMeta | None = None, **changes: Any) -> QueryInst:
    """Build an untrained QueryInst in eval mode whose queries, boxes and masks differ from each other."""
    torch.manual_seed(0)
    model = QueryInst(queryinst_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone."):
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.proposal_boxes.weight.uniform_(0.2, 0.6)
    model.meta = meta or ModelMeta(CLASS_NAMES, [], 64, 64)
    return model


def write_image(path: Path, size: tuple[int, int] = (40, 60), seed: int = 0) -> Path:
    """Write noise as an image file of this height and width."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_coco(root: Path, class_names: Sequence[str], split: str = "val2017") -> Path:
    """Write a split in COCO's layout: three images of 40×60 pixels, each with one square of another class."""
    folder, file = split_paths(root, split)
    images = [{"id": n, "file_name": f"{n}.png", "height": 40, "width": 60} for n in range(3)]
    square = {"bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0, "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]]}
    annotations = [{"id": n + 1, "image_id": n, "category_id": n + 1, **square} for n in range(3)]
    categories = [{"id": n, "name": name} for n, name in enumerate(class_names, 1)]
    for n in range(3):
        write_image(folder / f"{n}.png", seed=n)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return root
