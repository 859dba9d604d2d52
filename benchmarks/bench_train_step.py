"""One training step of a whole model: forward, losses of all layers, backward, optimizer; eager and compiled.

    OMP_NUM_THREADS=2 pytest benchmarks/bench_train_step.py --benchmark-only

The published implementation takes 20 s for the first row's work on two CPU cores (12 s, 0.5 s and 7 s).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from solq.data.batch import PackedTargets
from solq.models.solq.model import SOLQ
from solq.training.criterion import SetCriterion
from solq.training.matcher import HungarianMatcher
from solq.training.presets import preset

CASES = {  # preset, images, their size, objects per image, rounds
    "r50 480x640": ("r50", 2, (480, 640), 12, 3),
    "shapes 128x128": ("shapes", 16, (128, 128), 3, 15),
}


def training_step(name: str, images: int, size: tuple[int, int], objects: int, **flags: Any) -> Callable[[], None]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = preset(name, cpu=device.type == "cpu")  # type: ignore[arg-type]
    model = SOLQ(config.model).to(device)
    criterion = SetCriterion(HungarianMatcher(), model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    pixels = torch.randn(images, 3, *size, device=device)
    padding_mask = torch.zeros(images, *size, dtype=torch.bool, device=device)
    total, N = images * objects, config.model.mask_target_size
    targets = PackedTargets(
        labels=torch.randint(0, config.model.num_classes, (total,)),
        boxes=torch.rand(total, 4) * 0.4 + 0.1,
        masks=torch.randint(0, 2, (total, N, N), dtype=torch.uint8),
        offsets=torch.arange(images + 1) * objects,
        image_ids=torch.arange(images),
        orig_sizes=torch.tensor([size] * images),
        sizes=torch.tensor([size] * images),
    ).to(device)
    network = torch.compile(model, fullgraph=True, dynamic=False) if flags["compiled"] else model

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=flags["amp"]):
            outputs = network(pixels, padding_mask)
        criterion.total(criterion(outputs, targets)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", CASES)
def test_training_step(benchmark, case: str, compiled: bool, amp: bool) -> None:
    *shape, rounds = CASES[case]
    benchmark.group = case
    step = training_step(*shape, compiled=compiled, amp=amp)  # type: ignore[arg-type]
    # As train.py compiles on a CPU.
    with torch._functorch.config.patch(aggressive_recomputation=not torch.cuda.is_available()):
        benchmark.pedantic(step, rounds=rounds, warmup_rounds=2)
