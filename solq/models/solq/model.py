"""SOLQ: an object query predicts class, box and mask as one vector each."""

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solq.detections import Detections, postprocess
from solq.kernels.reference import mask_runs
from solq.models.backbones.resnet import build_backbone
from solq.models.solq.mask_coding import build_mask_coding
from solq.models.solq.separate_masks import SeparateMaskHead
from solq.models.solq.transformer import MLP, DeformableTransformer
from solq.training.config import ModelConfig, ModelMeta

Outputs = dict[str, Any]  # tensors, and dicts and lists of them: see SOLQ.forward


class SOLQ(nn.Module):
    """Segmenting Objects by Learning Queries (Dong et al., NeurIPS 2021), on Deformable DETR.

    Args:
        config: the architecture; see :class:`solq.training.config.ModelConfig`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.meta = ModelMeta()
        width, levels = config.width, config.num_levels
        self.backbone = build_backbone(config.backbone, config.backbone_norm)
        channels = self.backbone.num_channels
        projections = [nn.Sequential(nn.Conv2d(c, width, 1), nn.GroupNorm(32, width)) for c in channels]
        for level in range(len(channels), levels):
            source = channels[-1] if level == len(channels) else width
            convolution = nn.Conv2d(source, width, 3, stride=2, padding=1)
            projections.append(nn.Sequential(convolution, nn.GroupNorm(32, width)))
        self.input_proj = nn.ModuleList(projections[:levels])
        self.transformer = DeformableTransformer(
            d_model=width,
            n_heads=config.num_heads,
            encoder_layers=config.encoder_layers,
            decoder_layers=config.decoder_layers,
            d_ffn=config.feedforward,
            dropout=config.dropout,
            n_levels=levels,
            n_points=config.num_points,
            num_queries=config.num_queries,
            two_stage=config.two_stage,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        self.query_embed = None if config.two_stage else nn.Embedding(config.num_queries, 2 * width)
        self.mask_coding = build_mask_coding(config.mask_coding, config.num_coefficients, config.mask_size)
        heads = config.decoder_layers + config.two_stage  # in two stages the last one scores the proposals
        self.class_embed = _clones(nn.Linear(width, config.num_classes), heads)
        self.bbox_embed = _clones(MLP(width, width, 4, 3), heads)
        self.vector_embed = None
        self.mask_head = None
        if config.mask_branch == "unified":
            self.vector_embed = MLP(width, config.vector_hidden, self.mask_coding.num_coefficients, 3)
        elif config.mask_branch == "separate":
            self.mask_head = SeparateMaskHead(width, config.num_heads, channels[:2])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values of the heads and projections, as published; the transformer sets its own."""
        for module in self.input_proj.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.class_embed.modules():
            if isinstance(module, nn.Linear):
                nn.init.constant_(module.bias, -math.log(99))  # every class starts with probability 0.01
        for head in [*self.bbox_embed, *([self.vector_embed] if self.vector_embed else [])]:
            nn.init.zeros_(_last_layer(head).weight)
            nn.init.zeros_(_last_layer(head).bias)
        if self.vector_embed:
            nn.init.constant_(_last_layer(self.vector_embed).bias[2:], -2.0)
        if not self.config.two_stage:
            nn.init.constant_(_last_layer(self.bbox_embed[0]).bias[2:], -2.0)

    def forward(self, images: Tensor, padding_mask: Tensor) -> Outputs:
        """Predict the objects of a batch of padded images.

        Args:
            images: (B, 3, H, W) float, normalised, zero on padding.
            padding_mask: (B, H, W) bool, True on padding.

        Returns:
            ``pred_logits`` (B, Q, C), ``pred_boxes`` (B, Q, 4) cx cy w h in 0..1 of each image without its padding,
            ``pred_vectors`` (B, Q, n), all float32; ``aux_outputs``, a list of the same dicts for the earlier decoder
            layers; in two stages ``enc_outputs``, logits (B, S, C) and boxes (B, S, 4) of the proposals; with a
            separate mask branch ``mask_features`` instead of the vectors.
        """
        maps = self.backbone(images)
        features = self._project(maps)
        masks = [F.interpolate(padding_mask[None].float(), size=f.shape[-2:])[0].bool() for f in features]
        query_embed = None if self.query_embed is None else self.query_embed.weight
        out = self.transformer(features, masks, query_embed, self.class_embed, self.bbox_embed)
        layers = [
            {"pred_logits": class_head(hidden).float(), "pred_boxes": boxes}
            for hidden, boxes, class_head in zip(out.hidden_states, out.pred_boxes, self.class_embed, strict=False)
        ]
        if self.vector_embed:
            for layer, hidden in zip(layers, out.hidden_states, strict=True):
                layer["pred_vectors"] = self.vector_embed(hidden).float()
        outputs: Outputs = {**layers[-1], "aux_outputs": layers[:-1]}
        if self.config.two_stage:
            outputs["enc_outputs"] = {"pred_logits": out.proposal_logits, "pred_boxes": out.proposal_boxes}
        if self.mask_head:
            prepared = self.mask_head(out.hidden_states[-1], out.memory, out.padding_mask, out.spatial_shapes, maps[:2])
            sizes = torch.stack([(~padding_mask).any(2).sum(1), (~padding_mask).any(1).sum(1)], dim=1)
            outputs["mask_features"] = {**prepared, "sizes": sizes}
        return outputs

    def decode_masks(
        self, outputs: Mapping[str, Any], image: int, queries: Tensor, boxes: Tensor, image_size: tuple[int, int]
    ) -> Tensor:
        """The masks of some queries of one image.

        Args:
            outputs: of `forward`.
            image: which of the batch.
            queries: (K,) int64.
            boxes: (K, 4), theirs, x0 y0 x1 y1 in pixels of the image to draw on.
            image_size: H and W of that image.

        Returns:
            (K, H, W) bool.
        """
        if self.mask_head:
            features = outputs["mask_features"]
            logits = self.mask_head.mask_logits(features, torch.full_like(queries, image), queries)
            return self.mask_head.masks(logits, boxes, features["sizes"][image], image_size)
        return self.mask_coding.decode_paste(outputs["pred_vectors"][image, queries], boxes, image_size)

    def decode_runs(
        self, outputs: Mapping[str, Any], image: int, queries: Tensor, boxes: Tensor, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """The same as what COCO's run lengths are made of, see :func:`solq.kernels.paste_runs`."""
        if self.mask_head:
            return mask_runs(self.decode_masks(outputs, image, queries, boxes, image_size))
        return self.mask_coding.decode_runs(outputs["pred_vectors"][image, queries], boxes, image_size)

    def postprocess(
        self,
        outputs: Outputs,
        orig_sizes: Tensor,
        top_k: int = 100,
        score_threshold: float = 0.0,
        run_lengths: bool = False,
    ) -> list[Detections]:
        """Detections, with masks if the model predicts any, or with run lengths instead of them; see
        :func:`solq.detections.postprocess`.
        """
        if self.config.mask_branch == "none":
            return postprocess(outputs, orig_sizes, None, top_k, score_threshold)
        if run_lengths:
            return postprocess(outputs, orig_sizes, None, top_k, score_threshold, self.decode_runs)
        return postprocess(outputs, orig_sizes, self.decode_masks, top_k, score_threshold)

    def _project(self, maps: list[Tensor]) -> list[Tensor]:
        """The L levels (B, width, h, w) that the transformer reads, from the backbone's features."""
        levels = [projection(x) for projection, x in zip(self.input_proj, maps, strict=False)]
        for projection in self.input_proj[len(maps) :]:
            levels.append(projection(maps[-1] if len(levels) == len(maps) else levels[-1]))
        return levels


def _clones(module: nn.Module, count: int) -> nn.ModuleList:
    return nn.ModuleList(copy.deepcopy(module) for _ in range(count))


def _last_layer(head: nn.Module) -> nn.Linear:
    return cast(nn.Linear, cast(MLP, head).layers[-1])
