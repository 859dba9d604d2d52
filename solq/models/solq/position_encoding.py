"""Sine position encoding of a feature map that may be padded."""

import math

import torch
from torch import Tensor


def sine_position_encoding(padding_mask: Tensor, width: int, temperature: float = 10000.0) -> Tensor:
    """Encode the position of every pixel inside the unpadded part of its map (DETR, appendix A.4).

    Args:
        padding_mask: (B, H, W) bool, True on padding.
        width: channels of the encoding; the first half encodes y, the second x.
        temperature: ratio of the longest to the shortest wavelength.

    Returns:
        (B, width, H, W) float32.
    """
    valid = ~padding_mask
    frequency = _frequencies(width // 2, temperature, padding_mask.device)
    axes = []
    for dim in (1, 2):
        position = valid.cumsum(dim, dtype=torch.float32)
        last = position.narrow(dim, -1, 1)
        angle = ((position - 0.5) / (last + 1e-6) * 2 * math.pi)[..., None] / frequency
        axes.append(torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(3))
    return torch.cat(axes, dim=3).permute(0, 3, 1, 2)


def sine_box_encoding(boxes: Tensor, width: int, temperature: float = 10000.0) -> Tensor:
    """Encode boxes (B, Q, 4) given as values in 0..1 as (B, Q, 4·width) float32 (two-stage Deformable DETR, A.4)."""
    angle = (boxes.float() * 2 * math.pi)[..., None] / _frequencies(width, temperature, boxes.device)
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(2)


def _frequencies(features: int, temperature: float, device: torch.device) -> Tensor:
    index = torch.arange(features, dtype=torch.float32, device=device)
    return temperature ** (2 * (index // 2) / features)
