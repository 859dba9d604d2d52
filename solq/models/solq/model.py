"""SOLQ: an object query predicts class, box and mask as one vector each."""

import copy
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import NotRequired, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solq.data.batch import PackedTargets
from solq.models.backbones import build_backbone
from solq.models.base import Attention, InstanceSegmenter, MaskBranch, Matches, NoMasks, Outputs
from solq.models.detection_losses import detection_losses
from solq.models.solq.attention import record_attention
from solq.models.solq.config import SOLQConfig
from solq.models.solq.mask_coding import FittedCoding, MaskCoding, build_mask_coding
from solq.models.solq.mask_coding import load as load_mask_coding
from solq.models.solq.masks import VectorMasks
from solq.models.solq.separate_masks import SeparateMasks
from solq.models.solq.transformer import MLP, DeformableTransformer


class SOLQOutputs(Outputs):
    """The predictions of SOLQ; masks as vectors, or as features of the separate branch."""

    pred_vectors: NotRequired[Tensor]
    """(L, B, Q, n) float32."""
    mask_features: NotRequired[dict[str, Tensor]]
    """See :meth:`SeparateMasks.forward`."""


class SOLQ(InstanceSegmenter):
    """Segmenting Objects by Learning Queries (Dong et al., NeurIPS 2021), on Deformable DETR.

    Args:
        config: the architecture and the losses.
    """

    name = "solq"
    config: SOLQConfig

    def __init__(self, config: SOLQConfig) -> None:
        super().__init__()
        self.config = config
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
        heads = config.decoder_layers + config.two_stage  # in two stages the last one scores the proposals
        self.class_embed = _clones(nn.Linear(width, config.num_classes), heads)
        self.bbox_embed = _clones(MLP(width, width, 4, 3), heads)
        self.masks = self._build_masks()
        self.reset_parameters()

    def _build_masks(self) -> MaskBranch:
        config = self.config
        if config.mask_branch == "separate":
            return SeparateMasks(config.width, config.num_heads, self.backbone.num_channels[:2])
        if config.mask_branch == "none":
            return NoMasks()
        coding = build_mask_coding(config.mask_coding, config.num_coefficients, config.mask_size)
        loss = (config.vector_loss_weight, config.vector_loss_start)
        return VectorMasks(config.width, config.vector_hidden, coding, *loss)

    def reset_parameters(self) -> None:
        """Set the published initial values of the heads and projections; the transformer sets its own."""
        for module in self.input_proj.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.class_embed.modules():
            if isinstance(module, nn.Linear):
                nn.init.constant_(module.bias, -math.log(99))  # every class starts with probability 0.01
        vector_heads = [self.masks.vector_embed] if isinstance(self.masks, VectorMasks) else []
        for head in [*self.bbox_embed, *vector_heads]:
            nn.init.zeros_(_last_layer(head).weight)
            nn.init.zeros_(_last_layer(head).bias)
        for head in vector_heads:
            nn.init.constant_(_last_layer(head).bias[2:], -2.0)
        if not self.config.two_stage:
            nn.init.constant_(_last_layer(self.bbox_embed[0]).bias[2:], -2.0)

    def record_attention(self, layer: int) -> AbstractContextManager[list[Attention]]:
        return record_attention(self.transformer, layer)

    def rename_former_keys(self, state: dict[str, Tensor], prefix: str = "") -> None:
        former = {"vector_embed.": "masks.vector_embed.", "mask_head.": "masks.", "mask_coding.": "masks.coding."}
        for old, new in former.items():
            for key in [key for key in state if key.startswith(prefix + old)]:
                value = state.pop(key)
                if old != "mask_coding." or isinstance(self.masks, VectorMasks):  # other branches held an unused one
                    state[prefix + new + key.removeprefix(prefix + old)] = value

    def prepare_training(self, resumes: bool) -> None:
        """Freeze the detector if the config says so and, unless a run resumes, read the fitted mask coding.

        Raises:
            ValueError: if the coding has to be fitted first, or the given one is another than the model's.
            FileNotFoundError: if there is no such file.
        """
        if isinstance(self.masks, VectorMasks) and not resumes:
            _load_fitted_coding(self.masks.coding, self.config)
        if self.config.freeze_detector:
            self.requires_grad_(False)
            self.masks.requires_grad_(True)

    def forward(self, images: Tensor, padding_mask: Tensor, last_layer_only: bool = False) -> SOLQOutputs:
        maps = self.backbone(images)
        features = self._project(maps)
        padding_masks = [F.interpolate(padding_mask[None].float(), size=f.shape[-2:])[0].bool() for f in features]
        query_embed = None if self.query_embed is None else self.query_embed.weight
        decoded = self.transformer(features, padding_masks, query_embed, self.class_embed, self.bbox_embed)
        if last_layer_only:
            decoded.keep_last_layer()
        class_heads = self.class_embed[: self.config.decoder_layers][-len(decoded.hidden_states) :]
        logits = [head(hidden).float() for hidden, head in zip(decoded.hidden_states, class_heads, strict=True)]
        outputs: SOLQOutputs = {"pred_logits": torch.stack(logits), "pred_boxes": torch.stack(decoded.pred_boxes)}
        if decoded.proposal_logits is not None:
            outputs |= {"enc_logits": decoded.proposal_logits, "enc_boxes": decoded.proposal_boxes}
        return outputs | self.masks(decoded, maps, padding_mask)

    @property
    def loss_weights(self) -> Mapping[str, float]:
        return {
            "loss_ce": 2.0,
            "loss_bbox": 5.0,
            "loss_giou": 2.0,
            "loss_vector": 1.0,
            "loss_mask": 1.0,
            "loss_dice": 1.0,
        }

    def losses(self, outputs: SOLQOutputs, matches: Matches, targets: PackedTargets) -> dict[str, Tensor]:
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        detection = detection_losses(logits, boxes, targets.labels, targets, matches, matches.num_targets)
        return detection | self.masks.losses(outputs, matches, targets)

    def learning_rate_groups(self) -> dict[str, list[nn.Parameter]]:
        groups: dict[str, list[nn.Parameter]] = {"backbone": [], "points": [], "others": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                predicts_points = "reference_points" in name or "sampling_offsets" in name
                group = "backbone" if name.startswith("backbone.") else "points" if predicts_points else "others"
                groups[group].append(parameter)
        return groups

    def _project(self, maps: list[Tensor]) -> list[Tensor]:
        """Project the backbone's features to the L levels (B, width, h, w) that the transformer reads."""
        levels = [projection(x) for projection, x in zip(self.input_proj, maps, strict=False)]
        for projection in self.input_proj[len(maps) :]:
            levels.append(projection(maps[-1] if len(levels) == len(maps) else levels[-1]))
        return levels


def _load_fitted_coding(coding: MaskCoding, config: SOLQConfig) -> None:
    """Read a coding that was fitted on a training set; see :meth:`SOLQ.prepare_training`."""
    path = config.mask_coding_weights
    if path is not None:
        fitted = load_mask_coding(path)
        given, wanted = ((c.name, c.num_coefficients, c.size) for c in (fitted, coding))
        if given != wanted:
            raise ValueError(
                f"{path} holds the coding (name, coefficients, size) {given} but the model's is {wanted}: change "
                "--model.mask-coding, --model.num-coefficients and --model.mask-size, or fit another"
            )
        coding.load_state_dict(fitted.state_dict())
    if isinstance(coding, FittedCoding) and not coding.fitted:
        raise ValueError(
            f"the {coding.name} mask coding has to be fitted first: run `solq fit-coding --coding {coding.name}` on "
            "the training set and give its file as --model.mask-coding-weights"
        )


def _clones(module: nn.Module, count: int) -> nn.ModuleList:
    return nn.ModuleList(copy.deepcopy(module) for _ in range(count))


def _last_layer(head: nn.Module) -> nn.Linear:
    return cast(nn.Linear, cast(MLP, head).layers[-1])
