"""Linear assignment with SciPy: the definition, and what serves CPU tensors.

minimize Σ_t cost[l, t, assignment[l, t]]  over one-to-one assignments of the targets of an image to its Q queries
"""

from itertools import pairwise

import torch
from torch import Tensor

LARGEST_COST = 1e290  # float64 costs from here on count as infinite, for their sums could overflow


def solve_with_scipy(cost: Tensor, target_offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Assign each target a query at the least total cost per layer and image, on the host.

    NaN and infinite costs are replaced by one that is larger than all others together.

    Args:
        cost: (L, T, Q) any float dtype, on any device.
        target_offsets: (B+1,) integers.

    Returns:
        The query of each target (L, T) int64, -1 for a target left without one; the number of its NaN and infinite
        costs (L, T) int64.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    # NumPy has no bfloat16.
    host_cost = cost.detach().to("cpu", torch.promote_types(cost.dtype, torch.float32)).numpy()
    assignment = np.full(cost.shape[:2], -1, dtype=np.int64)
    non_finite = np.zeros(cost.shape[:2], dtype=np.int64)
    largest = min(LARGEST_COST, float(np.finfo(host_cost.dtype).max))
    for start, end in pairwise(target_offsets.tolist()):
        for layer, problem in enumerate(host_cost[:, start:end]):
            if problem.size and not (problem.max() <= largest and problem.min() >= -largest):  # NaN fails both
                finite = np.abs(problem) <= largest
                non_finite[layer, start:end] = (~finite).sum(1)
                bound = np.abs(problem[finite]).max(initial=0).astype(np.float64)
                problem = np.where(finite, problem, 2 * (end - start + 1) * bound if bound > 0 else 1.0)
            rows, columns = linear_sum_assignment(problem)
            assignment[layer, start + rows] = columns
    return torch.from_numpy(assignment).to(cost.device), torch.from_numpy(non_finite).to(cost.device)
