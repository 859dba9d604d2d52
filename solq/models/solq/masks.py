"""Masks as vectors: the unified query representation of SOLQ (section 3.1)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from solq.data.batch import PackedTargets
from solq.models.base import MaskBranch, Matches, Selection
from solq.models.solq.mask_coding import MaskCoding
from solq.models.solq.transformer import MLP, TransformerOutput


class VectorMasks(MaskBranch):
    """Predict a mask as a vector, which a mask coding turns into pixels.

    Args:
        width: C of the transformer.
        hidden: width of the hidden layers of the head.
        coding: between masks and vectors.
        loss_weight: λ_vec, multiplied into the vector loss (Table 3b).
        loss_start: first decoder layer with a vector loss (Table 3c).
    """

    title = "UQR"

    def __init__(self, width: int, hidden: int, coding: MaskCoding, loss_weight: float, loss_start: int) -> None:
        super().__init__()
        self.coding = coding
        self.loss_weight, self.loss_start = loss_weight, loss_start
        self.vector_embed = MLP(width, hidden, coding.num_coefficients, 3)  # one head for all decoder layers

    def forward(
        self, decoded: TransformerOutput, backbone_maps: Sequence[Tensor], padding_mask: Tensor
    ) -> dict[str, Tensor]:
        """Predict ``pred_vectors`` (L, B, Q, n) float32 from the decoder's output."""
        return {"pred_vectors": torch.stack([self.vector_embed(hidden).float() for hidden in decoded.hidden_states])}

    def losses(self, outputs: Any, matches: Matches, targets: PackedTargets) -> dict[str, Tensor]:
        """Compute ``loss_vector``: λ_vec times the mean of the coding's own loss over matched pairs (equation 5)."""
        target_vectors = self.coding.encode(targets.masks)  # once for all layers
        vectors = matches.select(outputs["pred_vectors"])
        loss = self.coding.loss(vectors.flatten(0, 1), target_vectors.repeat(len(vectors), 1))
        loss = loss.view(matches.queries.shape) * (matches.queries >= 0)
        return {"loss_vector": (self.loss_weight * loss.sum(1) / matches.num_matched)[self.loss_start :]}

    def masks(
        self, outputs: Any, image: int, queries: Tensor, labels: Tensor, boxes: Tensor, image_size: tuple[int, int]
    ) -> Tensor:
        return self.coding.decode_paste(outputs["pred_vectors"][-1, image, queries], boxes, image_size)

    def runs(
        self, outputs: Any, image: int, queries: Tensor, labels: Tensor, boxes: Tensor, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        return self.coding.decode_runs(outputs["pred_vectors"][-1, image, queries], boxes, image_size)

    def export(self, outputs: Any, selection: Selection) -> dict[str, Tensor]:
        vectors = outputs["pred_vectors"][-1]
        vectors = vectors.gather(1, selection.queries[:, :, None].expand(-1, -1, vectors.shape[2]))
        masks = self.coding.binarize(self.coding.decode(vectors.flatten(0, 1)))
        return {"masks": masks.unflatten(0, selection.queries.shape)}

    def describe_export(self, top_k: int) -> dict[str, str]:
        N = self.coding.size
        return {"masks": f"(B, {top_k}, {N}, {N}) bool, each stretched over its box: paste it there"}
