"""One stage of QueryInst (section 3.2): a query looks at its region through a convolution of its own."""

import math

import torch
from torch import Tensor, nn

from solq.kernels import dynamic_conv, multiscale_roi_align

BOX_REGION = 7  # side of the region features that boxes and classes are predicted from
DELTA_SCALE = 0.5  # of the predicted shift of a box's center
MAX_LOG_SCALE = math.log(1000 / 16)  # bound of the predicted logarithm of a box's growth


def sample_regions(pyramid: list[Tensor], boxes: Tensor, images: Tensor, side: int) -> Tensor:
    """Sample the pyramid in boxes (R, 4) in pixels of the padded images (R,): (R, C, side, side)."""
    return multiscale_roi_align(pyramid, boxes, images, (side, side))


class DynamicConv(nn.Module):
    """Convolve the features of each region with two 1×1 filters that are generated from its query (section 3.1).

    Args:
        width: C of queries and features.
        hidden: D channels between both filters.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.dynamic_layer = nn.Linear(width, 2 * width * hidden)
        self.norm_in = nn.LayerNorm(hidden)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, queries: Tensor, regions: Tensor) -> Tensor:
        """Return (R, A, C), A positions of each region, from queries (R, C) and regions (R, C, height, width)."""
        filters = self.dynamic_layer(queries)
        norms = (self.norm_in.weight, self.norm_in.bias, self.norm_out.weight, self.norm_out.bias)
        return dynamic_conv(regions.flatten(2).mT, filters, *norms, self.norm_in.eps)


class Stage(nn.Module):
    """Refine queries and boxes once, and classify the queries (section 3.2, equations 1 to 3).

    Args:
        width: C of the queries.
        num_heads: of the self-attention.
        feedforward: hidden width of the feed-forward network.
        dynamic_width: hidden width of the dynamic convolution.
        num_classes: K.
    """

    def __init__(self, width: int, num_heads: int, feedforward: int, dynamic_width: int, num_classes: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.attention_norm = nn.LayerNorm(width)
        self.dynamic_conv = DynamicConv(width, dynamic_width)
        self.fc_layer = nn.Linear(BOX_REGION**2 * width, width)
        self.fc_norm = nn.LayerNorm(width)
        self.dynamic_conv_norm = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, feedforward)
        self.linear2 = nn.Linear(feedforward, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.class_layers = _branch(width, 1)
        self.class_embed = nn.Linear(width, num_classes)
        self.bbox_layers = _branch(width, 3)
        self.bbox_embed = nn.Linear(width, 4)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the published initial values."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.constant_(self.class_embed.bias, -math.log(99))  # every class starts with probability 0.01
        nn.init.zeros_(self.bbox_embed.bias)

    def forward(self, queries: Tensor, boxes: Tensor, pyramid: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the stage.

        Args:
            queries: (B, Q, C).
            boxes: (B, Q, 4) float32, x0 y0 x1 y1 in pixels of the padded images.
            pyramid: levels (B, C, H_l, W_l) of strides 4, 8, 16 and 32.

        Returns:
            The refined queries (B, Q, C), the queries after self-attention (B, Q, C), which the mask head of this stage
            reads, the class logits (B, Q, K) float32 and the refined boxes (B, Q, 4) float32.
        """
        attended = self.attention_norm(queries + self.attention(queries, queries, queries, need_weights=False)[0])
        refined = self.dynamic_conv_norm(attended + self._interact(attended, boxes, pyramid))
        refined = self.ffn_norm(refined + self.linear2(self.linear1(refined).relu()))
        logits = self.class_embed(self.class_layers(refined)).float()
        deltas = self.bbox_embed(self.bbox_layers(refined)).float()
        return refined, attended, logits, refine_boxes(boxes, deltas)

    def _interact(self, queries: Tensor, boxes: Tensor, pyramid: list[Tensor]) -> Tensor:
        """Let each query (B, Q, C) look at the features in its box, through its dynamic convolution."""
        B, Q, _ = queries.shape
        images = torch.arange(B, device=boxes.device)[:, None].expand(B, Q).flatten()
        regions = sample_regions(pyramid, boxes.flatten(0, 1), images, BOX_REGION)
        features = self.dynamic_conv(queries.flatten(0, 1), regions)
        return self.fc_norm(self.fc_layer(features.flatten(1))).relu().view_as(queries)


def refine_boxes(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Move and resize boxes (…, 4) x0 y0 x1 y1 by deltas (…, 4), which are relative to the sides of the boxes.

    Source: R-CNN (Girshick et al., CVPR 2014, appendix C). Nothing is clipped to the image.
    """
    sides = boxes[..., 2:] - boxes[..., :2]
    centers = (boxes[..., :2] + boxes[..., 2:]) / 2 + sides * DELTA_SCALE * deltas[..., :2]
    half = sides * deltas[..., 2:].clamp(-MAX_LOG_SCALE, MAX_LOG_SCALE).exp() / 2
    return torch.cat([centers - half, centers + half], dim=-1)


def _branch(width: int, layers: int) -> nn.Sequential:
    """Build linear layers without bias, each with LayerNorm and ReLU."""
    blocks = [(nn.Linear(width, width, bias=False), nn.LayerNorm(width), nn.ReLU()) for _ in range(layers)]
    return nn.Sequential(*(module for block in blocks for module in block))
