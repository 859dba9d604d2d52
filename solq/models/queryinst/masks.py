"""The mask heads of QueryInst (section 3): a query draws its mask through a dynamic convolution over its region."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from solq.data.batch import PackedTargets
from solq.kernels import paste_masks, paste_runs
from solq.models.base import MaskBranch, Matches, Selection
from solq.models.queryinst.mask_targets import crop_targets
from solq.models.queryinst.stages import DynamicConv, sample_regions

MASK_REGION = 14  # side of the region features that masks are predicted from; masks have twice as many pixels


class MaskInputs(TypedDict):
    """The inputs of the mask heads for a batch."""

    mask_queries: Tensor
    """(L, B, Q, C), the queries after the self-attention of each stage."""
    mask_boxes: Tensor
    """(L, B, Q, 4) float32 without gradient, x0 y0 x1 y1 in pixels of the padded images."""
    pyramid: list[Tensor]
    """Features (B, C, H_l, W_l) of strides 4, 8, 16 and 32."""


class RegionBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the regions that hold an object, the others being there for a fixed shape only."""

    updates_statistics = True

    def forward(self, x: Tensor, matched: Tensor | None = None) -> Tensor:
        """Normalize (R, C, H, W); in training by the statistics of the `matched` (R,) bool regions, or of all."""
        if not self.training or len(x) == 0:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if self.updates_statistics:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.updates_statistics and self.momentum else 0.0
        if matched is None:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, True, momentum, self.eps
            )
        weight = matched.float()[:, None, None, None]
        count = (weight.sum() * x.shape[2] * x.shape[3]).clamp(min=1)
        mean = (x * weight).sum((0, 2, 3)) / count
        centered = x - mean[:, None, None]
        variance = (centered.square() * weight).sum((0, 2, 3)) / count
        with torch.no_grad():
            share = momentum * matched.any()  # without any object there are no statistics
            self.running_mean.lerp_(mean, share)  # type: ignore[union-attr]
            self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), share)  # type: ignore[union-attr]
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class MaskHead(nn.Module):
    """Predict the masks of regions, each steered by its query.

    Args:
        width: C of queries and features.
        dynamic_width: hidden width of the dynamic convolution.
        convs: number of 3×3 convolutions.
        num_classes: K masks of each region.
    """

    def __init__(self, width: int, dynamic_width: int, convs: int, num_classes: int) -> None:
        super().__init__()
        self.dynamic_conv = DynamicConv(width, dynamic_width)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(convs))
        self.norms = nn.ModuleList(RegionBatchNorm2d(width) for _ in range(convs))
        self.upsample = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.class_masks = nn.Conv2d(width, num_classes, 1)
        # The published mask heads keep PyTorch's initial values but for these.
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]

    def forward(
        self, pyramid: list[Tensor], boxes: Tensor, images: Tensor, queries: Tensor, matched: Tensor | None = None
    ) -> Tensor:
        """Compute the mask features (R, C, 28, 28) of regions.

        Args:
            pyramid: levels (B, C, H_l, W_l).
            boxes: (R, 4) x0 y0 x1 y1 in pixels of the padded images.
            images: (R,) int64, the image of each region.
            queries: (R, C), after the self-attention of the stage.
            matched: (R,) bool, the regions that batch norm reads in training; all of them unless given.
        """
        regions = sample_regions(pyramid, boxes, images, MASK_REGION)
        x = self.dynamic_conv(queries, regions).mT.reshape(regions.shape)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x), matched).relu()
        return self.upsample(x).relu()

    def select(self, features: Tensor, labels: Tensor) -> Tensor:
        """Compute the mask logits (R, 28, 28) float32 of one class (R,) of each region, from features (R, C, 28, 28).

        The other classes' masks are never computed.
        """
        weight = self.class_masks.weight.flatten(1)[labels][:, None]  # (R, 1, C)
        logits = torch.bmm(weight.to(features.dtype), features.flatten(2)).view(-1, *features.shape[2:]).float()
        assert self.class_masks.bias is not None
        return logits + self.class_masks.bias[labels][:, None, None]

    @contextlib.contextmanager
    def keep_statistics(self) -> Iterator[None]:
        """Leave the running statistics as they are, while the head is run again in a backward pass."""
        norms = [norm for norm in self.norms if isinstance(norm, RegionBatchNorm2d)]
        for norm in norms:
            norm.updates_statistics = False
        try:
            yield
        finally:
            for norm in norms:
                norm.updates_statistics = True


class DynamicMasks(MaskBranch):
    """Predict masks with one dynamic mask head in each stage, at inference with that of the last stage.

    Args:
        stages: L.
        width, dynamic_width, convs, num_classes: of each head, see :class:`MaskHead`.
        gradient_checkpointing: run the heads again in the backward pass instead of keeping their activations.
    """

    class_specific = True
    masks_in_every_layer = True
    title = "dynamic mask head"

    def __init__(
        self, stages: int, width: int, dynamic_width: int, convs: int, num_classes: int, gradient_checkpointing: bool
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(MaskHead(width, dynamic_width, convs, num_classes) for _ in range(stages))
        self.gradient_checkpointing = gradient_checkpointing

    def forward(self, attended: Sequence[Tensor], boxes: Sequence[Tensor], pyramid: list[Tensor]) -> MaskInputs:
        """Hand on what the mask heads read; they run only for queries that are matched or selected.

        Args:
            attended: L × (B, Q, C), the queries after the self-attention of each stage.
            boxes: L × (B, Q, 4), the refined boxes of each stage in pixels of the padded images.
            pyramid: levels (B, C, H_l, W_l).
        """
        return {
            "mask_queries": torch.stack(list(attended)),
            "mask_boxes": torch.stack(list(boxes)).detach(),
            "pyramid": pyramid,
        }

    def losses(self, outputs: Any, matches: Matches, targets: PackedTargets) -> dict[str, Tensor]:
        """Compute ``loss_mask``: the dice loss of the target classes' masks of the matched queries in each stage."""
        L, B, Q = outputs["mask_boxes"].shape[:3]
        T = len(targets.labels)
        num_rows = min(T, B * Q)  # no more can be matched
        all_matched = T <= Q or B == 1
        losses = []
        for stage, head in enumerate(cast(list[MaskHead], list(self.heads)[-L:])):
            # The matched targets first, so that few rows are without a query; the host does not know how many.
            rows = (matches.queries[stage] < 0).int().argsort(stable=True)[:num_rows]
            queries, images = matches.queries[stage, rows], matches.images[rows]
            matched = queries >= 0
            queries = queries.clamp(min=0)
            boxes = outputs["mask_boxes"][stage, images, queries]
            with _autocast_as(outputs["pyramid"][0]):
                inputs = (outputs["pyramid"], boxes, images, outputs["mask_queries"][stage, images, queries])
                features = self._run(head, *inputs, None if all_matched else matched)
                logits = head.select(features, targets.labels[rows])
            height, width = outputs["pyramid"][0].shape[-2:]
            padded_size = (4 * height, 4 * width)
            cropped = crop_targets(targets, rows, images, boxes, padded_size, logits.shape[-1])
            losses.append((dice_loss(logits, cropped.float()) * matched).sum() / matches.num_matched)
        return {"loss_mask": torch.stack(losses)}

    def masks(
        self, outputs: Any, image: int, queries: Tensor, labels: Tensor, boxes: Tensor, image_size: tuple[int, int]
    ) -> Tensor:
        return paste_masks(self._probabilities(outputs, image, queries, labels), boxes, image_size)

    def runs(
        self, outputs: Any, image: int, queries: Tensor, labels: Tensor, boxes: Tensor, image_size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        return paste_runs(self._probabilities(outputs, image, queries, labels), boxes, image_size)

    def masks_by_layer(
        self, outputs: Any, image: int, queries: Tensor, labels: Tensor, boxes: Tensor, image_size: tuple[int, int]
    ) -> Tensor:
        images = torch.full_like(queries, image)
        masks = [
            paste_masks(self._predict(outputs, images, queries, labels, layer=layer), of_layer, image_size)
            for layer, of_layer in enumerate(boxes)
        ]
        return torch.stack(masks)

    def export(self, outputs: Any, selection: Selection) -> dict[str, Tensor]:
        shape, device = selection.queries.shape, selection.queries.device
        images = torch.arange(shape[0], device=device)[:, None].expand(shape).flatten()
        probabilities = self._predict(outputs, images, selection.queries.flatten(), selection.labels.flatten())
        return {"mask_probabilities": probabilities.unflatten(0, shape)}

    def describe_export(self, top_k: int) -> dict[str, str]:
        side = 2 * MASK_REGION
        return {
            "mask_probabilities": f"(B, {top_k}, {side}, {side}) float32, each stretched over its box: interpolate it "
            "there, the mask is where it is at least 0.5"
        }

    def _probabilities(self, outputs: Any, image: int, queries: Tensor, labels: Tensor) -> Tensor:
        """Predict the masks (K, 28, 28) in 0..1 of K queries of an image with their classes, from the last stage."""
        distinct, index = queries.unique(return_inverse=True)  # a query may be selected with several classes
        return self._predict(outputs, torch.full_like(distinct, image), distinct, labels, index)

    def _predict(
        self,
        outputs: Any,
        images: Tensor,
        queries: Tensor,
        labels: Tensor,
        index: Tensor | None = None,
        layer: int = -1,
    ) -> Tensor:
        """Predict the masks in 0..1 of the regions `index`, or all, of these queries, from one stage."""
        head = cast(MaskHead, self.heads[layer])
        boxes = outputs["mask_boxes"][layer, images, queries]
        with _autocast_as(outputs["pyramid"][0]):
            features = head(outputs["pyramid"], boxes, images, outputs["mask_queries"][layer, images, queries])
            logits = head.select(features if index is None else features[index], labels)
        return logits.sigmoid()

    def _run(self, head: MaskHead, *inputs: Any) -> Tensor:
        if not self.gradient_checkpointing:
            return head(*inputs)

        def contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
            return contextlib.nullcontext(), head.keep_statistics()

        return checkpoint(head, *inputs, use_reentrant=False, context_fn=contexts)


def dice_loss(logits: Tensor, targets: Tensor, eps: float = 1e-5) -> Tensor:
    """Compute the dice loss (R,) of mask logits and binary targets (R, h, w), its denominators squared.

    Source: V-Net (Milletari et al., 3DV 2016, section 3).
    """
    probability = logits.sigmoid()
    overlap = (probability * targets).sum((1, 2))
    total = probability.square().sum((1, 2)) + targets.square().sum((1, 2))
    return 1 - 2 * overlap / (total + 2 * eps)


def _autocast_as(features: Tensor) -> torch.autocast:
    """Compute in the precision of the features, also where the caller has left the autocast of the forward pass."""
    half = features.dtype in (torch.float16, torch.bfloat16)
    return torch.autocast(features.device.type, features.dtype if half else None, enabled=half)
