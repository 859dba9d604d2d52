"""The sampling points of the decoder of SOLQ, recorded while the model runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from solq.kernels import MSDeformAttn
from solq.models.base import Attention
from solq.models.solq.transformer import DeformableTransformer


@contextmanager
def record_attention(transformer: DeformableTransformer, layer: int) -> Iterator[list[Attention]]:
    """Append the cross-attention of one decoder layer, for the first image of a batch, at every call of the model."""
    recorded: list[Attention] = []

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, MSDeformAttn)
        query, reference_points, _, spatial_shapes, *_ = args
        recorded.append(sampling_points(module, query, reference_points, spatial_shapes))

    hook = transformer.decoder.layers[layer].get_submodule("cross_attn").register_forward_pre_hook(record)
    try:
        yield recorded
    finally:
        hook.remove()


def sampling_points(
    module: MSDeformAttn, query: Tensor, reference_points: Tensor, spatial_shapes: Sequence[tuple[int, int]]
) -> Attention:
    """Compute the sampling points and weights of an attention module for the first image, from its arguments.

    Source: Deformable DETR, appendix A.4.
    """
    shape = (query.shape[1], module.n_heads, module.n_levels, module.n_points)
    offsets = module.sampling_offsets(query[0]).float().view(*shape, 2)
    weights = module.attention_weights(query[0]).float().view(*shape).flatten(2).softmax(-1).view(shape)
    references = reference_points[0].float()[:, None, :, None]  # (Q, 1, L, 1, 2 or 4)
    if references.shape[-1] == 2:
        sizes = torch.tensor([(w, h) for h, w in spatial_shapes], device=query.device)
        locations = references + offsets / sizes[:, None]
    else:
        locations = references[..., :2] + offsets * references[..., 2:] * (0.5 / module.n_points)
    return Attention(locations, weights)
