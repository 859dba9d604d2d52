"""The contract between a model and everything around it: training, evaluation, prediction, export."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NotRequired, Protocol, TypedDict

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from solq.data.batch import PackedTargets
from solq.detections import Detections, ModelMeta, encode_runs
from solq.kernels.reference import mask_runs

MASK_PIXELS = 2**27  # decoded at once: 100 masks of an image up to 1,300,000 pixels, half a gigabyte as float32


class ModelConfig(Protocol):
    """The settings of a model: a dataclass whose fields are the `--model.*` flags of train.py."""

    num_classes: int
    num_queries: int
    changeable: ClassVar[frozenset[str]]
    """Settings that may differ when a run is resumed, because neither weights nor data depend on them."""
    dense_labels: ClassVar[bool]
    """Whether COCO's 80 categories are the labels 0 to 79, or keep their ids up to 90 as labels."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers (or stages), each with losses of its own."""

    @property
    def mask_target_size(self) -> int:
        """Side N of the target masks (T, N, N) that the model learns from."""

    @property
    def min_image_size(self) -> int:
        """Least side in pixels of a square padded image that the model takes, a multiple of 32."""

    def check(self) -> None:
        """Raise a ValueError for settings that no model can have."""


class Outputs(TypedDict):
    """The predictions of all L decoder layers (or stages) for B images and Q queries, the last layer last."""

    pred_logits: Tensor
    """(L, B, Q, C) float32."""
    pred_boxes: Tensor
    """(L, B, Q, 4) float32, cx cy w h in 0..1 of each image without its padding."""
    enc_logits: NotRequired[Tensor]
    """(B, S, C) float32, class scores of the encoder's proposals in two-stage models."""
    enc_boxes: NotRequired[Tensor]
    """(B, S, 4) float32, boxes of the encoder's proposals."""


@dataclass
class Matches:
    """The queries matched to T targets in each of L layers, and the numbers that losses are divided by.

    Attributes:
        queries: (L, T) int64, the query of each target; -1 where an image has more targets than queries.
        images: (T,) int64, the image of each target.
        num_targets: () float32, all targets, over all processes divided by their number, at least 1.
        num_matched: () float32, the same for the targets that can be matched.
    """

    queries: Tensor
    images: Tensor
    num_targets: Tensor
    num_matched: Tensor

    def select(self, predictions: Tensor) -> Tensor:
        """Return the matched rows (L, T, …) of predictions (L, B, Q, …); query 0 stands in for "no query"."""
        layers = torch.arange(len(self.queries), device=self.queries.device)[:, None]
        return predictions[layers, self.images, self.queries.clamp(min=0)]


@dataclass
class Selection:
    """The K best of queries × classes of each image, best first.

    Attributes:
        scores: (B, K) float32.
        labels: (B, K) int64.
        queries: (B, K) int64; a query may be selected with several classes.
        boxes: (B, K, 4) float32, x0 y0 x1 y1 in 0..1 of each image without its padding.
    """

    scores: Tensor
    labels: Tensor
    queries: Tensor
    boxes: Tensor


def select_top_k(outputs: Outputs, top_k: int) -> Selection:
    """Select the `top_k` best of queries × classes of each image by the sigmoid scores of the last layer.

    Source: Deformable DETR's postprocessing.
    """
    probabilities = outputs["pred_logits"][-1].float().sigmoid()
    Q, C = probabilities.shape[1:]
    scores, index = probabilities.flatten(1).topk(min(top_k, Q * C))
    queries = index // C
    boxes = outputs["pred_boxes"][-1].float().gather(1, queries[:, :, None].expand(-1, -1, 4))
    return Selection(scores, index % C, queries, box_convert(boxes, "cxcywh", "xyxy"))


@dataclass
class Attention:
    """The sampling points of one decoder layer for one image: M heads, L levels and P points of each query.

    Attributes:
        locations: (Q, M, L, P, 2) float32, (x, y) in 0..1 of the image.
        weights: (Q, M, L, P) float32, of sum 1 for each head.
    """

    locations: Tensor
    weights: Tensor


class MaskBranch(nn.Module, ABC):
    """The part of a model that predicts masks. Calling it computes what the masks of a batch share, in the forward."""

    class_specific: ClassVar[bool] = False
    """Whether the mask of a query depends on the class that is predicted for it."""
    predicts_masks: ClassVar[bool] = True
    """Whether there are masks at all."""
    title: ClassVar[str]
    """The name of this kind of mask prediction in figures."""
    masks_in_every_layer: ClassVar[bool] = False
    """Whether every decoder layer (or stage) predicts masks of its own, see :meth:`masks_by_layer`."""

    @abstractmethod
    def losses(self, outputs: Any, matches: Matches, targets: PackedTargets) -> dict[str, Tensor]:
        """Compute the mask losses of the last l layers by name, each (l,) float32, not weighted."""

    @abstractmethod
    def masks(
        self, outputs: Any, image: int, queries: Tensor, labels: Tensor, boxes: Tensor, image_size: tuple[int, int]
    ) -> Tensor:
        """Predict the masks of K queries of one image, from the last layer.

        Args:
            outputs: of the model.
            image: index of the image in the batch.
            queries: (K,) int64.
            labels: (K,) int64, the classes that they were selected with.
            boxes: (K, 4) float32, x0 y0 x1 y1 in pixels of the image to draw on.
            image_size: height H and width W of that image.

        Returns:
            (K, H, W) bool.
        """

    def runs(
        self, outputs: Any, image: int, queries: Tensor, labels: Tensor, boxes: Tensor, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Predict the same masks as run lengths, in the form of :func:`solq.kernels.mask_runs`."""
        return mask_runs(self.masks(outputs, image, queries, labels, boxes, image_size))

    def masks_by_layer(
        self, outputs: Any, image: int, queries: Tensor, labels: Tensor, boxes: Tensor, image_size: tuple[int, int]
    ) -> Tensor:
        """Predict the masks (L, K, H, W) bool of K queries after every layer, in the boxes (L, K, 4) of the layers.

        Raises:
            NotImplementedError: if only the last layer predicts masks.
        """
        raise NotImplementedError(f"{self.title}: only the last layer predicts masks")

    @abstractmethod
    def export(self, outputs: Any, selection: Selection) -> dict[str, Tensor]:
        """Compute the mask outputs (B, K, …) of an exported program for the selected queries."""

    @abstractmethod
    def describe_export(self, top_k: int) -> dict[str, str]:
        """Describe the shape, type and meaning of each output of :meth:`export`."""


class NoMasks(MaskBranch):
    """The mask branch of a detector, which predicts boxes only."""

    predicts_masks = False
    title = "no masks"

    def forward(self, *inputs: object) -> dict[str, Tensor]:
        return {}

    def losses(self, outputs: Any, matches: Matches, targets: PackedTargets) -> dict[str, Tensor]:
        return {}

    def masks(
        self, outputs: Any, image: int, queries: Tensor, labels: Tensor, boxes: Tensor, image_size: tuple[int, int]
    ) -> Tensor:
        raise ValueError("the model predicts no masks")

    def export(self, outputs: Any, selection: Selection) -> dict[str, Tensor]:
        return {}

    def describe_export(self, top_k: int) -> dict[str, str]:
        return {}


class InstanceSegmenter(nn.Module, ABC):
    """A model that predicts class, box and mask of each of its queries.

    Attributes:
        name: key of the model in :data:`solq.models.MODELS`.
        config: the settings that it was built from.
        meta: class names, evaluation size and license of its weights.
        masks: the part that predicts masks.
    """

    name: ClassVar[str]
    config: Any
    meta: ModelMeta
    masks: MaskBranch

    def __init__(self) -> None:
        super().__init__()
        self.meta = ModelMeta()
        self.register_load_state_dict_pre_hook(_rename_former_keys)

    @abstractmethod
    def forward(self, images: Tensor, padding_mask: Tensor, last_layer_only: bool = False) -> Any:
        """Predict the objects of a batch of padded images.

        Args:
            images: (B, 3, H, W) float32, normalized, zero on padding.
            padding_mask: (B, H, W) bool, True on padding.
            last_layer_only: return the last layer alone, L = 1, which is all that prediction reads.

        Returns:
            A mapping with the keys of :class:`Outputs`, and what the mask branch adds.
        """

    @property
    def matcher_settings(self) -> Mapping[str, Any]:
        """The settings of :class:`solq.training.matcher.HungarianMatcher` that differ from its defaults; none here."""
        return {}

    @property
    @abstractmethod
    def loss_weights(self) -> Mapping[str, float]:
        """The weight of each loss in the total, by the names of :meth:`losses`."""

    @abstractmethod
    def losses(self, outputs: Any, matches: Matches, targets: PackedTargets) -> dict[str, Tensor]:
        """Compute the losses of the last l layers by name, each (l,) float32, not weighted."""

    def rename_former_keys(self, state: dict[str, Tensor], prefix: str = "") -> None:
        """Rename, in place, tensors of a state dict that were written under former names; none by default."""

    def prepare_training(self, resumes: bool) -> None:
        """Freeze the parts that are not trained and, unless a run resumes, read fitted parts; nothing by default."""

    @abstractmethod
    def learning_rate_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters by group: "backbone", "others", and those that the config has a rate for.

        The rate of a group `x` is the setting `lr_x` of the model's config, or of the training run.
        """

    def record_attention(self, layer: int) -> AbstractContextManager[list[Attention]]:
        """Append the attention of one decoder layer to a list, at every call of the model inside the context.

        Raises:
            ValueError: if the model has no such attention.
        """
        raise ValueError(f"{self.name} has no sampling points to draw")

    @contextmanager
    def record_outputs(self) -> Iterator[list[Any]]:
        """Append the outputs of all layers to a list, at every call of the model inside the context."""
        recorded: list[Any] = []

        def ask_for_all(_: nn.Module, arguments: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return arguments, keywords | {"last_layer_only": False}

        hooks = [
            self.register_forward_pre_hook(ask_for_all, with_kwargs=True),
            self.register_forward_hook(lambda _, arguments, outputs: recorded.append(outputs)),
        ]
        try:
            yield recorded
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def postprocess(
        self,
        outputs: Any,
        orig_sizes: Tensor,
        top_k: int = 100,
        score_threshold: float = 0.0,
        *,
        with_masks: bool = True,
        run_lengths: bool = False,
    ) -> list[Detections]:
        """Convert outputs to detections in the pixels of the original images.

        Args:
            outputs: of :meth:`forward`.
            orig_sizes: (B, 2) int64, height and width of the images on disk.
            top_k: the most detections of an image.
            score_threshold: detections of a lower score are dropped before their masks are decoded.
            with_masks: predict masks, if the model has a mask branch.
            run_lengths: keep the masks as COCO's run lengths instead of (K, H, W) arrays.

        Raises:
            ValueError: if there are not as many sizes as images.
        """
        selection = select_top_k(outputs, top_k)
        if len(orig_sizes) != len(selection.scores):
            raise ValueError(f"orig_sizes has {len(orig_sizes)} images but the outputs have {len(selection.scores)}")
        boxes = selection.boxes * orig_sizes.to(selection.boxes).flip(-1).repeat(1, 2)[:, None]  # W H W H
        detections = []
        for image, (H, W) in enumerate(orig_sizes.tolist()):
            kept = selection.scores[image] >= score_threshold
            found = Detections(
                boxes[image, kept],
                selection.scores[image, kept],
                selection.labels[image, kept],
                queries=selection.queries[image, kept],
            )
            if with_masks and self.masks.predicts_masks:
                self._add_masks(found, outputs, image, (H, W), run_lengths)
            detections.append(found)
        return detections

    def _add_masks(self, found: Detections, outputs: Any, image: int, size: tuple[int, int], run_lengths: bool) -> None:
        """Predict the masks of the detections of one image; the mask of a query is predicted once."""
        queries = found.queries
        assert queries is not None
        key = queries * self.config.num_classes + found.labels if self.masks.class_specific else queries
        unique, inverse = key.unique(return_inverse=True)
        first = torch.zeros_like(unique).scatter_(0, inverse, torch.arange(len(key), device=key.device))
        parts = first.split(max(1, MASK_PIXELS // (size[0] * size[1])))  # the masks of a huge image must fit in memory
        predict = self.masks.runs if run_lengths else self.masks.masks
        predicted = [predict(outputs, image, queries[p], found.labels[p], found.boxes[p], size) for p in parts]
        if run_lengths:
            encoded = [rle for positions, counts in predicted for rle in encode_runs(positions, counts, size)]
            found.run_lengths = [encoded[k] for k in inverse.tolist()]
        else:
            found.masks = torch.cat(predicted)[inverse]  # type: ignore[arg-type]


def _rename_former_keys(model: InstanceSegmenter, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Let a model accept state dicts with former names, whoever calls `load_state_dict`."""
    model.rename_former_keys(state, prefix)
