"""Bipartite matching of queries and targets: the cost of every pair of one image, and the cheapest assignment.

DETR (https://arxiv.org/abs/2005.12872, section 3.1) computes the cost of all B·Q × T pairs of a batch, copies it to the
host once per decoder layer and solves each image there. Here all layers are one launch each, only pairs of the same
image exist, and the host does not wait. Targets of a batch are packed one image after another: row t of the cost
belongs to target t, so that the block of an image is contiguous.

The formulas and their definitions in plain PyTorch and SciPy stand in cost.py and assignment.py, the Triton kernels in
cost_kernel.py and assignment_kernel.py; operators.py registers the operators.
"""

from typing import Literal, overload

from torch import Tensor

from .checks import check_cost_arguments, check_floating, check_offsets, check_tensors
from .cost import ClassCostForm, PackedTargets
from .operators import linear_assignment_operator, matching_cost_operator

__all__ = ["ClassCostForm", "linear_assignment", "matching_cost"]


def matching_cost(
    logits: Tensor,
    boxes: Tensor,
    target_labels: Tensor,
    target_boxes: Tensor,
    target_offsets: Tensor,
    *,
    cost_class: float = 2.0,
    cost_bbox: float = 5.0,
    cost_giou: float = 2.0,
    alpha: float = 0.25,
    gamma: float = 2.0,
    class_cost_form: ClassCostForm = "focal",
) -> Tensor:
    """Compute the cost of each query of a target's own image, for every decoder layer. Has no gradient.

    Args:
        logits: (L, B, Q, C), float16, bfloat16, float32 or float64, L decoder layers.
        boxes: (L, B, Q, 4) as cx cy w h in 0..1 of the image, of any of these dtypes, as target_boxes.
        target_labels: (T,) int64 or int32, the targets of the images one after another.
        target_boxes: (T, 4) as cx cy w h in 0..1.
        target_offsets: (B+1,) int64 or int32; image b has the targets target_offsets[b] … target_offsets[b+1] − 1.
        cost_class, cost_bbox, cost_giou: weights of the three terms.
        alpha, gamma: parameters of the focal class cost.
        class_cost_form: ``"focal"`` (Deformable DETR, appendix A.2) or ``"softmax"`` (DETR, section 3.1).

    Returns:
        (L, T, Q) float32. NaN and infinite predictions have NaN or infinite costs.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes or devices do not fit; if labels are outside the classes or offsets do not go
            from 0 to T without decreasing. On a GPU the last two are seen only with the environment variable
            SOLQ_DEBUG=1, which makes the host wait.
    """
    check_cost_arguments(logits, boxes, PackedTargets(target_labels, target_boxes, target_offsets), class_cost_form)
    return matching_cost_operator(
        logits.detach(),
        boxes.detach(),
        target_labels,
        target_boxes.detach(),
        target_offsets,
        cost_class,
        cost_bbox,
        cost_giou,
        alpha,
        gamma,
        class_cost_form,
    )


@overload
def linear_assignment(cost: Tensor, target_offsets: Tensor, *, return_non_finite: Literal[False] = False) -> Tensor: ...


@overload
def linear_assignment(
    cost: Tensor, target_offsets: Tensor, *, return_non_finite: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def linear_assignment(
    cost: Tensor, target_offsets: Tensor, *, return_non_finite: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Assign each target a query of its image, one to one, at the least total cost per layer and image.

    A NaN or infinite cost counts as worse than every finite one: as few of them as possible are used. On a GPU the
    host does not wait, neither for the result nor for the number of such costs.

    CPU tensors are solved by SciPy, a GPU's by the kernel; ``use_backend("reference")`` makes it SciPy there too, with
    a copy to the host. Why the kernel is the choice for every size is said at the top of assignment_kernel.py.

    Args:
        cost: (L, T, Q), float16, bfloat16, float32 or float64. A float64 of 1e290 or more counts as infinite.
        target_offsets: (B+1,) int64 or int32; image b has the targets target_offsets[b] … target_offsets[b+1] − 1.
        return_non_finite: whether to return the number of NaN and infinite costs of each target too.

    Returns:
        (L, T) int64, -1 for a target left without a query because its image has more targets than queries.
        With `return_non_finite` also (L, T) int64.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes or devices do not fit; if offsets do not go from 0 to T without decreasing (on a
            GPU this is seen only with the environment variable SOLQ_DEBUG=1, which makes the host wait).
    """
    check_tensors(cost=cost, target_offsets=target_offsets)
    if cost.ndim != 3:
        raise ValueError(f"cost has shape {tuple(cost.shape)}, must be (L, T, Q)")
    check_floating("cost", cost)
    check_offsets(target_offsets, cost.shape[1])
    assignment, non_finite = linear_assignment_operator(cost.detach(), target_offsets)
    return (assignment, non_finite) if return_non_finite else assignment
