"""Detections: the objects that a model found in an image, in pixels, and the facts that a model is used with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from solq.data.image import ImageLike, read_rgb
from solq.drawing import draw_instances
from solq.kernels import mask_runs


@dataclass
class ModelMeta:
    """The facts that a trained model is used with besides its weights; they travel with them in a file."""

    class_names: list[str] = field(default_factory=list)
    """Name of each label, empty for a label that no category has; an empty list if they are not known."""
    category_ids: list[int] = field(default_factory=list)
    """The dataset's category of each label; an empty list if the labels are the categories."""
    eval_scale: int = 800
    """Length of the shorter image side in pixels."""
    max_size: int = 1333
    """Bound of the longer side in pixels."""
    license: str = "Apache-2.0"
    """License of the weights."""


def coco_class_names() -> list[str]:
    """Return the names of COCO's categories by their ids 0 … 90; empty for the ids that are not used."""
    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return ["" if name in ("__background__", "N/A") else name for name in names]


@dataclass
class Detections:
    """The K detections of one image, best first, on the device of the model's outputs.

    Attributes:
        boxes: (K, 4) float32, x0 y0 x1 y1 in pixels of the original image, not clipped to it.
        scores: (K,) float32 in 0..1.
        labels: (K,) int64, indices into the model's classes.
        masks: (K, H, W) bool; None if the model predicts no masks, or if they are kept as `run_lengths`.
        meta: names the classes and their categories.
        run_lengths: the masks as :meth:`rle` returns them, if they were decoded to those.
        queries: (K,) int64, the query that found each object; None if no model did.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None
    meta: ModelMeta = field(default_factory=ModelMeta)
    run_lengths: list[dict[str, Any]] | None = None
    queries: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, kept: Tensor | slice) -> "Detections":
        """Return the detections where `kept` is true, or those of its indices."""
        run_lengths = self.run_lengths
        if run_lengths is not None:
            index = kept if isinstance(kept, slice) else kept.cpu()
            run_lengths = [run_lengths[k] for k in torch.arange(len(self))[index].tolist()]
        return replace(self._map(lambda part: part[kept]), run_lengths=run_lengths)

    def to(self, device: torch.device | str) -> "Detections":
        """Copy to a device."""
        return self._map(lambda part: part.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Detections":
        """Return the detections with `function` applied to each tensor."""
        changes: dict[str, Any] = {key: function(part) for key, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **changes)

    @property
    def class_names(self) -> list[str]:
        """Name the class of each detection; "class 3" where the name is not known."""
        names = dict(enumerate(self.meta.class_names))
        return [names.get(label) or f"class {label}" for label in self.labels.tolist()]

    @property
    def names_and_scores(self) -> list[str]:
        """Describe each detection in a picture, such as "cat 0.93"."""
        return [f"{name} {score:.2f}" for name, score in zip(self.class_names, self.scores.tolist(), strict=True)]

    def draw(self, image: ImageLike, threshold: float = 0.0) -> Image.Image:
        """Draw masks, boxes, names and scores of the detections of at least `threshold` on the image.

        `image` is the image that was predicted on, as :class:`solq.Predictor` takes it. Small ones come back enlarged.

        Raises:
            ValueError: the masks are of another size than the image.
        """
        pixels = read_rgb(image)
        if self.masks is not None and self.masks.shape[-2:] != pixels.shape[-2:]:
            raise ValueError(
                f"image is {pixels.shape[1]}x{pixels.shape[2]} but the masks are of an image of "
                f"{self.masks.shape[1]}x{self.masks.shape[2]} (height x width)"
            )
        shown = self[self.scores >= threshold].to("cpu")
        return draw_instances(pixels, shown.boxes, shown.scores, shown.names_and_scores, shown.masks)

    def to_supervision(self) -> Any:
        """Convert to a `supervision.Detections` (`pip install solq[supervision]`)."""
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision needs supervision: pip install solq[supervision]") from error
        return supervision.Detections(
            xyxy=self.boxes.cpu().numpy(),
            mask=None if self.masks is None else self.masks.cpu().numpy(),
            confidence=self.scores.cpu().numpy(),
            class_id=self.labels.cpu().numpy(),
            data={"class_name": np.array(self.class_names, dtype=str)},
        )

    def rle(self) -> list[dict[str, Any]]:
        """Return the masks as COCO's compressed run lengths, see :func:`encode_masks`."""
        if self.run_lengths is not None:
            return self.run_lengths
        if self.masks is None:
            raise ValueError("these detections have no masks to encode: the model was run without a mask coding")
        return encode_masks(self.masks)

    def to_coco(self, image_id: int, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Return an entry of COCO's result format for each detection; bbox is x y w h in pixels, to a thousandth.

        Args:
            image_id: the dataset's id of the image.
            category_ids: the category of each label; None takes those of `meta`, or if it has none the labels.
        """
        category_ids = category_ids or self.meta.category_ids
        corner, opposite = self.boxes.double().cpu().split(2, dim=-1)
        boxes = torch.cat([corner, opposite - corner], dim=-1).numpy().round(3).tolist()
        scores = self.scores.double().cpu().numpy().round(6).tolist()
        labels = self.labels.tolist()
        if category_ids:
            if labels and max(labels) >= len(category_ids):
                raise ValueError(
                    f"image {image_id} has label {max(labels)} but there are {len(category_ids)} categories"
                )
            labels = [category_ids[label] for label in labels]
        entries = [
            {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
            for category, box, score in zip(labels, boxes, scores, strict=True)
        ]
        if self.masks is None and self.run_lengths is None:
            return entries
        return [entry | {"segmentation": rle} for entry, rle in zip(entries, self.rle(), strict=True)]


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Encode masks (K, H, W) bool as COCO's compressed run lengths: dicts of `size` [H, W] and `counts`, a str."""
    if len(masks) == 0:
        return []
    if masks.is_cuda:  # only where the runs end is copied to the host
        return encode_runs(*mask_runs(masks), (masks.shape[1], masks.shape[2]))
    encoded = coco_mask.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().view(np.uint8)))
    return [rle | {"counts": rle["counts"].decode()} for rle in encoded]


def encode_runs(positions: Tensor, counts: Tensor, image_size: tuple[int, int]) -> list[dict[str, Any]]:
    """Encode the ends of runs, in the form of :func:`solq.kernels.mask_runs`, as COCO's compressed run lengths."""
    if len(counts) == 0:
        return []
    H, W = image_size
    ends_of_masks = np.split(positions.cpu().numpy(), counts.cumsum(0).cpu().numpy()[:-1])
    runs = [{"size": [H, W], "counts": np.diff(ends, prepend=0, append=H * W)} for ends in ends_of_masks]
    return [rle | {"counts": rle["counts"].decode()} for rle in coco_mask.frPyObjects(runs, H, W)]
