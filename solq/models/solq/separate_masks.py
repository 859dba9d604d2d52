"""The paper's baseline for masks: a separate branch that predicts each query's mask over the image (SQR, section 4.4).

As in DETR's segmentation head (DETR, section 4.4 and figure 8): the attention of a query over the encoder's memory is
its first, coarse mask; convolutions refine it while the finer features of the backbone are added.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from solq.data.batch import PackedTargets
from solq.models.base import MaskBranch, Matches, Selection
from solq.models.solq.transformer import TransformerOutput

FRAME_SCALE = 2  # the loss is computed in a frame of this many times the box's sides


class SeparateMasks(MaskBranch):
    """Predict masks of chosen queries, as logits over the padded image at the stride of the finest feature.

    Most of the work is per image and shared by its queries (`forward`, part of the model's own forward). Only the part
    that depends on the query (`mask_logits`) runs per mask: for matched queries in training, for the best in inference.

    Args:
        width: C of the transformer; a multiple of 16 times two to the number of features.
        num_heads: M attention maps per query.
        feature_channels: of the backbone's features, finest first: C3 and C4, of strides 8 and 16.
    """

    title = "SQR"

    def __init__(self, width: int, num_heads: int, feature_channels: Sequence[int]) -> None:
        super().__init__()
        divisor = 16 << len(feature_channels)  # 8 groups in the narrowest normalization
        if width % divisor:
            raise ValueError(f"width is {width}, must be a multiple of {divisor} for {len(feature_channels)} features")
        self.num_heads = num_heads
        self.stride = 32 >> len(feature_channels)  # pixels of the padded image per element of a mask
        self.query_proj = nn.Linear(width, width)
        self.key_proj = nn.Linear(width, width)
        # The first convolution of memory and attention maps, joined, is the sum of one per image and one per query.
        self.memory_conv = nn.Conv2d(width, width // 2, 3, padding=1)
        self.attention_conv = nn.Conv2d(num_heads, width // 2, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(8, width // 2)
        widths = [width >> (step + 1) for step in range(len(feature_channels) + 1)]
        self.lateral = nn.ModuleList(
            nn.Conv2d(channels, w, 1) for channels, w in zip(reversed(feature_channels), widths, strict=False)
        )
        self.refine = nn.ModuleList(
            nn.Sequential(nn.Conv2d(w, finer, 3, padding=1), nn.GroupNorm(8, finer), nn.ReLU())
            for w, finer in pairwise(widths)
        )
        self.output = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, decoded: TransformerOutput, backbone_maps: Sequence[Tensor], padding_mask: Tensor
    ) -> dict[str, dict[str, Tensor]]:
        """Compute the part of the masks that all queries of an image share.

        Args:
            decoded: of the transformer; the last layer's queries attend to the encoder's output.
            backbone_maps: features (B, channels, H, W), finest first; those that the branch was built for are read.
            padding_mask: (B, H, W) bool, True on padding.

        Returns:
            ``mask_features``: ``attention`` (B, Q, M, h, w), ``image`` (B, C/2, h, w), ``lateral_0``, ``lateral_1``, …
            from coarse to fine, and ``sizes`` (B, 2) int64, height and width of each image without its padding.
        """
        features = backbone_maps[: len(self.lateral)]
        level = len(features)  # the level after the features is attended to
        sizes, shape = [h * w for h, w in decoded.spatial_shapes], decoded.spatial_shapes[level]
        coarse = decoded.memory.split(sizes, dim=1)[level]  # (B, h·w, C)
        query = self.query_proj(decoded.hidden_states[-1]).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        key = self.key_proj(coarse).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, M, h·w, D)
        scores = (query @ key.mT).float() * query.shape[-1] ** -0.5  # (B, M, Q, h·w)
        scores = scores.masked_fill(decoded.padding_mask.split(sizes, dim=1)[level][:, None, None], -torch.inf)
        prepared = {
            "attention": scores.softmax(-1).transpose(1, 2).unflatten(3, shape),
            "image": self.memory_conv(coarse.transpose(1, 2).unflatten(2, shape)),
        }
        for step, (lateral, feature) in enumerate(zip(self.lateral, reversed(features), strict=True)):
            prepared[f"lateral_{step}"] = lateral(feature)
        prepared["sizes"] = torch.stack([(~padding_mask).any(2).sum(1), (~padding_mask).any(1).sum(1)], dim=1)
        return {"mask_features": prepared}

    def losses(self, outputs: Any, matches: Matches, targets: PackedTargets) -> dict[str, Tensor]:
        """Compute ``loss_mask`` (focal) and ``loss_dice`` of the last layer, each (1,)."""
        queries = matches.queries[-1]
        logits = self.mask_logits(outputs["mask_features"], matches.images, queries.clamp(min=0))
        losses = self.loss(logits, targets.masks, targets.boxes, targets.sizes[matches.images])
        return {name: ((loss * (queries >= 0)).sum() / matches.num_targets)[None] for name, loss in losses.items()}

    def masks(
        self, outputs: Any, image: int, queries: Tensor, labels: Tensor, boxes: Tensor, image_size: tuple[int, int]
    ) -> Tensor:
        features = outputs["mask_features"]
        logits = self.mask_logits(features, torch.full_like(queries, image), queries)
        return self.paste(logits, boxes, features["sizes"][image], image_size)

    def export(self, outputs: Any, selection: Selection) -> dict[str, Tensor]:
        queries = selection.queries
        images = torch.arange(queries.shape[0], device=queries.device)[:, None].expand_as(queries)
        logits = self.mask_logits(outputs["mask_features"], images.flatten(), queries.flatten())
        return {"mask_logits": logits.unflatten(0, queries.shape)}

    def describe_export(self, top_k: int) -> dict[str, str]:
        return {
            "mask_logits": f"(B, {top_k}, H/{self.stride}, W/{self.stride}) float32 over the padded image: the mask is "
            "where it is above 0, inside the box"
        }

    def mask_logits(self, prepared: dict[str, Tensor], image: Tensor, query: Tensor) -> Tensor:
        """Predict the masks of K queries over their padded images.

        Args:
            prepared: ``mask_features`` of `forward`.
            image: (K,) int64, the image of each query in the batch.
            query: (K,) int64.

        Returns:
            (K, H, W) float32, H and W being those of the finest feature.
        """
        attention = prepared["attention"][image, query]  # (K, M, h, w)
        x = self.norm(prepared["image"][image] + self.attention_conv(attention)).relu()
        for step, refine in enumerate(self.refine):
            lateral = prepared[f"lateral_{step}"]
            x = refine(F.interpolate(x, size=lateral.shape[-2:]) + lateral[image])
        return self.output(x)[:, 0].float()

    def loss(self, mask_logits: Tensor, masks: Tensor, boxes: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Compute the focal and dice loss of each pair of predicted and target mask, as in DETR.

        They are compared in the target's box and a margin around it, where the target is empty. Further away nothing
        has to be learned, because `paste` keeps only the inside of the predicted box. A frame of a fixed number of
        samples costs the same for an object of any size, and no full-image target is ever made.

        Args:
            mask_logits: (T, H, W) of `mask_logits`.
            masks: (T, N, N) binary, the targets in their box frame.
            boxes: (T, 4), the targets' boxes, cx cy w h in 0..1 of each image without its padding.
            sizes: (T, 2), height and width of each target's image without its padding, in pixels of the batch.

        Returns:
            ``loss_mask`` and ``loss_dice``, each (T,).
        """
        N = masks.shape[-1]
        border = N * (FRAME_SCALE - 1) // (2 * FRAME_SCALE)
        target = F.adaptive_avg_pool2d(masks.to(mask_logits.dtype)[:, None], N - 2 * border)[:, 0]
        target = F.pad(target, (border, border, border, border))

        extents = sizes.flip(-1).to(boxes.dtype)  # W, H
        centers, sides = boxes[:, :2] * extents, boxes[:, 2:] * extents * N / (N - 2 * border)
        offset = (torch.arange(N, device=boxes.device) + 0.5) / N - 0.5
        x, y = (centers[:, :, None] + sides[:, :, None] * offset).unbind(1)  # (T, N) pixels of the padded image
        predicted = self._sample(mask_logits[:, None], x, y)[:, 0]
        inside = ((y > 0) & (y < sizes[:, :1]))[:, :, None] & ((x > 0) & (x < sizes[:, 1:]))[:, None, :]

        focal = sigmoid_focal_loss(predicted, target, alpha=0.25, gamma=2)
        probability, target = predicted.sigmoid() * inside, target * inside
        overlap, total = (probability * target).sum((1, 2)), (probability + target).sum((1, 2))
        return {
            "loss_mask": (focal * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1),
            "loss_dice": 1 - (2 * overlap + 1) / (total + 1),
        }

    def paste(self, mask_logits: Tensor, boxes: Tensor, size: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Paste masks into an image: (K, H, W) bool, true where the logit is above 0 inside the predicted box.

        Args:
            mask_logits: (K, h, w) of `mask_logits`, all of one image.
            boxes: (K, 4), x0 y0 x1 y1 in pixels of the image to draw on.
            size: (2,), height and width of the image without its padding, in pixels of the batch.
            image_size: H and W of the image to draw on, which may be another.
        """
        H, W = image_size
        y = torch.arange(H, device=boxes.device) + 0.5
        x = torch.arange(W, device=boxes.device) + 0.5
        logits = self._sample(mask_logits[None], (x * (size[1] / W))[None], (y * (size[0] / H))[None])[0]
        x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
        rows, columns = (y > y0) & (y < y1), (x > x0) & (x < x1)
        return (logits > 0) & rows[:, :, None] & columns[:, None, :]

    def _sample(self, maps: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Sample maps (n, c, h, w) at columns x (n, X) and rows y (n, Y), in pixels of the padded image: (n, c, Y, X).

        Beyond its edge a map goes on with the value there.
        """
        h, w = maps.shape[-2:]
        shape = (len(x), y.shape[1], x.shape[1])
        columns, rows = x[:, None, :] / (w * self.stride), y[:, :, None] / (h * self.stride)
        grid = torch.stack([columns.expand(shape), rows.expand(shape)], dim=-1) * 2 - 1
        return F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
