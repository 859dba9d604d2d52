"""Register the matching operators with torch.library.

They run on the CPU too: what they read of the values, offsets above all, no tracer could follow.
"""

import torch
from torch import Tensor

from ..runtime import NAMESPACE, backend_for
from .assignment import solve_with_scipy
from .checks import can_read_values, check_label_values, check_offset_values
from .cost import CostOptions, PackedTargets, matching_cost


@torch.library.custom_op(f"{NAMESPACE}::matching_cost", mutates_args=())
def matching_cost_operator(
    logits: Tensor,
    boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    target_offsets: Tensor,
    cost_class: float,
    cost_bbox: float,
    cost_giou: float,
    alpha: float,
    gamma: float,
    class_cost_form: str,
) -> Tensor:
    if can_read_values(logits):
        check_offset_values(target_offsets, target_labels.shape[0])
        check_label_values(target_labels, logits.shape[-1])
    targets = PackedTargets(target_labels, target_boxes, target_offsets)
    options = CostOptions(cost_class, cost_bbox, cost_giou, alpha, gamma, class_cost_form)  # type: ignore[arg-type]
    if backend_for(logits) == "triton":
        from .cost_kernel import launch

        return launch(logits, boxes, targets, options)
    return matching_cost(logits, boxes, targets, options)


@matching_cost_operator.register_fake
def _(logits, boxes, target_labels, target_boxes, target_offsets, *_) -> Tensor:
    L, _, Q, _ = logits.shape
    return logits.new_empty((L, target_labels.shape[0], Q), dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::linear_assignment", mutates_args=())
def linear_assignment_operator(cost: Tensor, target_offsets: Tensor) -> tuple[Tensor, Tensor]:
    if can_read_values(target_offsets):
        check_offset_values(target_offsets, cost.shape[1])
    if backend_for(cost) == "triton":
        from .assignment_kernel import launch

        return launch(cost, target_offsets)
    return solve_with_scipy(cost, target_offsets)


@linear_assignment_operator.register_fake
def _(cost: Tensor, target_offsets: Tensor) -> tuple[Tensor, Tensor]:
    per_target = cost.shape[:2]
    return cost.new_empty(per_target, dtype=torch.int64), cost.new_empty(per_target, dtype=torch.int64)
