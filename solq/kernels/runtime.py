"""Which backend serves a call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import triton

Backend = Literal["reference", "triton"]

# With TRITON_INTERPRET=1, set before triton is imported, kernels run on CPU tensors.
INTERPRETED: bool = triton.knobs.runtime.interpret

_forced: Backend | None = None


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Serve every operator called inside the context by one backend.

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
    can_run_triton = tensor.device.type == "cuda" or INTERPRETED
    if _forced == "triton" and not can_run_triton:
        raise RuntimeError(
            f"the Triton backend was asked for with tensors on {tensor.device}: move them to a GPU, "
            "set TRITON_INTERPRET=1 before importing triton, or use_backend('reference')"
        )
    return _forced or ("triton" if can_run_triton else "reference")
