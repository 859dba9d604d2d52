"""Linear assignment on the device: for every layer and image the matching of targets to queries of least total cost.

    minimise Σ_t cost[l, t, assignment[l, t]]  over one-to-one assignments of the targets of an image to its Q queries

by shortest augmenting paths (Jonker and Volgenant 1987, https://doi.org/10.1007/BF02278710, in the form of Crouse
2016, https://doi.org/10.1109/TAES.2016.140952, which SciPy uses too). Targets are the rows and are inserted one by
one: Dijkstra's algorithm on the reduced costs cost − u − v finds the cheapest chain of re-assignments that ends in a
free query. One program solves one (layer, image); the queries lie across its lanes, so that a step of Dijkstra is
one coalesced read of a row and three reductions of 32 bits.

If an image has more targets than queries, some target must stay without one. This is a column that is always free
and costs every target the same: it takes part as soon as all queries are taken, and whoever is assigned to it by the
last step of a path is left out. Nothing has to be transposed.

The arithmetic is float64, as SciPy's: both find the same indices, exact ties apart.

Kernel or SciPy. CPU tensors are solved by SciPy, a GPU's by the kernel, whatever their sizes: to look at the sizes of
images would make the host wait. What this rests on, for 6 layers and 300 queries:
    measured    SciPy on one core (AMD EPYC), without the copies and the wait that a GPU's tensors need: 0.1 ms for one
                image with 7 targets, 24 ms for 16 images with 150; where all targets want the same queries 0.2 and
                454 ms, 0.4 µs a step.
    estimated   a step of the kernel takes about 800 cycles of an H200, 0.5 µs, as its machine code of 200 instructions
                and eight barriers reads: as long as SciPy's, but all layers and images take theirs at the same time.
On a GPU neither is measured yet; `python -m benchmarks.bench_matching` does it and names the cases for SciPy, if any.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from solq.kernels.matching import cost as reference
from solq.kernels.matching.cost_kernel import (
    check_floating,
    check_offset_values,
    check_offsets,
    check_tensors,
    values_are_known,
)
from solq.kernels.runtime import LAUNCH_OPTIONS, backend_for


@triton.jit
def _key_of_smallest(values, key):
    """The least `key` (int32, not negative) among the lanes with the least of `values` (float64, not NaN).

    A warp reduces 32 bits in one instruction but 64 in five rounds of shuffles, so the halves go one after the other.
    """
    LAST: tl.constexpr = 0x7FFFFFFF
    bits = values.to(tl.int64, bitcast=True)
    bits ^= (bits >> 63) & 0x7FFFFFFFFFFFFFFF  # integers in the order of the floats
    high = (bits >> 32).to(tl.int32)
    low = ((bits & 0xFFFFFFFF) - 0x80000000).to(tl.int32)
    smallest = high == tl.min(high)
    smallest &= low == tl.min(tl.where(smallest, low, LAST))
    return tl.min(tl.where(smallest, key, LAST))


@triton.jit
def _load_costs(cost_ptr, index, mask, worst):
    """Costs as float64; `worst` where they are NaN or infinite, 0 where `mask` is not set."""
    cost = tl.load(cost_ptr + index, mask=mask, other=0).to(tl.float64)
    return tl.where(tl.abs(cost) < float("inf"), cost, worst)


@triton.jit(do_not_specialize=["num_targets"])  # it differs from batch to batch
def _linear_assignment_kernel(
    cost_ptr,  # (L, T, Q)
    target_offsets_ptr,  # (B + 1,)
    assignment_ptr,  # (L, T) int64, filled with -1
    non_finite_ptr,  # (L, T) int64
    num_targets,
    num_queries,
    BLOCK: tl.constexpr,  # lanes, more than the queries: lane num_queries stands for "no query"
):
    layer, image = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = tl.maximum(tl.load(target_offsets_ptr + image).to(tl.int32), 0)
    end = tl.minimum(tl.load(target_offsets_ptr + image + 1).to(tl.int32), num_targets)
    num_rows = end - start
    first_row = layer * num_targets + start
    cost_ptr += first_row * num_queries
    assignment_ptr += first_row
    non_finite_ptr += first_row
    INFINITY: tl.constexpr = float("inf")
    lane = tl.arange(0, BLOCK)
    is_query = lane < num_queries

    # A NaN or infinite cost is replaced by one so large that as few as possible of them are used.
    bound = tl.full([], 0, tl.float64)
    for first in range(0, num_rows, 2):
        rows = first + tl.arange(0, 2)
        is_row = rows < num_rows
        mask = is_row[:, None] & is_query
        size = tl.abs(tl.load(cost_ptr + rows[:, None] * num_queries + lane, mask=mask, other=0))
        finite = size < INFINITY
        tl.store(non_finite_ptr + rows, tl.sum(tl.where(finite, 0.0, 1.0), axis=1), mask=is_row)
        bound = tl.maximum(bound, tl.max(tl.where(finite, size, 0)).to(tl.float64))
    worst = tl.where(bound > 0, 2 * (num_rows + 1) * bound, 1)

    # Lane q holds all that is known of query q: the row it is assigned to (or -1) and its dual variable v. The dual
    # variable of an assigned row is its cost − v at its query.
    row_of = tl.full([BLOCK], -1, tl.int32)
    v = tl.zeros([BLOCK], tl.float64)
    cost_of_none = tl.full([], INFINITY, tl.float64)  # of leaving a row without a query

    # A step of Dijkstra has one number for a query and its row; the one from a new row has no query, hence lane BLOCK.
    STEP: tl.constexpr = 2 * BLOCK

    for new_row in range(num_rows):
        if new_row == num_queries:  # no query is free any more; any constant that keeps cost − u − v ≥ 0 will do
            u = _load_costs(cost_ptr, row_of * num_queries + lane, is_query, worst) - v
            cost_of_none = tl.max(tl.where(is_query, u, -INFINITY))

        # Dijkstra from the new row to the nearest query not yet `closed`, until that is a free one. The distance of
        # a query is reached − v; through the row of a query, others are reached at `offset` + its costs.
        reached = tl.full([BLOCK], INFINITY, tl.float64)
        previous = tl.zeros([BLOCK], tl.int32)  # the step by which it was reached
        closed = lane > num_queries
        offset = tl.zeros([BLOCK], tl.float64)
        step = (new_row + 1) * STEP + BLOCK
        row = new_row
        query = tl.full([], BLOCK, tl.int32)
        while row >= 0:
            cost = _load_costs(cost_ptr, row * num_queries + lane, is_query, worst)
            through_row = offset + tl.where(is_query, cost, cost_of_none)
            closer = (through_row < reached) & (closed == 0)
            reached = tl.where(closer, through_row, reached)
            previous = tl.where(closer, step, previous)
            # Of equally near queries a free one (row -1) comes first.
            step = _key_of_smallest(tl.where(closed, INFINITY, reached - v), (row_of + 1) * STEP + lane)
            query = step % STEP
            row = step // STEP - 1
            closed = closed | (lane == query)
            own_cost = _load_costs(cost_ptr, row * num_queries + query, row >= 0, worst)
            offset = tl.gather(reached, tl.broadcast_to(query, [BLOCK]), 0) - own_cost

        distance = tl.gather(reached - v, tl.broadcast_to(query, [BLOCK]), 0)
        v = tl.where(closed & (lane <= num_queries), reached - distance, v)

        # Along the path, back from the free query: each query takes over the row of the one before it.
        while query < BLOCK:
            step = tl.sum(tl.where(lane == query, previous, 0))
            row_of = tl.where(lane == query, step // STEP - 1, row_of)
            query = step % STEP
        row_of = tl.where(is_query, row_of, -1)

    tl.store(assignment_ptr + row_of, lane.to(tl.int64), mask=row_of >= 0)


def _launch(num_queries: int) -> tuple[int, int]:
    """Lanes and warps: four lanes per thread, so that all that is known of them fits the registers."""
    block = max(triton.next_power_of_2(num_queries + 1), 128)
    return block, min(block // 128, 16)


def _solve_on_device(cost: Tensor, target_offsets: Tensor) -> tuple[Tensor, Tensor]:
    L, T, Q = cost.shape
    B = len(target_offsets) - 1
    assignment = cost.new_full((L, T), -1, dtype=torch.int64)
    non_finite = cost.new_zeros((L, T), dtype=torch.int64)
    if cost.dtype == torch.float64:
        cost = cost.where(cost.abs() < reference.LARGEST_COST, torch.inf)
    if cost.numel() > 0:
        block, num_warps = _launch(Q)
        with torch.cuda.device_of(cost):
            _linear_assignment_kernel[(L, B)](
                cost.contiguous(),
                target_offsets.contiguous(),
                assignment,
                non_finite,
                T,
                Q,
                BLOCK=block,
                num_warps=num_warps,
                **LAUNCH_OPTIONS,
            )
    return assignment, non_finite


def _solve_on_host(cost: Tensor, target_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """SciPy. For a GPU's tensors: all layers in one copy to the host and one wait, then a thread per layer."""
    if not cost.is_cuda:  # threads would only take the cores from each other: PyTorch's wait by spinning
        return reference.linear_assignment(cost, target_offsets, return_non_finite=True)
    host_cost = cost.to("cpu", non_blocking=True)  # pinned memory
    host_offsets = target_offsets.to("cpu", non_blocking=True)
    torch.cuda.current_stream(cost.device).synchronize()

    def solve(layer_cost: Tensor) -> tuple[Tensor, Tensor]:
        return reference.linear_assignment(layer_cost[None], host_offsets, return_non_finite=True)

    with ThreadPoolExecutor() as threads:
        assignment, non_finite = zip(*threads.map(solve, host_cost), strict=True)
    return (
        torch.cat(assignment).to(cost.device, non_blocking=True),
        torch.cat(non_finite).to(cost.device, non_blocking=True),
    )


@torch.library.custom_op("solq::linear_assignment", mutates_args=())
def _linear_assignment(cost: Tensor, target_offsets: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    if values_are_known(target_offsets):
        check_offset_values(target_offsets, cost.shape[1])
    solve = _solve_on_device if backend == "triton" else _solve_on_host
    return solve(cost, target_offsets)


@_linear_assignment.register_fake
def _(cost: Tensor, target_offsets: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    per_target = cost.shape[:2]
    return cost.new_empty(per_target, dtype=torch.int64), cost.new_empty(per_target, dtype=torch.int64)


@overload
def linear_assignment(cost: Tensor, target_offsets: Tensor, *, return_non_finite: Literal[False] = False) -> Tensor: ...


@overload
def linear_assignment(
    cost: Tensor, target_offsets: Tensor, *, return_non_finite: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def linear_assignment(
    cost: Tensor, target_offsets: Tensor, *, return_non_finite: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """The query of each target at the least total cost per layer and image.

    A NaN or infinite cost counts as worse than every finite one: as few of them as possible are used. On a GPU the
    host does not wait, neither for the result nor for the number of such costs.

    On a GPU the kernel solves; ``use_backend("reference")`` makes it SciPy, with one copy of all layers to the host.
    Why the kernel is the choice for every size is said at the top of this file.

    Args:
        cost: (L, T, Q), float16, bfloat16, float32 or float64. Of float64, 1e290 and more counts as infinite.
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
    assignment, non_finite = _linear_assignment(cost.detach(), target_offsets, backend_for(cost))
    return (assignment, non_finite) if return_non_finite else assignment


def compile_cases() -> Iterator[tuple[Any, ...]]:
    """For benchmarks/compile_report.py."""
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
        block, num_warps = _launch(queries)
        label = f"linear_assignment up to {queries} queries"
        yield label, _linear_assignment_kernel, signature, {"BLOCK": block}, pointers, num_warps, 3, {}
