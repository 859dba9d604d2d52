"""Deformable attention with the arguments of other codebases' PyTorch functions, and of the layer of transformers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from solq.kernels import ms_deform_attn

Shapes = Tensor | Sequence[tuple[int, int]]


def attention(
    value: Tensor, value_spatial_shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Compute `solq.kernels.ms_deform_attn`, without `level_start_index`."""
    return ms_deform_attn(value, value_spatial_shapes, None, sampling_locations, attention_weights)


def attention_layer(
    self: Any,
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: Sequence[tuple[int, int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Compute `MultiScaleDeformableAttention.forward` of most models of transformers."""
    return ms_deform_attn(value, value_spatial_shapes, level_start_index, sampling_locations, attention_weights)
