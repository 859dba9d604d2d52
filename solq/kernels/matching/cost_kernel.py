"""The cost of every pair of a query and a target of the same image, for all decoder layers in one launch.

    cost[l, t, q] = cost_class · class(logits[l, b, q], label_t) + cost_bbox · ‖box_lbq − box_t‖₁
                    − cost_giou · GIoU(box_lbq, box_t),             b the image of target t

The class cost is one of
    focal    α (1 − p)^γ · −log(p + 1e-8) − (1 − α) p^γ · −log(1 − p + 1e-8),  p = sigmoid(logit of the label)
    softmax  −softmax(logits)[label]
after Deformable DETR (https://arxiv.org/abs/2010.04159, appendix A.2) and DETR (https://arxiv.org/abs/2005.12872,
section 3.1). DETR's formulation computes all B·Q × T pairs of a batch, although only those of one image are read.
Here nothing is computed for the others, nothing but the result is written to memory, and of the logits only the
columns of present labels are read. Row t of the result belongs to target t, so the block of an image is contiguous.

Degenerate boxes have finite costs: a negative width or height counts as zero in the GIoU, and its 0/0 is 0.
"""

import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from solq.kernels.matching import cost as reference
from solq.kernels.runtime import LAUNCH_OPTIONS, backend_for

ClassCost = Literal["focal", "softmax"]

# Labels and offsets on a GPU are only known to the GPU: looking at them makes the host wait, hence a debug flag.
CHECK_ON_DEVICE = os.environ.get("SOLQ_DEBUG", "0") == "1"

BLOCK_QUERIES, NUM_WARPS = 128, 2  # of 300 queries, 384 lanes are busy; two queries per thread


@triton.jit
def _power(base, EXPONENT: tl.constexpr):
    if EXPONENT == 2.0:
        result = base * base
    elif EXPONENT == 0.0:  # 0 · log 0 below would be NaN
        result = tl.full(base.shape, 1.0, tl.float32)
    else:
        result = tl.exp2(EXPONENT * tl.log2(base))
    return result


@triton.jit
def _class_cost(logit, log_normalizer, SOFTMAX: tl.constexpr, ALPHA: tl.constexpr, GAMMA: tl.constexpr):
    if SOFTMAX:
        cost = -tl.exp(logit - log_normalizer)
    else:
        present = 1 / (1 + tl.exp(-logit))
        absent = 1 / (1 + tl.exp(logit))  # not 1 − present, which rounds to 0 from a logit of 17 on
        positive = ALPHA * _power(absent, GAMMA) * -tl.log(present + 1e-8)
        negative = (1 - ALPHA) * _power(present, GAMMA) * -tl.log(absent + 1e-8)
        cost = positive - negative
    return cost


@triton.jit
def _overlap(low_a, high_a, low_b, high_b):
    return tl.maximum(tl.minimum(high_a, high_b) - tl.maximum(low_a, low_b), 0.0)


@triton.jit
def _giou(cx_a, cy_a, w_a, h_a, cx_b, cy_b, w_b, h_b):
    SMALLEST: tl.constexpr = 1.1754944e-38  # makes 0/0 a 0
    half_w_a, half_h_a = tl.maximum(w_a, 0.0) / 2, tl.maximum(h_a, 0.0) / 2
    half_w_b, half_h_b = tl.maximum(w_b, 0.0) / 2, tl.maximum(h_b, 0.0) / 2
    x0_a, y0_a, x1_a, y1_a = cx_a - half_w_a, cy_a - half_h_a, cx_a + half_w_a, cy_a + half_h_a
    x0_b, y0_b, x1_b, y1_b = cx_b - half_w_b, cy_b - half_h_b, cx_b + half_w_b, cy_b + half_h_b
    intersection = _overlap(x0_a, x1_a, x0_b, x1_b) * _overlap(y0_a, y1_a, y0_b, y1_b)
    # Areas from the rounded corners: no box is then larger than the hull, not even by a rounding.
    union = (x1_a - x0_a) * (y1_a - y0_a) + (x1_b - x0_b) * (y1_b - y0_b) - intersection
    hull = (tl.maximum(x1_a, x1_b) - tl.minimum(x0_a, x0_b)) * (tl.maximum(y1_a, y1_b) - tl.minimum(y0_a, y0_b))
    return intersection / tl.maximum(union, SMALLEST) - (hull - union) / tl.maximum(hull, SMALLEST)


@triton.jit(do_not_specialize=["num_images", "num_targets"])  # they differ from batch to batch
def _matching_cost_kernel(
    logits_ptr,  # (L, B, Q, C)
    log_normalizer_ptr,  # (L, B, Q), read by the softmax cost only
    boxes_ptr,  # (L, B, Q, 4)
    target_labels_ptr,  # (T,)
    target_boxes_ptr,  # (T, 4)
    target_offsets_ptr,  # (B + 1,)
    cost_ptr,  # (L, T, Q)
    num_images,
    num_queries,
    num_classes,
    num_targets,
    cost_class,
    cost_bbox,
    cost_giou,
    ALPHA: tl.constexpr,
    GAMMA: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BLOCK_IMAGES: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
):
    target = tl.program_id(0)
    queries = tl.program_id(1) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    layer = tl.program_id(2).to(tl.int64)
    mask = queries < num_queries

    # The image of a target is the number of images that end at or before it.
    images = tl.arange(0, BLOCK_IMAGES)
    ends = tl.load(target_offsets_ptr + 1 + images, mask=images < num_images, other=num_targets + 1)
    image = tl.minimum(tl.sum((ends <= target).to(tl.int32)), num_images - 1)

    label = tl.load(target_labels_ptr + target)
    target_box_ptr = target_boxes_ptr + target * 4
    target_cx = tl.load(target_box_ptr).to(tl.float32)
    target_cy = tl.load(target_box_ptr + 1).to(tl.float32)
    target_w = tl.load(target_box_ptr + 2).to(tl.float32)
    target_h = tl.load(target_box_ptr + 3).to(tl.float32)

    predictions = (layer * num_images + image) * num_queries + queries
    cx = tl.load(boxes_ptr + predictions * 4, mask=mask, other=0).to(tl.float32)
    cy = tl.load(boxes_ptr + predictions * 4 + 1, mask=mask, other=0).to(tl.float32)
    w = tl.load(boxes_ptr + predictions * 4 + 2, mask=mask, other=0).to(tl.float32)
    h = tl.load(boxes_ptr + predictions * 4 + 3, mask=mask, other=0).to(tl.float32)
    # A label outside the classes is an error of the caller that only the device can see: its costs are NaN.
    column = tl.minimum(tl.maximum(label, 0), num_classes - 1)
    logit = tl.load(logits_ptr + predictions * num_classes + column, mask=mask, other=0).to(tl.float32)
    logit = tl.where(label == column, logit, float("nan"))
    log_normalizer = logit
    if SOFTMAX:
        log_normalizer = tl.load(log_normalizer_ptr + predictions, mask=mask, other=0)

    l1 = tl.abs(cx - target_cx) + tl.abs(cy - target_cy) + tl.abs(w - target_w) + tl.abs(h - target_h)
    giou = _giou(cx, cy, w, h, target_cx, target_cy, target_w, target_h)
    cost = cost_class * _class_cost(logit, log_normalizer, SOFTMAX, ALPHA, GAMMA) + cost_bbox * l1 - cost_giou * giou
    tl.store(cost_ptr + (layer * num_targets + target) * num_queries + queries, cost, mask=mask)


def values_are_known(tensor: Tensor) -> bool:
    """Whether the host may look at the values of `tensor`: on a GPU only with SOLQ_DEBUG=1."""
    return tensor.device.type == "cpu" or CHECK_ON_DEVICE


def check_tensors(**tensors: Tensor) -> None:
    """Raise unless all are tensors on the device of the first."""
    first = next(iter(tensors))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, must be a tensor")
        if tensor.device != tensors[first].device:
            raise ValueError(
                f"{name} is on {tensor.device} but {first} on {tensors[first].device}: move them to one device"
            )


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` has a dtype that the kernels compute with."""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{name} is {tensor.dtype}, must be float16, bfloat16, float32 or float64")


def check_offsets(target_offsets: Tensor, num_targets: int) -> None:
    """Raise unless `target_offsets` can be (B+1,) integers of so many targets, as far as the host can know."""
    if (
        target_offsets.ndim != 1
        or target_offsets.shape[0] == 0
        or target_offsets.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"target_offsets is {target_offsets.dtype} of shape {tuple(target_offsets.shape)}, "
            "must be int64 or int32 of shape (B+1,)"
        )
    if target_offsets.shape[0] == 1 and num_targets > 0:
        raise ValueError(f"target_offsets has 1 entry, that is no image, but there are {num_targets} targets")


def check_offset_values(target_offsets: Tensor, num_targets: int) -> None:
    """Raise unless `target_offsets` start at 0, never decrease and end at `num_targets`. Makes the host wait."""
    offsets = target_offsets.tolist()
    if offsets[0] != 0 or offsets[-1] != num_targets:
        raise ValueError(
            f"target_offsets goes from {offsets[0]} to {offsets[-1]}, must go from 0 to the {num_targets} targets"
        )
    for start, end in pairwise(offsets):
        if end < start:
            raise ValueError(f"target_offsets must not decrease, but has {end} after {start}")


@torch.library.custom_op("solq::matching_cost", mutates_args=())
def _matching_cost(
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
    class_cost: str,
    backend: str,
) -> Tensor:
    L, B, Q, C = logits.shape
    T = target_labels.shape[0]
    if values_are_known(logits):
        check_offset_values(target_offsets, T)
        unknown = target_labels[(target_labels < 0) | (target_labels >= C)]
        if len(unknown):
            raise ValueError(f"target_labels has {unknown[0].item()}, must be in 0..{C - 1} as logits has {C} classes")
    if backend == "reference":
        return reference.matching_cost(
            logits,
            boxes,
            target_labels,
            target_boxes,
            target_offsets,
            cost_class=cost_class,
            cost_bbox=cost_bbox,
            cost_giou=cost_giou,
            alpha=alpha,
            gamma=gamma,
            class_cost=class_cost,  # type: ignore[arg-type]  # a schema knows no Literal
        )
    cost = logits.new_empty((L, T, Q), dtype=torch.float32)
    if cost.numel() == 0:
        return cost
    softmax = class_cost == "softmax"
    log_normalizer = logits.float().logsumexp(-1) if softmax else cost
    block_queries = min(BLOCK_QUERIES, triton.next_power_of_2(Q))
    with torch.cuda.device_of(cost):
        _matching_cost_kernel[(T, triton.cdiv(Q, block_queries), L)](
            logits.contiguous(),
            log_normalizer,
            boxes.contiguous(),
            target_labels.contiguous(),
            target_boxes.contiguous(),
            target_offsets.contiguous(),
            cost,
            B,
            Q,
            C,
            T,
            cost_class,
            cost_bbox,
            cost_giou,
            ALPHA=alpha,
            GAMMA=gamma,
            SOFTMAX=softmax,
            BLOCK_IMAGES=triton.next_power_of_2(B),
            BLOCK_QUERIES=block_queries,
            num_warps=NUM_WARPS,
            **LAUNCH_OPTIONS,
        )
    return cost


@_matching_cost.register_fake
def _(logits, boxes, target_labels, target_boxes, target_offsets, *_) -> Tensor:
    L, _, Q, _ = logits.shape
    return logits.new_empty((L, target_labels.shape[0], Q), dtype=torch.float32)


def _check(
    logits: Tensor, boxes: Tensor, target_labels: Tensor, target_boxes: Tensor, target_offsets: Tensor, class_cost: str
) -> None:
    if class_cost not in ("focal", "softmax"):
        raise ValueError(f"class_cost is {class_cost!r}, must be 'focal' or 'softmax'")
    check_tensors(
        logits=logits,
        boxes=boxes,
        target_labels=target_labels,
        target_boxes=target_boxes,
        target_offsets=target_offsets,
    )
    if logits.ndim != 4:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, must be (L, B, Q, C)")
    L, B, Q, C = logits.shape
    if boxes.shape != (L, B, Q, 4):
        raise ValueError(f"boxes has shape {tuple(boxes.shape)}, must be {(L, B, Q, 4)} as logits is {(L, B, Q, C)}")
    if target_labels.ndim != 1:
        raise ValueError(f"target_labels has shape {tuple(target_labels.shape)}, must be (T,)")
    T = target_labels.shape[0]
    if target_boxes.shape != (T, 4):
        raise ValueError(
            f"target_boxes has shape {tuple(target_boxes.shape)}, must be {(T, 4)} as there are {T} target_labels"
        )
    for name, tensor in (("logits", logits), ("boxes", boxes), ("target_boxes", target_boxes)):
        check_floating(name, tensor)
    if target_labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"target_labels is {target_labels.dtype}, must be int64 or int32")
    if target_offsets.ndim == 1 and target_offsets.shape[0] != B + 1:
        raise ValueError(f"target_offsets has {target_offsets.shape[0]} entries, must have {B + 1} for {B} images")
    check_offsets(target_offsets, T)


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
    class_cost: ClassCost = "focal",
) -> Tensor:
    """The cost of each query of a target's own image, for every decoder layer. Has no gradient.

    Args:
        logits: (L, B, Q, C), float16, bfloat16, float32 or float64, L decoder layers.
        boxes: (L, B, Q, 4) as cx cy w h in 0..1 of the image, of any of these dtypes, as target_boxes.
        target_labels: (T,) int64 or int32, the targets of the images one after another.
        target_boxes: (T, 4) as cx cy w h in 0..1.
        target_offsets: (B+1,) int64 or int32; image b has the targets target_offsets[b] … target_offsets[b+1] − 1.
        cost_class, cost_bbox, cost_giou: weights of the three terms.
        alpha, gamma: of the focal-style class cost.
        class_cost: ``"focal"`` (Deformable DETR, appendix A.2) or ``"softmax"`` (DETR, section 3.1).

    Returns:
        (L, T, Q) float32. NaN and infinite predictions have NaN or infinite costs.

    Raises:
        TypeError: if an argument is not a tensor.
        ValueError: if shapes, dtypes or devices do not fit; if labels are outside the classes or offsets do not go
            from 0 to T without decreasing. On a GPU the last two are seen only with the environment variable
            SOLQ_DEBUG=1, which makes the host wait.
    """
    _check(logits, boxes, target_labels, target_boxes, target_offsets, class_cost)
    return _matching_cost(
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
        class_cost,
        backend_for(logits),
    )


def compile_cases() -> Iterator[tuple[Any, ...]]:
    """For benchmarks/compile_report.py."""
    for class_cost, dtype, gamma in (
        ("focal", "fp32", 2.0),
        ("focal", "bf16", 2.0),
        ("focal", "fp16", 1.5),
        ("softmax", "fp32", 2.0),
        ("softmax", "bf16", 2.0),
    ):
        signature = {
            "logits_ptr": f"*{dtype}",
            "log_normalizer_ptr": "*fp32",
            "boxes_ptr": f"*{dtype}",
            "target_labels_ptr": "*i64",
            "target_boxes_ptr": "*fp32",
            "target_offsets_ptr": "*i64",
            "cost_ptr": "*fp32",
            **dict.fromkeys(("num_images", "num_queries", "num_classes", "num_targets"), "i32"),
            **dict.fromkeys(("cost_class", "cost_bbox", "cost_giou"), "fp32"),
        }
        constexprs = {
            "ALPHA": 0.25,
            "GAMMA": gamma,
            "SOFTMAX": class_cost == "softmax",
            "BLOCK_IMAGES": 16,
            "BLOCK_QUERIES": BLOCK_QUERIES,
        }
        pointers = [name for name in signature if name.endswith("_ptr")]
        label = f"matching_cost {class_cost} γ={gamma:g} {dtype}"
        yield label, _matching_cost_kernel, signature, constexprs, pointers, NUM_WARPS, 3, {"occupancy": 0.5}
