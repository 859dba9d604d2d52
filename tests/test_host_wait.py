"""Neither a step of a training nor the matcher by itself makes the host wait for the device.

On a GPU PyTorch itself asserts that. Elsewhere the device is "meta": of its tensors nothing can be read, and copies to
it are seen by a mode.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from solq.kernels.matching import ClassCostForm
from solq.models.queryinst.config import QueryInstConfig
from solq.models.solq.config import SOLQConfig
from solq.models.solq.model import SOLQ
from solq.training.config import TrainConfig
from solq.training.criterion import SetCriterion
from solq.training.distributed import Process
from solq.training.matcher import HungarianMatcher

REPOSITORY = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "meta")


class NoBlockingCopy(TorchDispatchMode):
    """Fails where the host would wait for a copy to another device, be it one that an operator makes by itself."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        if operator.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[operator.overloadpacket is torch.ops.aten.copy_]
            non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
            assert source.device == result.device or non_blocking, f"the host waits for {operator} to {result.device}"
        else:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim > 0]
            assert len({x.device for x in tensors}) <= 1, f"the host waits for an argument of {operator}"
        return result


@contextlib.contextmanager
def no_host_wait() -> Iterator[None]:
    if DEVICE.type == "meta":
        with NoBlockingCopy():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """train.py, stopped after five batches, of which the last four fail where the host waits."""
    specification = importlib.util.spec_from_file_location("train", REPOSITORY / "train.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    prefetch = module.prefetch

    def watched(*args: Any) -> Generator[Any, None, None]:
        batches = prefetch(*args)
        yield next(batches)  # compiles, and copies what is then kept
        for _ in range(4):
            batch = next(batches)
            with no_host_wait():
                yield batch  # the step
        raise Finished

    batches: list[Generator[Any, None, None]] = []
    monkeypatch.setattr(module, "prefetch", lambda *args: batches.append(watched(*args)) or batches[0])
    if DEVICE.type == "meta":  # which these two do not know
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        adamw = torch.optim.AdamW
        monkeypatch.setattr(torch.optim, "AdamW", lambda groups, fused: adamw(groups))
    yield module
    for watch in batches:
        watch.close()  # a step that failed has left it inside `no_host_wait`


class Finished(Exception):
    """Raised after the steps to be watched."""


SMALL = tiny.solq_config(num_levels=4)
QUERYINST = tiny.queryinst_config()


def run(
    main: ModuleType, data: Path, output: Path, model: SOLQConfig | QueryInstConfig, settings: dict[str, Any]
) -> None:
    config: TrainConfig[Any] = TrainConfig(
        model=model, data=data, output=output, scales=(64,), max_size=64, workers=0, batch_size=2,
        backbone_weights="none", steps=100, log_every=100,
    )  # fmt: skip
    with pytest.raises(Finished):
        main.train(replace(config, **settings), Process(0, 1, DEVICE))


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        pytest.param(SMALL, {"ema_decay": 0.9}, id="average"),
        pytest.param(replace(SMALL, two_stage=True, gradient_checkpointing=True), {"amp": True}, id="two_stage"),
        pytest.param(replace(SMALL, mask_branch="separate"), {}, id="separate"),
        pytest.param(
            replace(SMALL, mask_coding="flat", num_coefficients=None, mask_size=16),
            {"batch_size": 4, "accumulate": 2},
            id="flat",
        ),
        pytest.param(SMALL, {"amp": True, "compile": True, "ema_decay": 0.9}, id="compiled", marks=pytest.mark.gpu),
        pytest.param(QUERYINST, {"amp": True}, id="queryinst"),
        pytest.param(
            replace(QUERYINST, num_queries=2, gradient_checkpointing=True), {}, id="more objects than queries"
        ),
    ],
)
def test_steps_never_wait(
    model: SOLQConfig | QueryInstConfig, settings: dict[str, Any], shapes_folder: Path, tmp_path: Path, main: ModuleType
) -> None:
    run(main, shapes_folder, tmp_path / "run", model, settings)


@pytest.mark.parametrize(
    "wait",
    [
        lambda images: images.sum().item(),
        lambda images: images[images > 0],
        lambda images: torch.zeros(()).to(images.device),
        lambda images: torch.zeros((), device=images.device).copy_(torch.ones(())),
        lambda images: images[torch.zeros(1, dtype=torch.int64)],
    ],
    ids=["item", "mask", "to", "copy", "index"],
)
def test_waits_are_seen(
    wait: Callable[[Tensor], object],
    shapes_folder: Path,
    tmp_path: Path,
    main: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    normalize = main.normalize

    def waiting(images: Tensor, padding_mask: Tensor) -> Tensor:
        wait(images)
        return normalize(images, padding_mask)

    monkeypatch.setattr(main, "normalize", waiting)
    with pytest.raises((RuntimeError, AssertionError)):
        run(main, shapes_folder, tmp_path / "run", SMALL, {})


@pytest.mark.parametrize("class_cost_form", ["focal", "softmax"])
def test_matcher_never_waits(class_cost_form: ClassCostForm) -> None:
    """As another codebase calls it, with everything on the device."""
    outputs = {"pred_logits": torch.zeros(3, 6, 4, device=DEVICE), "pred_boxes": torch.ones(3, 6, 4, device=DEVICE)}
    targets = [
        {"labels": torch.zeros(n, device=DEVICE, dtype=torch.int64), "boxes": torch.ones(n, 4, device=DEVICE)}
        for n in (2, 0, 9)
    ]
    matcher = HungarianMatcher(class_cost_form=class_cost_form)
    matcher(outputs, targets)
    with no_host_wait():
        matches = matcher(outputs, targets)
    assert [len(query) for query, _ in matches] == [2, 0, 6]


def test_losses_of_a_list_of_targets_never_wait() -> None:
    outputs = {
        "pred_logits": torch.zeros(2, 2, 6, 4, device=DEVICE, requires_grad=True),
        "pred_boxes": torch.full((2, 2, 6, 4), 0.5, device=DEVICE, requires_grad=True),
        "pred_vectors": torch.zeros(2, 2, 6, 12, device=DEVICE, requires_grad=True),
    }
    targets = [
        {
            "labels": torch.zeros(n, device=DEVICE, dtype=torch.int64),
            "boxes": torch.full((n, 4), 0.5, device=DEVICE),
            "masks": torch.ones(n, 16, 16, device=DEVICE, dtype=torch.uint8),
            "image_id": 7,
            "orig_size": (32, 32),
            "size": (32, 32),
        }
        for n in (3, 0)
    ]
    config = tiny.solq_config(num_classes=4, num_coefficients=12, mask_size=16)
    criterion = SetCriterion(HungarianMatcher(), SOLQ(config))
    for step in range(2):
        with no_host_wait() if step else contextlib.nullcontext():
            criterion.total(criterion(outputs, targets)).backward()
