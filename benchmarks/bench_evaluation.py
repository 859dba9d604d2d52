"""Evaluation of one image with 100 detections at 480×640: outputs to masks, and masks to run lengths.

`pycocotools` is the usual way to run lengths: every mask copied to the host, and encoded there. On a CPU it is this
project's way too.
"""

import functools

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from solq.detections import encode_masks
from solq.kernels import dct_encode, use_backend
from solq.models.solq.config import SOLQConfig
from solq.models.solq.model import SOLQ

H, W, QUERIES, CLASSES = 480, 640, 300, 91
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKEND = "triton" if torch.cuda.is_available() else "reference"  # never the interpreter


def make_outputs() -> dict[str, Tensor]:
    """Every query holds an ellipse that fills its box."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 128), torch.linspace(-1, 1, 128), indexing="ij")
    ellipse = (x**2 + y**2 < 1)[None]
    outputs = {
        "pred_logits": torch.randn(1, 1, QUERIES, CLASSES, generator=generator) - 4,
        "pred_boxes": 0.05 + torch.rand(1, 1, QUERIES, 4, generator=generator) * 0.4,
        "pred_vectors": dct_encode(ellipse).expand(QUERIES, -1)[None, None],
    }
    return {key: value.to(DEVICE) for key, value in outputs.items()}


@functools.cache
def model() -> SOLQ:
    """Build a model for its postprocessing; its layers are never run."""
    return SOLQ(SOLQConfig(backbone="resnet10", width=64, num_classes=CLASSES, num_queries=QUERIES)).to(DEVICE)


def finished(function, *arguments):
    result = function(*arguments)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return result


def by_pycocotools(masks: Tensor) -> list[dict]:
    return coco_mask.encode(np.asfortranarray(masks.permute(1, 2, 0).cpu().numpy().view(np.uint8)))


@pytest.mark.parametrize("masks", [True, False], ids=["boxes and masks", "boxes"])
def test_postprocess(benchmark, masks):
    outputs, sizes = make_outputs(), torch.tensor([[H, W]])
    with use_backend(BACKEND):
        detections = benchmark(finished, functools.partial(model().postprocess, outputs, sizes, with_masks=masks))
    assert len(detections[0]) == 100


@pytest.mark.parametrize("encode", [encode_masks, by_pycocotools], ids=["solq", "pycocotools"])
def test_run_lengths(benchmark, encode):
    with use_backend(BACKEND):
        (detections,) = model().postprocess(make_outputs(), torch.tensor([[H, W]]))
    encoded = benchmark(finished, encode, detections.masks)
    assert len(encoded) == 100
