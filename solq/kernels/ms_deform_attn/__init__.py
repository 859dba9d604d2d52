"""Multi-scale deformable attention (Deformable DETR, https://arxiv.org/abs/2010.04159, section 4.1).

    output[b, q, m] = Σ_lp  weight[b, q, m, l, p] · sample(level l of value[b, :, m], location[b, q, m, l, p])

`sample` is bilinear; pixel (i, j) of an H × W level lies at ((j + ½) / W, (i + ½) / H); everything outside is zero.
In the fused form the weights are softmax(logits) over all L·P, and the locations are reference + offset / (W, H) for
reference points, and center + offset · size / 2P for reference boxes; the kernels never store either of the two.

The definition stands in plain.py, the fast path for a CPU in cpu.py. The Triton kernels are kernels.py, with what they
share in sampling.py and rows.py, and windows.py; launch.py and configuration.py launch them, and operators.py registers
the operator. module.py is the layer of a transformer.
"""

from torch import Tensor

from ..runtime import backend_for
from . import cpu, operators, plain
from .checks import LevelStartIndex, check_arguments
from .plain import SpatialShapes

__all__ = ["ms_deform_attn", "ms_deform_attn_fused"]


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: LevelStartIndex | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sum bilinear samples of all levels, weighted per query and head.

    The numbers are those of Deformable DETR's CUDA operator (`align_corners=False`, zeros outside); computed in
    float32, or float64 for a float64 `value`. Source: Deformable DETR, section 4.1. Differentiable, once, to the three
    floating arguments, which may differ in dtype (autocast gives a half-precision `value` and float32 locations).

    Args:
        value: (B, S, M, D), S the pixels of all levels, level after level, row after row.
        spatial_shapes: L rows (H, W): best a list of pairs, or a tensor (L, 2), on the GPU if you have it there.
        level_start_index: (L,), the first pixel of each level in S, which follows from the shapes: it is
            only checked, and may be None.
        sampling_locations: (B, Q, M, L, P, 2) as (x, y), 0..1 over each level's full (padded) map. A location that is
            outside, infinite or NaN samples zero.
        attention_weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M·D), of the dtype of `value`.

    Raises:
        TypeError: for other than floating tensors, or levels that are not integers.
        ValueError: for shapes or devices that disagree. The content of level tensors on a GPU is not looked at.
        RuntimeError: if Triton was asked for where it cannot run.
    """
    check_arguments(
        value,
        spatial_shapes,
        level_start_index,
        sampling_locations=sampling_locations,
        attention_weights=attention_weights,
    )
    backend = backend_for(value, has_definition=True)
    if backend == "triton":
        levels = operators.level_table(spatial_shapes, value)
        return operators.ms_deform_attn(value, levels, None, sampling_locations, attention_weights)
    function = plain.ms_deform_attn if backend == "definition" else cpu.ms_deform_attn
    value = operators.round_under_autocast(value)
    return function(value, spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: LevelStartIndex | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Compute `ms_deform_attn` of softmaxed weights and of locations around reference points, storing neither.

    The weights are the softmax of the logits over L·P; the locations, always computed in float32 or better, are
    reference + offset / (W, H) for points, and center + offset · size / 2P for boxes (Deformable DETR, appendix A.4).
    Differentiable, once, to the four floating arguments, which may differ in dtype.

    Args:
        value: (B, S, M, D), S the pixels of all levels, level after level, row after row.
        spatial_shapes: L rows (H, W): best a list of pairs, or a tensor (L, 2), on the GPU if you have it there.
        level_start_index: (L,), the first pixel of each level in S, which follows from the shapes: it is
            only checked, and may be None.
        reference_points: (B, Q, L, 2) as (x, y) or (B, Q, L, 4) as (cx, cy, w, h), 0..1 over the padded maps.
        sampling_offsets: (B, Q, M, L, P, 2): in pixels of each level for points, of half a box over P for boxes.
        attention_logits: (B, Q, M, L, P).

    Returns:
        (B, Q, M·D), of the dtype of `value`.

    Raises:
        TypeError, ValueError, RuntimeError: as `ms_deform_attn`.
    """
    check_arguments(
        value,
        spatial_shapes,
        level_start_index,
        reference_points,
        sampling_offsets=sampling_offsets,
        attention_logits=attention_logits,
    )
    backend = backend_for(value, has_definition=True)
    if backend == "triton":
        levels = operators.level_table(spatial_shapes, value)
        return operators.ms_deform_attn(value, levels, reference_points, sampling_offsets, attention_logits)
    function = plain.ms_deform_attn_fused if backend == "definition" else cpu.ms_deform_attn_fused
    value = operators.round_under_autocast(value)
    return function(value, spatial_shapes, reference_points, sampling_offsets, attention_logits)
