"""The losses of SOLQ: outputs of every decoder layer and packed targets to scalars."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from solq.data.batch import PackedTargets
from solq.models.solq.mask_coding import MaskCoding
from solq.models.solq.model import Outputs
from solq.models.solq.separate_masks import SeparateMaskHead
from solq.training.matcher import HungarianMatcher

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss (Lin et al., 2017)


class SetCriterion(nn.Module):
    """Hungarian matching of queries and targets, then the losses of the matched pairs, for every decoder layer.

    Source: SOLQ, section 3.2 (equation 5); DETR, section 3.1. Everything is one flow of device tensors: nothing
    waits for the device.

    Args:
        matcher: assigns one query to each target.
        mask_coding: turns target masks into the vectors that are regressed.
        mask_head: of a model with a separate mask branch.
        vector_loss_weight: λ_vec, multiplied into ``loss_vector`` (Table 3b).
        vector_loss_start: first decoder layer with a vector loss (Table 3c; 0 is all layers).
        decoder_layers: how many the outputs have.

    Raises:
        ValueError: if there is no layer `vector_loss_start`.

    Attributes:
        weight_dict: the weight of each loss in the total, by name.
    """

    def __init__(
        self,
        matcher: HungarianMatcher,
        mask_coding: MaskCoding,
        mask_head: SeparateMaskHead | None = None,
        *,
        vector_loss_weight: float = 3.0,
        vector_loss_start: int = 0,
        decoder_layers: int = 6,
    ) -> None:
        super().__init__()
        if not 0 <= vector_loss_start < decoder_layers:
            raise ValueError(f"vector_loss_start is {vector_loss_start}, must be 0 to {decoder_layers - 1}")
        self.matcher = matcher
        self.mask_coding = mask_coding
        self.mask_head = mask_head
        self.vector_loss_weight = vector_loss_weight
        self.vector_loss_start = vector_loss_start
        weights = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0, "loss_vector": 1.0}
        suffixes = ["", *(f"_{layer}" for layer in range(decoder_layers - 1)), "_enc"]
        self.weight_dict = {name + suffix: weight for suffix in suffixes for name, weight in weights.items()}
        self.weight_dict |= {"loss_mask": 1.0, "loss_dice": 1.0}

    def forward(
        self,
        outputs: Outputs,
        targets: PackedTargets | list[dict[str, Tensor]],
        num_boxes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """All losses, not weighted but for ``loss_vector``'s own coefficient.

        Args:
            outputs: of the model, see :meth:`solq.models.solq.model.SOLQ.forward`.
            targets: packed, or a list with one dict per image: ``labels`` (n,), ``boxes`` (n, 4) cx cy w h in 0..1,
                ``masks`` (n, N, N) in the box frame.
            num_boxes: what `count_boxes` returned, if the losses of several batches are to be added up to those of
                one large batch; counted here otherwise.

        Returns:
            Scalars ``loss_ce``, ``loss_bbox``, ``loss_giou``, ``loss_vector`` of the last layer, the same with
            ``_0``, ``_1``, … for the earlier ones, and with ``_enc`` for the proposals of two stages; ``loss_mask``
            and ``loss_dice`` of a separate mask branch.
        """
        if isinstance(targets, list):
            targets = PackedTargets.pack(targets).to(outputs["pred_logits"].device, non_blocking=True)
        if num_boxes is None:
            num_boxes = self.count_boxes([targets], outputs["pred_logits"].shape[1])
        layers = [*outputs["aux_outputs"], outputs]
        logits, boxes = (torch.stack([layer[key] for layer in layers]) for key in ("pred_logits", "pred_boxes"))
        queries = self.matcher.match(logits, boxes, targets.labels, targets.boxes, targets.offsets)
        losses = self._detection_losses(logits, boxes, queries, targets.labels, targets, num_boxes[0])
        if "pred_vectors" in outputs:
            vectors = torch.stack([layer["pred_vectors"] for layer in layers])
            losses["loss_vector"] = self._vector_loss(vectors, queries, targets, num_boxes[1])

        last = len(layers) - 1
        named = {}
        for name, per_layer in losses.items():
            for layer, loss in enumerate(per_layer):
                if name == "loss_vector" and layer < self.vector_loss_start:
                    continue
                named[name if layer == last else f"{name}_{layer}"] = loss
        if "mask_features" in outputs:
            named |= self._mask_losses(outputs["mask_features"], queries[-1], targets, num_boxes[0])
        if "enc_outputs" in outputs:
            # Proposals are told apart from background only: every target is of class 0.
            logits, boxes = (outputs["enc_outputs"][key][None] for key in ("pred_logits", "pred_boxes"))
            labels = torch.zeros_like(targets.labels)
            queries = self.matcher.match(logits, boxes, labels, targets.boxes, targets.offsets)
            losses = self._detection_losses(logits, boxes, queries, labels, targets, num_boxes[0])
            named |= {f"{name}_enc": loss[0] for name, loss in losses.items()}
        return named

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of what `forward` returned."""
        return torch.stack([self.weight_dict[name] * loss for name, loss in losses.items()]).sum()

    def _detection_losses(
        self,
        logits: Tensor,  # (L, B, Q, C)
        boxes: Tensor,  # (L, B, Q, 4)
        queries: Tensor,  # (L, T), -1 where a target got none
        labels: Tensor,  # (T,)
        targets: PackedTargets,
        num_boxes: Tensor,
    ) -> dict[str, Tensor]:
        """Class, L1 and GIoU losses, each (L,)."""
        layer, image_index = _layer_and_image(queries, targets)
        matched = queries >= 0
        query = queries.clamp(min=0)
        # Focal loss: all logits as if they were background, then the matched ones exchanged.
        positive = logits[layer, image_index, query, labels]
        exchange = (_focal_loss(positive, is_object=True) - _focal_loss(positive, is_object=False)) * matched
        loss_ce = _focal_loss(logits, is_object=False).sum((1, 2, 3)) + exchange.sum(1)

        matched_boxes = boxes[layer, image_index, query]
        l1 = (matched_boxes - targets.boxes).abs().sum(-1)
        giou_loss = 1 - _generalized_iou(_corners(matched_boxes), _corners(targets.boxes))
        return {
            "loss_ce": loss_ce / num_boxes,
            "loss_bbox": (l1 * matched).sum(1) / num_boxes,
            "loss_giou": (giou_loss * matched).sum(1) / num_boxes,
        }

    def _vector_loss(self, vectors: Tensor, queries: Tensor, targets: PackedTargets, num_matched: Tensor) -> Tensor:
        """The mean (L,) over matched pairs of the coding's own loss, times λ_vec."""
        target_vectors = self.mask_coding.encode(targets.masks)  # once for all layers
        layer, image_index = _layer_and_image(queries, targets)
        matched_vectors = vectors[layer, image_index, queries.clamp(min=0)]
        loss = self.mask_coding.loss(matched_vectors.flatten(0, 1), target_vectors.repeat(len(vectors), 1))
        loss = loss.view(queries.shape) * (queries >= 0)
        return self.vector_loss_weight * loss.sum(1) / num_matched

    def _mask_losses(
        self, mask_features: dict[str, Tensor], queries: Tensor, targets: PackedTargets, num_boxes: Tensor
    ) -> dict[str, Tensor]:
        """Focal and dice loss of the separate mask branch, which has masks of the last layer only."""
        assert self.mask_head is not None
        _, image_index = _layer_and_image(queries[None], targets)
        logits = self.mask_head.mask_logits(mask_features, image_index, queries.clamp(min=0))
        losses = self.mask_head.loss(logits, targets.masks, targets.boxes, targets.sizes[image_index])
        return {name: (loss * (queries >= 0)).sum() / num_boxes for name, loss in losses.items()}

    @staticmethod
    def count_boxes(targets: Sequence[PackedTargets], num_queries: int) -> Tensor:
        """What the losses of a step are divided by: (2,) float32, all targets, and those that can be matched.

        Summed over the batches of the step and over all processes, divided by the number of processes, at least 1.
        """
        per_image = torch.cat([t.offsets.diff() for t in targets])
        counts = torch.stack([per_image.sum(), per_image.clamp(max=num_queries).sum()]).float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            counts /= dist.get_world_size()
        return counts.clamp(min=1)


def _layer_and_image(queries: Tensor, targets: PackedTargets) -> tuple[Tensor, Tensor]:
    """The first two indices of the matched outputs (L, B, Q, …): (L, 1) and (T,)."""
    L, T = queries.shape
    layer = torch.arange(L, device=queries.device)[:, None]
    return layer, torch.bucketize(torch.arange(T, device=queries.device), targets.offsets[1:], right=True)


def _focal_loss(logits: Tensor, *, is_object: bool) -> Tensor:
    """The focal loss of each logit if its target is 1 (`is_object`) or 0."""
    probability = logits.sigmoid()
    if is_object:
        return ALPHA * (1 - probability) ** GAMMA * F.softplus(-logits)
    return (1 - ALPHA) * probability**GAMMA * F.softplus(logits)


def _corners(boxes: Tensor) -> Tensor:
    return box_convert(boxes.flatten(0, -2), "cxcywh", "xyxy").view(boxes.shape)


def _generalized_iou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """Generalised IoU (…) of pairs of boxes (…, 4) x0 y0 x1 y1 (Rezatofighi et al., 2019).

    torchvision's picks the overlapping pairs by a mask, for which the host has to wait.
    """
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    inner_low, inner_high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    overlap = (inner_high - inner_low).clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
    hull = (high - low).prod(-1)
    return overlap / (union + eps) - (hull - union) / (hull + eps)
