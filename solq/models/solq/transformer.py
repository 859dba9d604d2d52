"""The deformable transformer: feature maps to the content and reference box of every query, decoder layer by layer."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from solq.kernels.ms_deform_attn.module import MSDeformAttn
from solq.models.solq.position_encoding import sine_box_encoding, sine_position_encoding

SpatialShapes = list[tuple[int, int]]


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return the logit of x, with x and 1 − x clamped to at least `eps`."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


class MLP(nn.Module):
    """Linear layers with a ReLU between them."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [input_dim, *[hidden_dim] * (num_layers - 1), output_dim]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class EncoderLayer(nn.Module):
    """Deformable self-attention over all pixels of all levels, then a feed-forward network."""

    def __init__(self, d_model: int, d_ffn: int, dropout: float, n_levels: int, n_heads: int, n_points: int) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, d_ffn)
        self.dropout2 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(d_ffn, d_model)
        self.dropout3 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)

    def forward(
        self,
        src: Tensor,
        pos: Tensor,
        reference_points: Tensor,
        spatial_shapes: SpatialShapes,
        level_start_index: list[int],
        padding_mask: Tensor,
    ) -> Tensor:
        attended = self.self_attn(src + pos, reference_points, src, spatial_shapes, level_start_index, padding_mask)
        src = self.norm1(src + self.dropout1(attended))
        return self.norm2(src + self.dropout3(self.linear2(self.dropout2(self.linear1(src).relu()))))


class DecoderLayer(nn.Module):
    """Self-attention among the queries, deformable attention to the memory, then a feed-forward network."""

    def __init__(self, d_model: int, d_ffn: int, dropout: float, n_levels: int, n_heads: int, n_points: int) -> None:
        super().__init__()
        self.cross_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout, batch_first=True)
        self.dropout2 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, d_ffn)
        self.dropout3 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(d_ffn, d_model)
        self.dropout4 = nn.Dropout(dropout)
        self.norm3 = nn.LayerNorm(d_model)

    def forward(
        self,
        tgt: Tensor,
        query_pos: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        spatial_shapes: SpatialShapes,
        level_start_index: list[int],
        padding_mask: Tensor,
    ) -> Tensor:
        q = tgt + query_pos
        tgt = self.norm2(tgt + self.dropout2(self.self_attn(q, q, tgt, need_weights=False)[0]))
        attended = self.cross_attn(
            tgt + query_pos, reference_points, memory, spatial_shapes, level_start_index, padding_mask
        )
        tgt = self.norm1(tgt + self.dropout1(attended))
        return self.norm3(tgt + self.dropout4(self.linear2(self.dropout3(self.linear1(tgt).relu()))))


class Encoder(nn.Module):
    """A stack of encoder layers."""

    def __init__(self, layer: EncoderLayer, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))


class Decoder(nn.Module):
    """A stack of decoder layers."""

    def __init__(self, layer: DecoderLayer, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(num_layers))


@dataclass
class TransformerOutput:
    """The output of the transformer, which the heads read; lists have one entry per decoder layer."""

    hidden_states: list[Tensor]  # (B, Q, width)
    pred_boxes: list[Tensor]  # (B, Q, 4) cx cy w h in 0..1
    memory: Tensor  # (B, S, width), the encoder's output
    padding_mask: Tensor  # (B, S) bool
    spatial_shapes: SpatialShapes
    proposal_logits: Tensor | None = None  # (B, S, C), two-stage only
    proposal_boxes: Tensor | None = None  # (B, S, 4), two-stage only

    def keep_last_layer(self) -> None:
        """Drop the outputs of all decoder layers but the last."""
        self.hidden_states, self.pred_boxes = self.hidden_states[-1:], self.pred_boxes[-1:]


class DeformableTransformer(nn.Module):
    """Deformable DETR's encoder and decoder with iterative box refinement, optionally in two stages.

    Source: Deformable DETR, sections 4.1 and 4.2, appendix A.4.

    Args:
        d_model: width.
        n_heads: attention heads.
        encoder_layers, decoder_layers: how many.
        d_ffn: hidden width of the feed-forward networks.
        dropout: probability.
        n_levels: feature levels.
        n_points: sampling points per head and level.
        num_queries: object queries (in two stages: proposals handed to the decoder).
        two_stage: take the queries from the best proposals of the encoder.
        gradient_checkpointing: recompute each layer in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        encoder_layers: int,
        decoder_layers: int,
        d_ffn: int,
        dropout: float,
        n_levels: int,
        n_points: int,
        num_queries: int,
        two_stage: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.d_model, self.num_queries = d_model, num_queries
        self.two_stage, self.gradient_checkpointing = two_stage, gradient_checkpointing
        shape = (d_model, d_ffn, dropout, n_levels, n_heads, n_points)
        self.encoder = Encoder(EncoderLayer(*shape), encoder_layers)
        self.decoder = Decoder(DecoderLayer(*shape), decoder_layers)
        self.level_embed = nn.Parameter(torch.empty(n_levels, d_model))
        if two_stage:
            self.enc_output = nn.Linear(d_model, d_model)
            self.enc_output_norm = nn.LayerNorm(d_model)
            self.pos_trans = nn.Linear(2 * d_model, 2 * d_model)
            self.pos_trans_norm = nn.LayerNorm(2 * d_model)
        else:
            self.reference_points = nn.Linear(d_model, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)
        if not self.two_stage:
            nn.init.zeros_(self.reference_points.bias)

    def forward(
        self,
        features: Sequence[Tensor],
        padding_masks: Sequence[Tensor],
        query_embed: Tensor | None,
        class_embed: nn.ModuleList,
        bbox_embed: nn.ModuleList,
    ) -> TransformerOutput:
        """Run encoder and decoder.

        Args:
            features: L maps (B, width, H, W).
            padding_masks: L masks (B, H, W) bool, True on padding.
            query_embed: (Q, 2·width), position and content of the queries; None in two stages.
            class_embed, bbox_embed: the heads of each decoder layer; in two stages one more, for the proposals.
        """
        spatial_shapes = [(f.shape[2], f.shape[3]) for f in features]
        level_start_index = [sum(h * w for h, w in spatial_shapes[:level]) for level in range(len(features))]
        src = torch.cat([f.flatten(2).transpose(1, 2) for f in features], dim=1)
        padding_mask = torch.cat([m.flatten(1) for m in padding_masks], dim=1)
        pos = torch.cat(
            [
                sine_position_encoding(mask, self.d_model).flatten(2).transpose(1, 2) + level_embed
                for mask, level_embed in zip(padding_masks, self.level_embed, strict=True)
            ],
            dim=1,
        ).to(src.dtype)
        valid_ratios = torch.stack([_valid_ratio(mask) for mask in padding_masks], dim=1)  # (B, L, 2)

        centers = _pixel_centers(spatial_shapes, valid_ratios)  # (B, S, 2)
        pixel_references = centers[:, :, None] * valid_ratios[:, None]
        memory = src
        for layer in self.encoder.layers:
            memory = self._run(layer, memory, pos, pixel_references, spatial_shapes, level_start_index, padding_mask)

        proposal_logits = proposal_boxes = None
        if self.two_stage:
            proposal_logits, proposal_boxes, reference = self._propose(
                memory, padding_mask, centers, spatial_shapes, class_embed[-1], bbox_embed[-1]
            )
            encoded = sine_box_encoding(reference, self.d_model // 2).to(memory.dtype)
            query_pos, tgt = self.pos_trans_norm(self.pos_trans(encoded)).chunk(2, dim=-1)
        else:
            assert query_embed is not None
            query_pos, tgt = (q.expand(len(src), -1, -1) for q in query_embed.chunk(2, dim=-1))
            reference = self.reference_points(query_pos).float().sigmoid()

        hidden_states, pred_boxes = [], []
        for layer, head in zip(self.decoder.layers, bbox_embed, strict=False):  # two stages have one more head
            scale = valid_ratios if reference.shape[-1] == 2 else valid_ratios.repeat(1, 1, 2)
            tgt = self._run(
                layer,
                tgt,
                query_pos,
                reference[:, :, None] * scale[:, None],
                memory,
                spatial_shapes,
                level_start_index,
                padding_mask,
            )
            boxes = _refine(reference, head(tgt).float())
            hidden_states.append(tgt)
            pred_boxes.append(boxes)
            reference = boxes.detach()
        return TransformerOutput(
            hidden_states, pred_boxes, memory, padding_mask, spatial_shapes, proposal_logits, proposal_boxes
        )

    def _run(self, layer: nn.Module, *args: object) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)

    def _propose(
        self,
        memory: Tensor,
        padding_mask: Tensor,
        centers: Tensor,
        spatial_shapes: SpatialShapes,
        class_head: nn.Module,
        box_head: nn.Module,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score one box per pixel; return logits (B, S, C), boxes (B, S, 4), and the best boxes (B, Q, 4)."""
        sides = torch.cat([centers.new_full((h * w,), 0.05 * 2**level) for level, (h, w) in enumerate(spatial_shapes)])
        boxes = torch.cat([centers, sides[None, :, None].expand(len(centers), -1, 2)], dim=-1)
        usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1) & ~padding_mask
        output = self.enc_output_norm(self.enc_output(memory.masked_fill(~usable[..., None], 0.0)))
        logits = class_head(output).float()
        # As in Deformable DETR a pixel that proposes nothing still has a class score; its box is all ones.
        prior = torch.log(boxes / (1 - boxes)).masked_fill(~usable[..., None], math.inf)
        unactivated = box_head(output).float() + prior
        best = logits[..., 0].topk(min(self.num_queries, logits.shape[1]), dim=1).indices
        reference = unactivated.gather(1, best[..., None].expand(-1, -1, 4)).detach().sigmoid()
        return logits, unactivated.sigmoid(), reference


def _refine(reference: Tensor, delta: Tensor) -> Tensor:
    """Move reference points (B, Q, 2) or boxes (B, Q, 4) by `delta` in logit space; return boxes (B, Q, 4)."""
    start = inverse_sigmoid(reference)
    if start.shape[-1] == 2:
        start = torch.cat([start, torch.zeros_like(start)], dim=-1)
    return (start + delta).sigmoid()


def _valid_ratio(padding_mask: Tensor) -> Tensor:
    """Return the unpadded share (B, 2) of the width and of the height of masks (B, H, W)."""
    valid = (~padding_mask).float()
    return torch.stack([valid[:, 0, :].mean(-1), valid[:, :, 0].mean(-1)], dim=-1)


def _pixel_centers(spatial_shapes: SpatialShapes, valid_ratios: Tensor) -> Tensor:
    """Return the centers (B, S, 2) of all pixels as (x, y), 0..1 over the unpadded part of their level."""
    centers = []
    for (h, w), ratio in zip(spatial_shapes, valid_ratios.unbind(1), strict=True):
        x = (torch.arange(w, device=ratio.device) + 0.5) / (ratio[:, :1] * w)
        y = (torch.arange(h, device=ratio.device) + 0.5) / (ratio[:, 1:] * h)
        grid = torch.stack([x[:, None, :].expand(-1, h, -1), y[:, :, None].expand(-1, -1, w)], dim=-1)
        centers.append(grid.flatten(1, 2))
    return torch.cat(centers, dim=1)
