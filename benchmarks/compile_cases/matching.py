"""The kernels of matching, for benchmarks/compile_report.py."""

from collections.abc import Iterator
from typing import Any

from solq.kernels.matching.assignment_kernel import choose_lanes, linear_assignment_kernel
from solq.kernels.matching.cost_kernel import BLOCK_QUERIES, NUM_WARPS, matching_cost_kernel


def compile_cases() -> Iterator[tuple[Any, ...]]:
    """Yield every kernel and configuration that a launch can choose, see benchmarks/compile_report.py."""
    yield from _cost_cases()
    yield from _assignment_cases()


def _cost_cases() -> Iterator[tuple[Any, ...]]:
    for form, dtype, gamma in (
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
            "SOFTMAX": form == "softmax",
            "BLOCK_IMAGES": 16,
            "BLOCK_QUERIES": BLOCK_QUERIES,
        }
        pointers = [name for name in signature if name.endswith("_ptr")]
        label = f"matching_cost {form} γ={gamma:g} {dtype}"
        yield label, matching_cost_kernel, signature, constexprs, pointers, NUM_WARPS, 3, {"occupancy": 0.5}


def _assignment_cases() -> Iterator[tuple[Any, ...]]:
    signature = {
        "cost_ptr": "*fp32",
        "target_offsets_ptr": "*i64",
        "assignment_ptr": "*i64",
        "non_finite_ptr": "*i64",
        "num_targets": "i32",
        "num_queries": "i32",
    }
    pointers = [name for name in signature if name.endswith("_ptr")]
    for queries in (127, 511, 1023, 2047):
        block, num_warps = choose_lanes(queries)
        label = f"linear_assignment up to {queries} queries"
        yield label, linear_assignment_kernel, signature, {"BLOCK": block}, pointers, num_warps, 3, {}
