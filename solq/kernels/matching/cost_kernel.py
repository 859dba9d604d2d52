"""The Triton kernel of the matching cost: all layers and all pairs of one image in one launch.

Nothing but the result is written to memory, and of the logits only the columns of present labels are read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime import LAUNCH_OPTIONS
from .cost import CostOptions, PackedTargets

BLOCK_QUERIES, NUM_WARPS = 128, 2  # of 300 queries, 384 lanes are busy; two queries per thread


@triton.jit
def _power(base, EXPONENT: tl.constexpr):
    """Raise numbers that are not negative to a constant power."""
    if EXPONENT == 2.0:
        result = base * base
    elif EXPONENT == 0.0:  # 0 · log 0 below would be NaN
        result = tl.full(base.shape, 1.0, tl.float32)
    else:
        result = tl.exp2(EXPONENT * tl.log2(base))
    return result


@triton.jit
def _class_cost(logit, log_normalizer, SOFTMAX: tl.constexpr, ALPHA: tl.constexpr, GAMMA: tl.constexpr):
    """Compute the softmax or the focal class cost from the logit of the target's label."""
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
    """Compute the length of the intersection of two intervals."""
    return tl.maximum(tl.minimum(high_a, high_b) - tl.maximum(low_a, low_b), 0.0)


@triton.jit
def _giou(cx_a, cy_a, w_a, h_a, cx_b, cy_b, w_b, h_b):
    """Compute the generalized IoU of two boxes."""
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
def matching_cost_kernel(
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
    """Compute the cost of one target in one layer for a block of queries."""
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


def launch(logits: Tensor, boxes: Tensor, targets: PackedTargets, options: CostOptions) -> Tensor:
    """Compute the cost (L, T, Q) as :func:`solq.kernels.matching_cost` does."""
    L, B, Q, C = logits.shape
    T = targets.labels.shape[0]
    cost = logits.new_empty((L, T, Q), dtype=torch.float32)
    if cost.numel() == 0:
        return cost
    softmax = options.class_cost_form == "softmax"
    log_normalizer = logits.float().logsumexp(-1) if softmax else cost
    block_queries = min(BLOCK_QUERIES, triton.next_power_of_2(Q))
    with torch.cuda.device_of(cost):
        matching_cost_kernel[(T, triton.cdiv(Q, block_queries), L)](
            logits.contiguous(),
            log_normalizer,
            boxes.contiguous(),
            targets.labels.contiguous(),
            targets.boxes.contiguous(),
            targets.offsets.contiguous(),
            cost,
            B,
            Q,
            C,
            T,
            options.cost_class,
            options.cost_bbox,
            options.cost_giou,
            ALPHA=options.alpha,
            GAMMA=options.gamma,
            SOFTMAX=softmax,
            BLOCK_IMAGES=triton.next_power_of_2(B),
            BLOCK_QUERIES=block_queries,
            num_warps=NUM_WARPS,
            **LAUNCH_OPTIONS,
        )
    return cost
