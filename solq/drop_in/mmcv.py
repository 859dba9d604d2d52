"""mmcv, and by it mmdetection, on the kernels of this project: ``solq.drop_in.mmcv.patch()``.

Replaced are what `MultiScaleDeformableAttnFunction.apply` does, wherever the class was imported, and the function for
CPU tensors in `mmcv.ops.multi_scale_deform_attn`. So `MultiScaleDeformableAttention` needs no compiled operator, and
where mmcv has none (mmcv-lite), `patch()` makes `mmcv.ops` importable: its other operators then raise an error that
says so when they are called. mmdetection is imported after the first `patch()`, which that makes possible.
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
    """`MultiScaleDeformableAttnFunction.apply` of mmcv and detrex; the step is accepted and not needed."""
    return ms_deform_attn(value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights)


def replacements(module: ModuleType) -> Iterator[Replacement]:
    """For a module with the names of mmcv, which detrex has too."""
    if hasattr(module, "MultiScaleDeformableAttnFunction"):
        yield Replacement(module.MultiScaleDeformableAttnFunction, "apply", staticmethod(apply))
    if hasattr(module, "multi_scale_deformable_attn_pytorch"):
        yield Replacement(module, "multi_scale_deformable_attn_pytorch", attention)


class _NothingCompiled(ModuleType):
    """In the place of compiled operators that are not there: each is an error when it is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: object, **kwargs: object) -> NoReturn:
            raise RuntimeError(f"{self.__name__} is not compiled here, so there is no {name}")

        return missing


def do_without(extension: str) -> None:
    """Make a package importable whose compiled `extension` is missing."""
    if find_spec(extension) is None:
        sys.modules[extension] = module = _NothingCompiled(extension)
        module.__spec__ = ModuleSpec(extension, None)


def _find() -> Iterator[Replacement]:
    do_without("mmcv._ext")
    yield from replacements(importlib.import_module("mmcv.ops.multi_scale_deform_attn"))


_patch = Patch(KNOWN_TO_WORK, _find)
patch, unpatch, patched = _patch.patch, _patch.unpatch, _patch.patched
