"""Losses of a training step: matching for all decoder layers at once, then the model's own losses by name."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from solq.data.batch import PackedTargets
from solq.models.base import InstanceSegmenter, Matches
from solq.models.detection_losses import detection_losses
from solq.training.matcher import HungarianMatcher


class SetCriterion(nn.Module):
    """Match queries with targets in every decoder layer, then compute the losses of the matched pairs.

    Source: DETR, section 3.1. Everything is computed on the device: the host never waits for it.

    Args:
        matcher: assigns one query to each target.
        model: computes the losses; its `config`, `losses` and `loss_weights` are read.

    Attributes:
        weight_dict: the weight of each loss in the total, by name.
    """

    def __init__(self, matcher: HungarianMatcher, model: InstanceSegmenter) -> None:
        super().__init__()
        self.matcher = matcher
        self.model = model
        suffixes = ["", *(f"_{layer}" for layer in range(model.config.num_layers - 1)), "_enc"]
        self.weight_dict = {name + suffix: weight for suffix in suffixes for name, weight in model.loss_weights.items()}

    def forward(
        self,
        outputs: Any,
        targets: PackedTargets | list[dict[str, Tensor]],
        counts: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute all losses, without the weights of :attr:`weight_dict`.

        Args:
            outputs: of the model, see :class:`solq.models.base.Outputs`.
            targets: packed, or a list with one dict per image: ``labels`` (n,), ``boxes`` (n, 4) cx cy w h in 0..1,
                ``masks`` (n, N, N) in the box frame.
            counts: the result of :meth:`count_targets`, if the losses of several batches are to be added up to those
                of one large batch; counted here otherwise.

        Returns:
            Scalars by name: ``loss_ce``, ``loss_bbox``, ``loss_giou`` and the mask losses of the last layer, the same
            with ``_0``, ``_1``, … for the earlier layers, and with ``_enc`` for the proposals of two stages.
        """
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        if isinstance(targets, list):
            targets = PackedTargets.pack(targets).to(logits.device, non_blocking=True)
        if counts is None:
            counts = self.count_targets([targets], logits.shape[2])
        queries = self.matcher.match(logits, boxes, targets.labels, targets.boxes, targets.offsets)
        matches = Matches(queries, targets.image_index(), *counts)
        last = len(logits) - 1
        named = {}
        for name, per_layer in self.model.losses(outputs, matches, targets).items():
            for layer, loss in enumerate(per_layer, start=len(logits) - len(per_layer)):
                named[name if layer == last else f"{name}_{layer}"] = loss
        if "enc_logits" in outputs:
            # Proposals are told apart from background only: every target is of class 0.
            logits, boxes = outputs["enc_logits"][None], outputs["enc_boxes"][None]
            labels = torch.zeros_like(targets.labels)
            queries = self.matcher.match(logits, boxes, labels, targets.boxes, targets.offsets)
            matches = Matches(queries, matches.images, *counts)
            losses = detection_losses(logits, boxes, labels, targets, matches, matches.num_targets)
            named |= {f"{name}_enc": loss[0] for name, loss in losses.items()}
        return named

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the losses."""
        return torch.stack([self.weight_dict[name] * loss for name, loss in losses.items()]).sum()

    @staticmethod
    def count_targets(targets: Sequence[PackedTargets], num_queries: int) -> Tensor:
        """Count the targets of a step (2,) float32: all of them, and those that can be matched.

        The counts are summed over the batches of the step and over all processes, divided by the number of processes,
        and at least 1.
        """
        per_image = torch.cat([t.offsets.diff() for t in targets])
        counts = torch.stack([per_image.sum(), per_image.clamp(max=num_queries).sum()]).float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
            counts /= dist.get_world_size()
        return counts.clamp(min=1)
