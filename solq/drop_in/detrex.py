"""detrex on the kernels of this project: ``solq.drop_in.detrex.patch()``.

As for mmcv: what `MultiScaleDeformableAttnFunction.apply` does, and the function for CPU tensors. detrex has to be
importable, which takes its own compiled part, and detectron2.
"""

import importlib
from collections.abc import Iterator

from solq.drop_in.mmcv import replacements
from solq.drop_in.patching import Patch, Replacement

KNOWN_TO_WORK = ">=0.1,<1"


def _find() -> Iterator[Replacement]:
    yield from replacements(importlib.import_module("detrex.layers.multi_scale_deform_attn"))


_patch = Patch("detrex", KNOWN_TO_WORK, _find)
patch, unpatch, patched = _patch.patch, _patch.unpatch, _patch.patched
