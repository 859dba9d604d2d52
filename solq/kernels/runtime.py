"""Choose the backend that serves a call, and tell a launch about its device."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch

Backend = Literal["reference", "triton", "definition"]

# Only a launch imports Triton, so that this package can be imported where it is not installed.
HAS_TRITON = find_spec("triton") is not None

NO_TRITON = "the package triton is not installed: pip install triton, or use_backend('reference')"

# With TRITON_INTERPRET=1, set before this package is imported, kernels run on CPU tensors. Triton reads it like this.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

# Operators are registered under the package's own name: `torch.ops.solq`, or that of a project that took a copy.
NAMESPACE = __package__.removesuffix(".kernels").replace(".", "_")

# Fused multiply-add in every kernel; a coming Triton release no longer does so unasked.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}

_forced: Backend | None = None


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Serve every operator called inside the context by one backend, in all threads of the process.

    Args:
        backend: ``"reference"`` (PyTorch, any device), ``"triton"`` (CUDA and HIP tensors; CPU tensors only where
            ``TRITON_INTERPRET=1`` was set before this package was imported), or ``"definition"`` (the shortest PyTorch,
            of standard operators only, which the others are tested against; an operator without one takes its
            reference).

    Raises:
        ValueError: if there is no such backend.
        RuntimeError: if it is ``"triton"`` and Triton is not installed.
    """
    global _forced
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}, must be 'reference', 'triton' or 'definition'")
    if backend == "triton" and not HAS_TRITON:
        raise RuntimeError(f"backend is 'triton' but {NO_TRITON}")
    previous, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = previous


def backend_for(tensor: torch.Tensor, has_definition: bool = False) -> Backend:
    """Return the backend that serves a call whose tensors live on the device of `tensor`.

    Args:
        tensor: any tensor of the call.
        has_definition: whether the operator has a definition besides its reference. If not, the definition is not
            returned.

    Raises:
        RuntimeError: if the call is Triton's to serve, but Triton cannot run.
    """
    if _forced == "definition":
        return "definition" if has_definition else "reference"
    backend = _forced or ("triton" if tensor.device.type == "cuda" or INTERPRETED else "reference")
    if backend == "triton":
        require_triton(tensor)
    return backend


def require_triton(tensor: torch.Tensor) -> None:
    """Raise RuntimeError if Triton kernels cannot run on the device of `tensor`."""
    if tensor.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(
            f"the Triton backend was asked for with tensors on {tensor.device}: move them to a GPU, "
            "set TRITON_INTERPRET=1 before the first import, or use_backend('reference')"
        )
    if not HAS_TRITON:
        raise RuntimeError(f"tensors on {tensor.device} are served by Triton but {NO_TRITON}")


@cache
def architecture(device: torch.device) -> str:
    """Return the name that launch tables are keyed by: "sm_90", "gfx942", …; "interpreter" for a CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def warp_size(device: torch.device) -> int:
    """Return the lanes of a warp: 32 on NVIDIA, 64 on AMD's accelerators."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
