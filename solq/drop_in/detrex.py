"""Run detrex on the kernels of this project: ``solq.drop_in.detrex.patch()``.

The patch replaces what :mod:`solq.drop_in.mmcv` replaces in mmcv. detrex has to be importable, which takes detectron2;
its own compiled part may be missing.
"""

import importlib
from collections.abc import Iterator

from solq.drop_in.mmcv import allow_missing, replacements
from solq.drop_in.patching import Patch, Replacement, Versions

KNOWN_TO_WORK = Versions("detrex", "0.1", "0.5", "has the names that are looked for, no version was run")


def _find() -> Iterator[Replacement]:
    allow_missing("detrex._C")
    yield from replacements(importlib.import_module("detrex.layers.multi_scale_deform_attn"))


_patch = Patch(KNOWN_TO_WORK, _find)
patch, unpatch, patched = _patch.patch, _patch.unpatch, _patch.patched
