"""The multi-scale deformable attention layer of Deformable DETR, on the fused function."""

import math

import torch
from torch import Tensor, nn

from . import ms_deform_attn_fused
from .checks import LevelStartIndex
from .plain import SpatialShapes


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with the parameter names and initial values of Deformable DETR.

    Args:
        d_model: width of queries and values; a multiple of `n_heads`.
        n_levels: levels of the feature pyramid.
        n_heads: attention heads.
        n_points: sampling points per head and level.

    Raises:
        ValueError: if one of them is not positive, or the heads do not divide the width.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        if min(d_model, n_levels, n_heads, n_points) < 1:
            given = f"{d_model}, {n_levels}, {n_heads} and {n_points}"
            raise ValueError(f"d_model, n_levels, n_heads and n_points are {given}, must be at least 1")
        if d_model % n_heads:
            raise ValueError(f"d_model is {d_model}, must be a multiple of n_heads, which is {n_heads}")
        self.n_levels, self.n_heads, self.n_points = n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Point head m in direction 2πm/M, its point p at p + 1 pixels (in the maximum norm); all weights are equal."""
        angle = torch.arange(self.n_heads) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, self.n_points + 1)
        offsets = direction[:, None, None] * distance[:, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.n_levels, -1, -1).flatten())
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: SpatialShapes,
        input_level_start_index: LevelStartIndex | None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from each query to a few points around its reference on every level.

        Args:
            query: (B, Q, M·D).
            reference_points: (B, Q, L, 2) as (x, y), or (B, Q, L, 4) as (cx, cy, w, h), 0..1 over the padded map.
            input_flatten: (B, S, M·D), the levels one after the other.
            input_spatial_shapes: L rows (H, W).
            input_level_start_index: (L,), the first pixel of each level in S: only checked, and may be None.
            input_padding_mask: (B, S) bool, True where the value counts as zero.

        Returns:
            (B, Q, M·D).
        """
        B, Q, _ = query.shape
        M, L, P = self.n_heads, self.n_levels, self.n_points
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0.0)
        sampled = ms_deform_attn_fused(
            value.unflatten(-1, (M, -1)),
            input_spatial_shapes,
            input_level_start_index,
            reference_points,
            self.sampling_offsets(query).view(B, Q, M, L, P, 2),
            self.attention_weights(query).view(B, Q, M, L, P),
        )
        return self.output_proj(sampled)
