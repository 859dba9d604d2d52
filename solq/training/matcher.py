"""Bipartite matching of queries and targets (DETR, https://arxiv.org/abs/2005.12872, section 3.1)."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from solq.kernels import linear_assignment, matching_cost
from solq.kernels.matching import ClassCostForm


class HungarianMatcher(nn.Module):
    """Assigns each target a query of its image, one to one, at the least total cost.

    Has no parameters, no gradient, and never makes the host wait for a GPU.

    Args:
        cost_class: weight of the class cost.
        cost_bbox: weight of the L1 distance of the boxes.
        cost_giou: weight of the negative generalized IoU of the boxes.
        box_l1: whether boxes are compared by ``"center"`` and sides (DETR) or by their ``"corners"`` (Sparse R-CNN).
        class_cost_form: ``"focal"`` (Deformable DETR) or ``"softmax"`` (DETR's original).
        alpha, gamma: parameters of the focal class cost.

    Attributes:
        non_finite_costs: how many costs were NaN or infinite in all calls so far, a device tensor () int64; 0 in a
            healthy training. Reading its value waits for the device, so do it where losses are logged.
    """

    non_finite_costs: Tensor

    def __init__(
        self,
        cost_class: float = 2.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        *,
        box_l1: Literal["center", "corners"] = "center",
        class_cost_form: ClassCostForm = "focal",
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        if cost_class == cost_bbox == cost_giou == 0:
            raise ValueError("cost_class, cost_bbox and cost_giou are all 0: at least one must not be")
        self.cost_class, self.cost_bbox, self.cost_giou = cost_class, cost_bbox, cost_giou
        self.box_l1 = box_l1
        self.class_cost_form: ClassCostForm = class_cost_form
        self.alpha, self.gamma = alpha, gamma
        self.register_buffer("non_finite_costs", torch.zeros((), dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def match(
        self, logits: Tensor, boxes: Tensor, target_labels: Tensor, target_boxes: Tensor, target_offsets: Tensor
    ) -> Tensor:
        """Match all decoder layers at once, for targets packed in flat tensors.

        Args:
            logits: (L, B, Q, C), L decoder layers.
            boxes: (L, B, Q, 4) as cx cy w h in 0..1.
            target_labels: (T,), target_boxes: (T, 4), target_offsets: (B+1,), as for `solq.kernels.matching_cost`.

        Returns:
            (L, T) int64: the query of each target, -1 where an image has more targets than queries.

        Raises:
            ValueError: as `solq.kernels.matching_cost` does.
        """

        def cost_of(
            boxes: Tensor, target_boxes: Tensor, cost_class: float, cost_bbox: float, cost_giou: float
        ) -> Tensor:
            return matching_cost(
                logits,
                boxes,
                target_labels,
                target_boxes,
                target_offsets,
                cost_class=cost_class,
                cost_bbox=cost_bbox,
                cost_giou=cost_giou,
                alpha=self.alpha,
                gamma=self.gamma,
                class_cost_form=self.class_cost_form,
            )

        if self.box_l1 == "center":
            cost = cost_of(boxes, target_boxes, self.cost_class, self.cost_bbox, self.cost_giou)
        else:
            cost = cost_of(boxes, target_boxes, self.cost_class, 0.0, self.cost_giou)
            corners, target_corners = (box_convert(b, "cxcywh", "xyxy") for b in (boxes, target_boxes))
            cost += cost_of(corners, target_corners, 0.0, self.cost_bbox, 0.0)
        queries, non_finite = linear_assignment(cost, target_offsets, return_non_finite=True)
        if self.non_finite_costs.device != cost.device:  # DETR's matcher needs no moving, so neither does this one
            self.non_finite_costs = self.non_finite_costs.to(cost.device, non_blocking=True)
        self.non_finite_costs += non_finite.sum()
        return queries

    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], targets: Sequence[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """DETR's interface: one decoder layer, a dict per image.

        Args:
            outputs: has ``pred_logits`` (B, Q, C) and ``pred_boxes`` (B, Q, 4) as cx cy w h in 0..1.
            targets: per image, ``labels`` (n,) and ``boxes`` (n, 4).

        Returns:
            Per image (query_index, target_index), both (min(Q, n),) int64 on the device of the outputs, in ascending
            order of the query.

        Raises:
            ValueError: if there are not as many targets as images, or not as many labels as boxes of an image; and as
                `solq.kernels.matching_cost` does.
        """
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        B, Q = logits.shape[:2]
        if len(targets) != B:
            raise ValueError(f"targets has {len(targets)} entries but pred_logits has {B} images")
        for image, target in enumerate(targets):
            if len(target["labels"]) != len(target["boxes"]):
                raise ValueError(
                    f"targets[{image}] has {len(target['labels'])} labels but {len(target['boxes'])} boxes, "
                    "must have as many of both"
                )
        sizes = [len(target["boxes"]) for target in targets]
        offsets = torch.tensor([0, *sizes]).cumsum(0).to(logits.device, non_blocking=True)
        queries = self.match(
            logits[None],
            boxes[None],
            torch.cat([target["labels"] for target in targets]),
            torch.cat([target["boxes"] for target in targets]),
            offsets,
        )[0]
        matches = []
        for size, of_image in zip(sizes, queries.split(sizes), strict=True):
            order = of_image.where(of_image >= 0, Q).argsort()[: min(Q, size)]
            matches.append((of_image[order], order))
        return matches
