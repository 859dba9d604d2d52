"""Run mmcv, and with it mmdetection, on the kernels of this project: ``solq.drop_in.mmcv.patch()``.

The patch replaces `MultiScaleDeformableAttnFunction.apply`, wherever the class was imported, and the function for CPU
tensors in `mmcv.ops.multi_scale_deform_attn`, so that `MultiScaleDeformableAttention` needs no compiled operator. Where
mmcv has none (mmcv-lite), `patch()` makes `mmcv.ops` importable; its other operators then raise an error when they are
called. Import mmdetection after the first `patch()`.
"""

import importlib
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn

from torch import Tensor

from solq.drop_in.attention import attention
from solq.drop_in.patching import Patch, Replacement, Versions
from solq.kernels import ms_deform_attn

KNOWN_TO_WORK = Versions("mmcv", "2.0", "2.2")


def apply(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Compute `MultiScaleDeformableAttnFunction.apply` of mmcv and detrex; `im2col_step` is ignored."""
    return ms_deform_attn(value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights)


def replacements(module: ModuleType) -> Iterator[Replacement]:
    """Yield the replacements in a module with the names of mmcv, which detrex has too."""
    if hasattr(module, "MultiScaleDeformableAttnFunction"):
        yield Replacement(module.MultiScaleDeformableAttnFunction, "apply", staticmethod(apply))
    if hasattr(module, "multi_scale_deformable_attn_pytorch"):
        yield Replacement(module, "multi_scale_deformable_attn_pytorch", attention)


class _MissingExtension(ModuleType):
    """Stand in for compiled operators that are missing: calling one is an error."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: object, **kwargs: object) -> NoReturn:
            raise RuntimeError(f"{self.__name__} is not compiled here, so there is no {name}")

        return missing


def allow_missing(extension: str) -> None:
    """Make a package importable whose compiled `extension` is missing."""
    if find_spec(extension) is None:
        sys.modules[extension] = module = _MissingExtension(extension)
        module.__spec__ = ModuleSpec(extension, None)


def _find() -> Iterator[Replacement]:
    allow_missing("mmcv._ext")
    yield from replacements(importlib.import_module("mmcv.ops.multi_scale_deform_attn"))


_patch = Patch(KNOWN_TO_WORK, _find)
patch, unpatch, patched = _patch.patch, _patch.unpatch, _patch.patched
