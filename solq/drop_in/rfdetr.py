"""Run RF-DETR's own package on the kernels of this project: ``solq.drop_in.rfdetr.patch()``.

The patch replaces the function that `MSDeformAttn` of `rfdetr.models.ops` calls, for models made before and after. In
export mode a model keeps rfdetr's own operators, since other runtimes do not know those of this project.
"""

import importlib
from collections.abc import Iterator

from torch import Tensor

from solq.drop_in.attention import Shapes, attention
from solq.drop_in.patching import Patch, Replacement, Versions

KNOWN_TO_WORK = Versions("rfdetr", "1.10", "1.11")


def _find() -> Iterator[Replacement]:
    module = importlib.import_module("rfdetr.models.ops.modules.ms_deform_attn")
    original = getattr(module, "ms_deform_attn_core_pytorch", None)
    if original is None:
        return

    def ms_deform_attn_core(
        value: Tensor,
        value_spatial_shapes: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        value_spatial_shapes_hw: list[tuple[int, int]] | None = None,
    ) -> Tensor:
        """Attend with value (B, M, D, S), locations (B, Q, M, L, P, 2) and weights (B, Q, M, L·P)."""
        if sampling_locations.ndim == 5:  # levels and points merged: export mode
            return original(value, value_spatial_shapes, sampling_locations, attention_weights, value_spatial_shapes_hw)
        shapes: Shapes = value_spatial_shapes if value_spatial_shapes_hw is None else value_spatial_shapes_hw
        weights = attention_weights.view(sampling_locations.shape[:-1])
        return attention(value.permute(0, 3, 1, 2), shapes, sampling_locations, weights)

    yield Replacement(module, "ms_deform_attn_core_pytorch", ms_deform_attn_core)


_patch = Patch(KNOWN_TO_WORK, _find)
patch, unpatch, patched = _patch.patch, _patch.unpatch, _patch.patched
