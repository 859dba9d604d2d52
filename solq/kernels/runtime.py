"""Which backend serves a call, and what a launch must know of its device."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
import triton

Backend = Literal["reference", "triton"]

# With TRITON_INTERPRET=1, set before triton is imported, kernels run on CPU tensors.
INTERPRETED: bool = triton.knobs.runtime.interpret

# Operators are registered under the package's own name: `torch.ops.solq`, or that of a project that took a copy.
NAMESPACE = __package__.removesuffix(".kernels").replace(".", "_")

# Fused multiply-add in every kernel; a coming Triton release no longer does so unasked.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}

_forced: Backend | None = None


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Serve every operator called inside the context by one backend, in all threads of the process.

    Args:
        backend: ``"reference"`` (plain PyTorch, any device) or ``"triton"`` (CUDA and HIP tensors; CPU tensors only
            where ``TRITON_INTERPRET=1`` was set before triton was imported).

    Raises:
        ValueError: if there is no such backend.
    """
    global _forced
    if backend not in ("reference", "triton"):
        raise ValueError(f"backend is {backend!r}, must be 'reference' or 'triton'")
    previous, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = previous


def backend_for(tensor: torch.Tensor) -> Backend:
    """The backend that serves a call whose tensors live on the device of `tensor`.

    Raises:
        RuntimeError: if Triton was asked for where it cannot run.
    """
    if _forced == "triton":
        require_triton(tensor)
    return _forced or ("triton" if _can_run_triton(tensor) else "reference")


def _can_run_triton(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda" or INTERPRETED


def require_triton(tensor: torch.Tensor) -> None:
    """Raise RuntimeError if Triton kernels cannot run on the device of `tensor`."""
    if not _can_run_triton(tensor):
        raise RuntimeError(
            f"the Triton backend was asked for with tensors on {tensor.device}: move them to a GPU, "
            "set TRITON_INTERPRET=1 before importing triton, or use_backend('reference')"
        )


@cache
def architecture(device: torch.device) -> str:
    """What launch tables are keyed by: "sm_90", "gfx942", …; "interpreter" for a CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def warp_size(device: torch.device) -> int:
    """Lanes of a warp: 32 on NVIDIA, 64 on AMD's accelerators."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
