"""The matcher, at the place where DETR codebases look for it."""

from solq.training.matcher import HungarianMatcher

__all__ = ["HungarianMatcher"]
