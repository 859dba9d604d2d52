"""Deformable DETR and RT-DETR of transformers, unpatched and patched: the forward pass and the training step.

On a GPU: the published sizes, bfloat16 autocast, images of 800 × 1333 (RT-DETR: 640 × 640), warmed up; the training
step is loss, matching and backward. Without a GPU: a block per stage, one encoder and two decoder layers, float32,
small images, so that the patch's effect on a CPU is seen; these numbers say nothing about a GPU. Compare the two rows
of a group, measured in one run; where others use the processor, with --benchmark-timer=time.process_time.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from solq.drop_in import transformers as drop_in

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
needs_no_gpu = pytest.mark.skipif(DEVICE.type == "cuda", reason="the small rows are for machines without a GPU")


def deformable_detr(small: bool) -> tuple[nn.Module, tuple[int, int]]:
    depths = [1, 1, 1, 1] if small else [3, 4, 6, 3]
    layers = {"encoder_layers": 1, "decoder_layers": 2} if small else {}
    backbone = transformers.ResNetConfig(depths=depths, out_features=["stage2", "stage3", "stage4"])
    config = transformers.DeformableDetrConfig(backbone_config=backbone, num_labels=91, **layers)
    return transformers.DeformableDetrForObjectDetection(config), (160, 192) if small else (800, 1333)


def rt_detr(small: bool) -> tuple[nn.Module, tuple[int, int]]:
    depths = [1, 1, 1, 1] if small else [3, 4, 6, 3]
    backbone = transformers.RTDetrResNetConfig(depths=depths, out_features=["stage2", "stage3", "stage4"])
    config = transformers.RTDetrConfig(backbone_config=backbone, num_labels=80, decoder_layers=2 if small else 6)
    return transformers.RTDetrForObjectDetection(config), (160, 160) if small else (640, 640)


def step(make: Callable[[bool], tuple[nn.Module, tuple[int, int]]], small: bool, training: bool) -> Callable[[], None]:
    """One call: the forward pass without gradients, or with the loss and the backward pass."""
    torch.manual_seed(0)
    model, (height, width) = make(small)
    model = model.to(DEVICE).train(training)
    B = 1 if small else 2
    pixel_values = torch.rand(B, 3, height, width, device=DEVICE)
    labels: list[dict[str, Any]] | None = None
    if training:
        labels = [
            {
                "class_labels": torch.randint(80, (7,), device=DEVICE),
                "boxes": torch.rand(7, 4, device=DEVICE) * 0.4 + 0.1,
            }
            for _ in range(B)
        ]

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(training), torch.autocast(DEVICE.type, torch.bfloat16, enabled=not small):
            outputs = model(pixel_values=pixel_values, labels=labels)
        if training:
            outputs.loss.backward()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
@pytest.mark.parametrize(
    "small",
    [pytest.param(False, marks=needs_gpu, id="bf16"), pytest.param(True, marks=needs_no_gpu, id="small-float32")],
)
@pytest.mark.parametrize("training", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("make", [deformable_detr, rt_detr], ids=lambda make: make.__name__)
def test_drop_in_transformers(
    benchmark: Any,
    make: Callable[[bool], tuple[nn.Module, tuple[int, int]]],
    training: bool,
    small: bool,
    patched: bool,
) -> None:
    benchmark.group = f"transformers {make.__name__}, {'training step' if training else 'forward'}"
    run = step(make, small, training)
    if patched:
        drop_in.patch()
    try:
        benchmark.pedantic(run, rounds=5 if small else 20, warmup_rounds=1 if small else 5)
    finally:
        drop_in.unpatch()
