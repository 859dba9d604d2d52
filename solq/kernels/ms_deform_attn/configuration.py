"""Choose how the kernels are launched: block sizes, warps and registers.

LAUNCH_TABLE holds what was measured; where it has no entry, the rules below decide.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

MAX_CHANNELS = 256  # of a head, per launch; more are computed by several launches
FEW_ROWS = 32768  # B·Q·M up to which programs have one warp, to spread over all multiprocessors

# Configurations measured by `python -m benchmarks.tune` on the architecture that the key names:
# (direction, architecture, D, bytes per channel). No GPU has been measured yet.
LAUNCH_TABLE: dict[tuple[str, str, int, int], tuple[int, int]] = {}


class Problem(NamedTuple):
    """The sizes that a kernel is compiled for, and the dtype of `value`."""

    dtype: torch.dtype
    M: int
    L: int
    P: int
    D: int
    reference_size: int  # coordinates of a reference point, 2 or 4, or 0 in the plain form


def channels_per_word(dtype: torch.dtype, D: int) -> int:
    """Return 2 where two half-precision channels are read as one 32-bit word: where all rows start at a word."""
    return 2 if dtype.itemsize == 2 and D % 2 == 0 else 1


def launch_configuration(direction: str, architecture: str, D: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return the words per block and the warps of a launch, from LAUNCH_TABLE or else by a rule.

    Backward, a block is the largest power of two of words in a row (at most one row per warp), and the rest is one more
    block: 48 channels are 32 + 16, and a lane loads at most 16 + 8 bytes of each row. Forward, it is 32 channels, or
    half of a row where that is more: narrow blocks repeat the arithmetic of a sample in fewer lanes, and two blocks of
    accumulators fit in the 64 registers that let half of all warps be resident. Four warps share more rows in L1 than
    two, and two need fewer registers in the backward pass. With few queries, and where the backward pass adds to
    value's gradient itself, programs have one warp (`launch.py`), which needs fewest.

    Args:
        direction: "forward" or "backward".
        architecture: as `runtime.architecture` names it.
    """
    if (direction, architecture, D, dtype.itemsize) in LAUNCH_TABLE:
        return LAUNCH_TABLE[direction, architecture, D, dtype.itemsize]
    pack = channels_per_word(dtype, D)
    whole_row = 1 << ((min(D, MAX_CHANNELS) // pack).bit_length() - 1)
    channels_of_a_block = 16 if dtype == torch.float64 else 32
    if direction == "forward":
        return min(whole_row, max(channels_of_a_block // pack, whole_row // 2)), 4
    return min(whole_row, 128), 2


def has_vector_atomics(architecture: str) -> bool:
    """Return whether a GPU adds several floats in one atomic operation; older NVIDIA ones add one at a time."""
    return not architecture.startswith("sm_") or int(architecture[3:]) >= 90


def max_registers(
    direction: str,
    architecture: str,
    D: int,
    dtype: torch.dtype,
    reference_size: int = 0,
    grad_reference: bool = False,
    grad_value: bool = True,
) -> int | None:
    """Return the registers that a launch may use per thread on NVIDIA, None for the compiler's choice.

    Left alone, the compiler sometimes spills one register to make room for one more warp, and sometimes takes more than
    it needs. On sm_90, 64 are the most that keep half of all warps resident, and enough for the usual D and dtypes; it
    is 72 (44 %) forward for D 64 in half precision, and backward with gradients of reference points and for boxes
    without the gradient of `value`. Other D and float64 need more, and so does sm_100 backward in half precision. Where
    atomic additions are of one float or 64-bit integer each, the backward pass needs up to 125. With these bounds
    nothing spills on sm_90 in Triton 3.6, 3.8 or 3.9.

    Args:
        direction: "forward", "backward" or "deterministic" (backward, in fixed point).
        architecture: as `runtime.architecture` names it.
        reference_size: as in :class:`Problem`.
        grad_reference, grad_value: the gradients that a backward pass computes besides those of its samples.
    """
    if direction == "forward":
        if dtype == torch.float64 or D % 16 or D > 64:
            return 128
        return 64 if architecture == "sm_90" and not (D == 64 and dtype.itemsize == 2) else 72
    if direction == "deterministic" or dtype == torch.float64 or not has_vector_atomics(architecture):
        return 255
    if architecture == "sm_90" and D in (32, 48, 64):
        if grad_reference or (reference_size == 4 and not grad_value):
            return 72
        if reference_size == 4 and D == 48 and dtype == torch.float32:
            return None  # Triton 3.8 spills with any bound up to 72, and takes 67 unasked
        return 64
    if architecture == "sm_100" and dtype.itemsize == 2 and D % 16 == 0:
        return 96
    return None


@lru_cache
def kernel_constants(
    problem: Problem, first_channel: int, configuration: tuple[int, int], warp_size: int
) -> dict[str, Any]:
    """Return the compile-time arguments that the forward and the backward kernel share.

    Args:
        first_channel: the first of at most MAX_CHANNELS channels of each head that the launch computes.
        configuration: words per block and warps.
        warp_size: lanes of a warp.
    """
    dtype, M, L, P, D, reference_size = problem
    block_words, num_warps = configuration
    channels, pack = min(D - first_channel, MAX_CHANNELS), channels_per_word(dtype, D)
    lanes_per_query = max(1, block_words * max(dtype.itemsize, 4) // 16)
    return {
        "M": M,
        "L": L,
        "P": P,
        "D": D,
        "CHANNELS": channels,
        "REFERENCE_SIZE": reference_size,
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        "PACK": pack,
        "BLOCK_QUERIES": max(1, warp_size * num_warps // lanes_per_query),
        "LANES": lanes_per_query,
        "BLOCK_WORDS": block_words,
        "LAST_BLOCK": max(lanes_per_query, triton.next_power_of_2(channels // pack % block_words or block_words)),
        "BLOCK_K": min(64, triton.next_power_of_2(L * P)),
    }
