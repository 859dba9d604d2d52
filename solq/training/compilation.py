"""Find out whether a model can be compiled on this machine."""

import logging

import torch

from solq.errors import first_line

logger = logging.getLogger(__name__)


def can_compile(device: torch.device) -> bool:
    """Compile a tiny function, and say what is wrong if that fails: no compiler, or a cache that cannot be written."""
    try:
        with torch.no_grad():
            torch.compile(_tiny)(torch.ones(8, device=device))
    except Exception as error:  # the compiler's errors have no common type
        logger.warning("--compile is left out, because compiling fails here: %s", first_line(error))
        torch.compiler.reset()
        return False
    return True


def _tiny(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1
