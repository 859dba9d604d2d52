"""The Triton kernel of linear assignment: the cheapest matching of targets to queries, one program per layer and image.

It finds shortest augmenting paths (Jonker and Volgenant 1987, https://doi.org/10.1007/BF02278710, in the form of Crouse
2016, https://doi.org/10.1109/TAES.2016.140952, which SciPy uses too). Targets are the rows and are inserted one by
one: Dijkstra's algorithm on the reduced costs cost − u − v finds the cheapest chain of re-assignments that ends in a
free query. The queries lie across the lanes of a program, so that a step of Dijkstra is one coalesced read of a row
and three reductions of 32 bits.

If an image has more targets than queries, some target must stay without one. This is a column that is always free
and costs every target the same: it takes part as soon as all queries are taken, and whoever is assigned to it by the
last step of a path is left out. Nothing has to be transposed.

The arithmetic is float64, as SciPy's: both find the same indices, exact ties apart.

Kernel or SciPy. CPU tensors are solved by SciPy, a GPU's by the kernel, whatever their sizes: the host would have to
wait to look at the sizes of images. The choice rests on these times, for 6 layers and 300 queries:
    measured    SciPy on one core (AMD EPYC), without the copies and the wait that a GPU's tensors need: 0.1 ms for one
                image with 7 targets, 24 ms for 16 images with 150; where all targets want the same queries 0.2 and
                454 ms, 0.4 µs a step.
    estimated   a step of the kernel takes about 800 cycles of an H200, 0.5 µs, as its machine code of 200 instructions
                and eight barriers reads: as long as SciPy's, but all layers and images take theirs at the same time.
The kernel is not measured on a GPU yet; `python -m benchmarks.bench_matching` does it, and names the cases for SciPy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..runtime import LAUNCH_OPTIONS
from .assignment import LARGEST_COST


@triton.jit
def _key_of_smallest(values, key):
    """Find the least `key` (int32, not negative) among the lanes with the least of `values` (float64, not NaN).

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
    """Load costs as float64, `worst` where they are NaN or infinite, 0 where `mask` is not set."""
    cost = tl.load(cost_ptr + index, mask=mask, other=0).to(tl.float64)
    return tl.where(tl.abs(cost) < float("inf"), cost, worst)


@triton.jit(do_not_specialize=["num_targets"])  # it differs from batch to batch
def linear_assignment_kernel(
    cost_ptr,  # (L, T, Q)
    target_offsets_ptr,  # (B + 1,)
    assignment_ptr,  # (L, T) int64, filled with -1
    non_finite_ptr,  # (L, T) int64
    num_targets,
    num_queries,
    BLOCK: tl.constexpr,  # lanes, more than the queries: lane num_queries stands for "no query"
):
    """Solve one image of one layer."""
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

    # Lane q holds the state of query q: the row it is assigned to (or -1) and its dual variable v. The dual variable of
    # an assigned row is its cost − v at its query.
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


def choose_lanes(num_queries: int) -> tuple[int, int]:
    """Return lanes and warps of a launch: with four lanes per thread the state of all queries fits the registers."""
    block = max(triton.next_power_of_2(num_queries + 1), 128)
    return block, min(block // 128, 16)


def launch(cost: Tensor, target_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Solve on the device, with the results of :func:`solq.kernels.matching.assignment.solve_with_scipy`."""
    L, T, Q = cost.shape
    B = len(target_offsets) - 1
    assignment = cost.new_full((L, T), -1, dtype=torch.int64)
    non_finite = cost.new_zeros((L, T), dtype=torch.int64)
    if cost.dtype == torch.float64:
        cost = cost.where(cost.abs() < LARGEST_COST, torch.inf)
    if cost.numel() > 0:
        block, num_warps = choose_lanes(Q)
        with torch.cuda.device_of(cost):
            linear_assignment_kernel[(L, B)](
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
