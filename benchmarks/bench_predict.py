"""Prediction end to end: images per second of SOLQ-R50 with masks in full resolution, and the masks' share of it.

On a CPU one image of 480×640, as the official code was measured (2.4 s with masks on two cores). On a GPU 800×1333:
float32 eager against bfloat16 compiled.

`PYTHONPATH=. pytest benchmarks/bench_predict.py --benchmark-only`
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from solq import Predictor
from solq.models.solq.config import SOLQConfig
from solq.models.solq.model import SOLQ

GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


@pytest.fixture(scope="module")
def model() -> SOLQ:
    """Untrained, but with boxes and masks of many sizes and forms."""
    torch.manual_seed(0)
    model = SOLQ(SOLQConfig()).eval()
    for head in [*model.bbox_embed, model.masks.vector_embed]:
        nn.init.normal_(head.layers[-1].weight, std=0.05)
    return model


def finished(function: Callable[..., object], *arguments: object) -> object:
    result = function(*arguments)
    if GPU:
        torch.cuda.synchronize()
    return result


def random_image(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.skipif(GPU, reason="the CPU's number")
@pytest.mark.parametrize("part", ["all", "masks"])
def test_cpu_480x640(benchmark, model, part):
    """The masks may take a tenth of everything."""
    predictor = Predictor(model, device="cpu", size=480, max_size=640)
    image = random_image(480, 640)
    if part == "all":
        found = benchmark.pedantic(lambda: predictor(image, threshold=0), rounds=5, warmup_rounds=1)
        assert found.masks.shape == (100, 480, 640)
        return
    outputs = predictor._forward(image[None], torch.zeros(1, 480, 640, dtype=torch.bool))
    (found,) = model.postprocess(outputs, torch.tensor([[480, 640]]), with_masks=False)
    queries = torch.arange(100)
    masks = benchmark.pedantic(
        lambda: model.masks.masks(outputs, 0, queries, found.labels, found.boxes, (480, 640)), rounds=9
    )
    assert masks.shape == (100, 480, 640)


@needs_gpu
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize(("dtype", "compiled"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_gpu_800x1333(benchmark, model, dtype, compiled, batch_size):
    """Goal: bfloat16 compiled at least 3 times as fast as float32 eager; divide the times by the batch size."""
    predictor = Predictor(model, device="cuda", dtype=dtype, compile=compiled, batch_size=batch_size)
    images = [random_image(800, 1333)] * batch_size
    benchmark.extra_info["images per round"] = batch_size
    found = benchmark.pedantic(lambda: finished(predictor, images), rounds=10, warmup_rounds=3)
    assert len(found) == batch_size


@pytest.mark.parametrize("workers", [1, 4])
def test_folder(benchmark, model, workers):
    """A folder of JPEGs, decoded by other threads while the model computes."""
    root = Path(os.environ.get("SOLQ_COCO_TINY", Path(__file__).parents[2] / "shared" / "data" / "coco-tiny"))
    if not root.is_dir():
        pytest.skip(f"no real images: {root} is not there (set SOLQ_COCO_TINY)")
    files = sorted((root / "val2017").iterdir())[: None if GPU else 4]
    size = {} if GPU else {"size": 240, "max_size": 320}
    predictor = Predictor(model, workers=workers, **size)
    benchmark.extra_info["images per round"] = len(files)
    found = benchmark.pedantic(lambda: finished(predictor, files), rounds=3, warmup_rounds=1)
    assert len(found) == len(files)
