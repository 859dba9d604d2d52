"""A model that only postprocesses outputs it is given, with the masks of two functions."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from solq.detections import Detections
from solq.models.base import InstanceSegmenter, MaskBranch, NoMasks, Selection

Decode = Callable[[dict[str, Tensor], int, Tensor, Tensor, tuple[int, int]], Any]


class StubMasks(MaskBranch):
    """Decode masks and run lengths by functions of (outputs (B, Q, …), image, queries, boxes, image size)."""

    title = "stub"

    def __init__(self, decode_masks: Decode | None, decode_runs: Decode | None = None) -> None:
        super().__init__()
        self.decode_masks, self.decode_runs = decode_masks, decode_runs

    def losses(self, *_: object) -> dict[str, Tensor]:
        return {}

    def masks(self, outputs: Any, image: int, queries: Tensor, labels: Tensor, boxes: Tensor, size: Any) -> Tensor:
        return self.decode_masks(last_layer(outputs), image, queries, boxes, size)

    def runs(self, outputs: Any, image: int, queries: Tensor, labels: Tensor, boxes: Tensor, size: Any) -> Any:
        if self.decode_runs is None:
            return super().runs(outputs, image, queries, labels, boxes, size)
        return self.decode_runs(last_layer(outputs), image, queries, boxes, size)

    def export(self, outputs: Any, selection: Selection) -> dict[str, Tensor]:
        return {}

    def describe_export(self, top_k: int) -> dict[str, str]:
        return {}


class StubModel(InstanceSegmenter):
    """Postprocess outputs of `num_classes` classes."""

    name = "stub"
    loss_weights: dict[str, float] = {}  # noqa: RUF012

    def __init__(self, num_classes: int, masks: MaskBranch) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_classes=num_classes)
        self.masks = masks

    def forward(self, images: Tensor, padding_mask: Tensor, last_layer_only: bool = False) -> Any:
        raise AssertionError("not called")

    def losses(self, *_: object) -> dict[str, Tensor]:
        return {}

    def learning_rate_groups(self) -> dict[str, list[nn.Parameter]]:
        return {}


def last_layer(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[-1] for name, value in outputs.items()}


def postprocess(
    outputs: dict[str, Tensor], sizes: Tensor, decode_masks: Decode | None, top_k: int = 100, **settings: Any
) -> list[Detections]:
    """Postprocess the outputs (B, Q, …) of one layer with masks of `decode_masks`, or with none."""
    decode_runs = settings.pop("decode_runs", None)
    masks = StubMasks(decode_masks, decode_runs) if decode_masks or decode_runs else NoMasks()
    model = StubModel(outputs["pred_logits"].shape[-1], masks)
    stacked = {name: value[None] for name, value in outputs.items()}
    return model.postprocess(stacked, sizes, top_k, run_lengths=decode_runs is not None, **settings)
