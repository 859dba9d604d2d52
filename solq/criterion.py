"""The criterion, at the place where DETR codebases look for it."""

from solq.training.criterion import SetCriterion

__all__ = ["SetCriterion"]
