"""Define multi-scale deformable attention: what every other implementation is tested against.

The functions take the arguments of the public ones, but no `level_start_index`, which follows from the shapes, and
check nothing. They are made of standard PyTorch operators only, so that a model with them exports to ONNX.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SpatialShapes = Tensor | Sequence[tuple[int, int]]


def ms_deform_attn(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sum bilinear samples of all levels by their weights (Deformable DETR, https://arxiv.org/abs/2010.04159, 4.1).

    Args:
        value: (B, S, M, D), S the pixels of all levels, level after level, row after row.
        spatial_shapes: L rows (H, W). The host waits for a tensor on a GPU.
        sampling_locations: (B, Q, M, L, P, 2) as (x, y), 0..1 over each level; finite.
        attention_weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M·D), of the dtype of `value`; computed in float32, or float64 for a float64 `value`.
    """
    B, _, M, D = value.shape
    Q = sampling_locations.shape[1]
    compute = torch.promote_types(value.dtype, torch.float32)
    shapes = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    levels = value.to(compute).split([h * w for h, w in shapes], dim=1)
    grids = (2 * sampling_locations.to(compute) - 1).transpose(1, 2).flatten(0, 1)  # (B·M, Q, L, P, 2)
    weights = attention_weights.to(compute).transpose(1, 2).flatten(0, 1)[:, None]  # (B·M, 1, Q, L, P)
    output = value.new_zeros(B * M, D, Q, dtype=compute)
    for level, (pixels, (h, w)) in enumerate(zip(levels, shapes, strict=True)):
        maps = pixels.permute(0, 2, 3, 1).reshape(B * M, D, h, w)
        samples = F.grid_sample(maps, grids[:, :, level], align_corners=False)  # (B·M, D, Q, P)
        output = output + (samples * weights[:, :, :, level]).sum(-1)
    return output.view(B, M * D, Q).transpose(1, 2).to(value.dtype)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Compute `ms_deform_attn` of the softmax of the logits, and of locations around reference points or boxes."""
    locations, weights = locations_and_weights(
        value.dtype, spatial_shapes, reference_points, sampling_offsets, attention_logits
    )
    return ms_deform_attn(value, spatial_shapes, locations, weights)


def locations_and_weights(
    dtype: torch.dtype,
    spatial_shapes: SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute the sampling locations and attention weights of the fused form (Deformable DETR, appendix A.4).

    Args:
        dtype: that of `value`; the results are in float32, or float64 for it.
        spatial_shapes: L rows (H, W).
        reference_points: (B, Q, L, 2) as (x, y) or (B, Q, L, 4) as (cx, cy, w, h), 0..1 over each level.
        sampling_offsets: (B, Q, M, L, P, 2): in pixels of each level for points, of half a box over P for boxes.
        attention_logits: (B, Q, M, L, P).

    Returns:
        (B, Q, M, L, P, 2) and (B, Q, M, L, P).
    """
    compute = torch.promote_types(dtype, torch.float32)
    offsets = sampling_offsets.to(compute)
    centers = reference_points.to(compute)[:, :, None, :, None, :]
    if reference_points.shape[-1] == 2:
        shapes = as_tensor(spatial_shapes, compute, offsets.device)
        locations = centers + offsets / shapes.flip(-1)[:, None]
    else:  # far outside where offset · size is not finite: 0 · ∞ would make gradients NaN
        sizes = (centers[..., 2:] * (0.5 / sampling_offsets.shape[-2])).expand_as(offsets)
        finite = (offsets * sizes).isfinite()
        locations = centers[..., :2] + torch.where(finite, offsets, 1e30) * torch.where(finite, sizes, 1)
    weights = attention_logits.to(compute).flatten(-2).softmax(-1).view(attention_logits.shape)
    return locations, weights


def as_tensor(shapes: SpatialShapes, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Convert sizes to a tensor. (`torch.as_tensor` makes constants of those that torch.export keeps dynamic.)"""
    if isinstance(shapes, Tensor):
        return shapes.to(device, dtype)
    return torch.tensor(shapes, dtype=dtype, device=device)
