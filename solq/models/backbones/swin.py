"""The Swin backbone: an image to its features C2 or C3 to C5."""

import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

TIMM_NAMES = {  # windows of 7, as in the published Swin-L
    "swin-t": "swin_tiny_patch4_window7_224",
    "swin-s": "swin_small_patch4_window7_224",
    "swin-b": "swin_base_patch4_window7_224",
    "swin-l": "swin_large_patch4_window7_224",
}


class _SwinBlock(SwinTransformerBlock):
    """Pads a map to whole windows before it is shifted, as the published Swin transformers for detection do.

    timm pads afterwards, which gives other windows for maps that are not a multiple of them. Pixels are put into their
    windows, padded and shifted, by one gather, whose shapes `torch.export` can keep dynamic.
    """

    def _attn(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        (height, width), (shift_y, shift_x) = self.window_size, self.shift_size
        rows, columns = (H + height - 1) // height, (W + width - 1) // width
        padded_height, padded_width = rows * height, columns * width
        windows, pixels = B * rows * columns, height * width

        image, slot = _split(torch.arange(windows * pixels, device=x.device), padded_height * padded_width)
        window_row, slot = _split(slot, height * padded_width)
        window_column, slot = _split(slot, pixels)
        _, row = _split(window_row * height + slot // width + shift_y, padded_height)
        _, column = _split(window_column * width + slot % width + shift_x, padded_width)
        place = (image * H + row.clamp(max=H - 1)) * W + column.clamp(max=W - 1)
        inside = (row < H) & (column < W)
        x = (x.flatten(0, 2).index_select(0, place) * inside[:, None]).view(windows, pixels, C)

        heads = self.attn.num_heads
        bias = self.attn._get_rel_pos_bias()[0]  # (heads, pixels, pixels)
        if shift_y or shift_x:  # the map is a torus: pixels do not attend to those from its other side
            side = (2 * (row < shift_y) + (column < shift_x)).view(windows, 1, pixels)
            apart = torch.where(side == side.mT, 0.0, -100.0).to(bias.dtype)
            bias = bias + apart[:, None].expand(-1, heads, -1, -1)
        q, k, v = self.attn.qkv(x).view(windows, pixels, 3, heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        x = torch.cat(x.unbind(1), dim=-1)  # a view of x would only fit the strides that one attention kernel leaves
        x = self.attn.proj(x.view(windows * pixels, C))

        image, pixel = _split(torch.arange(B * H * W, device=x.device), H * W)
        row, column = _split(pixel, W)
        window_row, row = _split(_split(row + padded_height - shift_y, padded_height)[1], height)
        window_column, column = _split(_split(column + padded_width - shift_x, padded_width)[1], width)
        window = (image * rows + window_row) * columns + window_column
        return x.index_select(0, window * pixels + row * width + column).view(B, H, W, C)


def _split(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return quotient and remainder; ONNX files cannot have `%` of a size that is dynamic."""
    quotient = index // size
    return quotient, index - quotient * size


class SwinBackbone(nn.Module):
    """A timm Swin transformer for images of any size, with a layer norm on each level that is handed on."""

    def __init__(self, name: str, first_level: int = 3) -> None:
        super().__init__()
        self.body = timm.create_model(
            TIMM_NAMES[name],
            features_only=True,
            out_indices=tuple(range(first_level - 2, 4)),
            strict_img_size=False,
            always_partition=True,
        )
        for module in self.body.modules():
            if isinstance(module, SwinTransformerBlock):
                module.__class__ = _SwinBlock
        self.body.patch_embed.img_size = None  # would be asked whether images are whole patches, which they are
        self.num_channels = self.body.feature_info.channels()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.num_channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features C_l (B, channels, H / 2**l, W / 2**l) of images (B, 3, H, W), from the first level on."""
        height, width = images.shape[-2:]
        if height % 4 or width % 4:
            images = F.pad(images, (0, -width % 4, 0, -height % 4))  # whole patches
        return [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, self.body(images), strict=True)]
