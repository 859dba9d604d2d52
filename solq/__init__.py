"""SOLQ: instance segmentation by learned queries, on Triton kernels."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from solq.detections import Detections
    from solq.predictor import Predictor
    from solq.training.criterion import SetCriterion
    from solq.training.matcher import HungarianMatcher
    from solq.weights import load, save

__version__ = "0.1.0"

__all__ = ["Detections", "HungarianMatcher", "Predictor", "SetCriterion", "load", "save"]

_MODULES = {
    "Detections": "solq.detections",
    "HungarianMatcher": "solq.training.matcher",
    "SetCriterion": "solq.training.criterion",
    "Predictor": "solq.predictor",
    "load": "solq.weights",
    "save": "solq.weights",
}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use, so that `import solq.kernels` needs torch only."""
    if name not in _MODULES:
        raise AttributeError(f"module 'solq' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
