"""SOLQ: instance segmentation by learned queries, on Triton kernels."""

__version__ = "0.1.0"
