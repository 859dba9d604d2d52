"""The outputs of the model to detections in the pixels of the original image."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.ops import box_convert

from solq.kernels.reference import mask_runs
from solq.training.config import ModelMeta

# Outputs, an image of the batch, queries (K,), their boxes (K, 4) in pixels, (H, W) to masks (K, H, W) bool, or to
# `paste_runs` of them.
DecodeMasks = Callable[[Mapping[str, Any], int, Tensor, Tensor, tuple[int, int]], Tensor]
DecodeRuns = Callable[[Mapping[str, Any], int, Tensor, Tensor, tuple[int, int]], tuple[Tensor, Tensor]]

MASK_PIXELS = 2**27  # decoded at once: 100 masks of an image up to 1,300,000 pixels, half a gigabyte as float32


@dataclass
class Detections:
    """What was found in one image, best first. K masks, on the device of the model's outputs.

    boxes (K, 4) float32, x0 y0 x1 y1 in pixels of the original image, not clipped to it; scores (K,) float32;
    labels (K,) int64, indices into the model's classes; masks (K, H, W) bool, or None without a mask coding; meta names
    the classes and their categories; run_lengths are the masks as `rle` gives them, where they were decoded to those
    and `masks` is None.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None
    meta: ModelMeta = field(default_factory=ModelMeta)
    run_lengths: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, kept: Tensor | slice) -> "Detections":
        """The detections where `kept` is true, or of its indices."""
        masks, run_lengths = self.masks, self.run_lengths
        if masks is not None:
            masks = masks[kept]
        if run_lengths is not None:
            index = kept if isinstance(kept, slice) else kept.cpu()
            run_lengths = [run_lengths[k] for k in torch.arange(len(self))[index].tolist()]
        return Detections(self.boxes[kept], self.scores[kept], self.labels[kept], masks, self.meta, run_lengths)

    def to(self, device: torch.device | str) -> "Detections":
        masks = None if self.masks is None else self.masks.to(device)
        boxes, scores, labels = self.boxes.to(device), self.scores.to(device), self.labels.to(device)
        return Detections(boxes, scores, labels, masks, self.meta, self.run_lengths)

    @property
    def class_names(self) -> list[str]:
        """The name of each detection's class; "class 3" where it is not known."""
        names = dict(enumerate(self.meta.class_names))
        return [names.get(label) or f"class {label}" for label in self.labels.tolist()]

    def draw(self, image: Any, threshold: float = 0.0) -> Image.Image:
        """The image with the masks, boxes, names and scores of the detections of at least `threshold` on it.

        `image` is what was predicted on, as :class:`solq.Predictor` takes it. Small ones come back enlarged.
        """
        from torchvision.transforms.v2.functional import to_pil_image

        from solq.predictor import read_rgb  # imports this module
        from solq.visualize import draw_detections

        pixels = read_rgb(image)
        if self.masks is not None and self.masks.shape[-2:] != pixels.shape[-2:]:
            raise ValueError(
                f"image is {pixels.shape[1]}x{pixels.shape[2]} but the masks are of an image of "
                f"{self.masks.shape[1]}x{self.masks.shape[2]} (height x width)"
            )
        names = dict(zip(self.labels.tolist(), self.class_names, strict=True))
        of_label = [names.get(label, "") for label in range(max(names, default=-1) + 1)]
        return to_pil_image(draw_detections(pixels, self.to("cpu"), of_label, threshold))

    def to_supervision(self) -> Any:
        """A `supervision.Detections` (`pip install solq[supervision]`)."""
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
        """The masks as COCO's compressed run lengths, see :func:`encode_masks`."""
        if self.run_lengths is not None:
            return self.run_lengths
        if self.masks is None:
            raise ValueError("these detections have no masks to encode: the model was run without a mask coding")
        return encode_masks(self.masks)

    def to_coco(self, image_id: int, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """One entry of COCO's result format per detection; bbox is x y w h in pixels, to a thousandth.

        `category_ids` names the category of each label; without it they are those of `meta`, or if it has none the
        labels are the categories.
        """
        category_ids = self.meta.category_ids or None if category_ids is None else category_ids
        corner, opposite = self.boxes.double().cpu().split(2, dim=-1)
        boxes = torch.cat([corner, opposite - corner], dim=-1).numpy().round(3).tolist()
        scores = self.scores.double().cpu().numpy().round(6).tolist()
        labels = self.labels.tolist()
        if category_ids is not None:
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
    """Masks (K, H, W) bool as COCO's compressed run lengths: dicts of `size` [H, W] and `counts`, a str."""
    if len(masks) == 0:
        return []
    if masks.is_cuda:  # only where the runs end is copied to the host
        return encode_runs(*mask_runs(masks), (masks.shape[1], masks.shape[2]))
    encoded = coco_mask.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().view(np.uint8)))
    return [rle | {"counts": rle["counts"].decode()} for rle in encoded]


def encode_runs(places: Tensor, counts: Tensor, image_size: tuple[int, int]) -> list[dict[str, Any]]:
    """The same of what :func:`solq.kernels.paste_runs` gives."""
    if len(counts) == 0:
        return []
    H, W = image_size
    of_mask = np.split(places.cpu().numpy(), counts.cumsum(0).cpu().numpy()[:-1])
    runs = [{"size": [H, W], "counts": np.diff(ends, prepend=0, append=H * W)} for ends in of_mask]
    return [rle | {"counts": rle["counts"].decode()} for rle in coco_mask.frPyObjects(runs, H, W)]


@torch.no_grad()
def postprocess(
    outputs: Mapping[str, Any],
    orig_sizes: Tensor,
    decode_masks: DecodeMasks | None,
    top_k: int = 100,
    score_threshold: float = 0.0,
    decode_runs: DecodeRuns | None = None,
) -> list[Detections]:
    """The `top_k` best of queries × classes of each image by sigmoid score, as in Deformable DETR.

    Args:
        outputs: pred_logits (B, Q, C), pred_boxes (B, Q, 4) as cx cy w h in 0..1 of the image without its padding,
            and what `decode_masks` reads; others are left alone.
        orig_sizes: (B, 2) int, H and W of the images on disk.
        decode_masks: of the model, see :meth:`solq.models.solq.model.SOLQ.decode_masks`; None for no masks.
        top_k: the most detections of an image; a query may be among them with several classes.
        score_threshold: detections of a lower score are dropped before their masks are decoded.
        decode_runs: the same for run lengths, see `SOLQ.decode_runs`; None for no run lengths.
    """
    scores = outputs["pred_logits"].float().sigmoid()
    B, Q, C = scores.shape
    if len(orig_sizes) != B:
        raise ValueError(f"orig_sizes has {len(orig_sizes)} images but the outputs have {B}")
    scores, order = scores.flatten(1).topk(min(top_k, Q * C))
    extents = orig_sizes.to(scores).flip(-1).repeat(1, 2)  # W H W H
    boxes = box_convert(outputs["pred_boxes"].float(), "cxcywh", "xyxy") * extents[:, None]

    detections = []
    for image, (H, W) in enumerate(orig_sizes.tolist()):
        kept = scores[image] >= score_threshold
        query, label = order[image, kept] // C, order[image, kept] % C
        queries, of_detection = query.unique(return_inverse=True)  # each query's mask once
        parts = queries.split(max(1, MASK_PIXELS // (H * W)))  # the masks of a huge image have to fit in memory
        masks = run_lengths = None
        if decode_masks is not None:
            masks = torch.cat([decode_masks(outputs, image, some, boxes[image, some], (H, W)) for some in parts])
            masks = masks[of_detection]
        if decode_runs is not None:
            runs = [decode_runs(outputs, image, some, boxes[image, some], (H, W)) for some in parts]
            encoded = [rle for places, counts in runs for rle in encode_runs(places, counts, (H, W))]
            run_lengths = [encoded[k] for k in of_detection.tolist()]
        found = Detections(boxes[image, query], scores[image, kept], label, masks, run_lengths=run_lengths)
        detections.append(found)
    return detections
