"""The convolutional or Swin backbone: an image to its C3, C4 and C5 features."""

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

RESNETS = ("resnet10", "resnet18", "resnet50", "resnet101")
SWINS = {  # windows of 7, as in the published Swin-L
    "swin-t": "swin_tiny_patch4_window7_224",
    "swin-s": "swin_small_patch4_window7_224",
    "swin-b": "swin_base_patch4_window7_224",
    "swin-l": "swin_large_patch4_window7_224",
}


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


class ResNetBackbone(nn.Module):
    """A torchvision ResNet without its classifier.

    With ``norm="frozen"`` it is fine-tuned as in DETR: batch norm is a fixed affine map, and the stem and the first
    stage are not trained. With ``norm="group"`` everything is trained, from any start, at any batch size.
    """

    def __init__(self, name: str, norm: str) -> None:
        super().__init__()
        norm_layer = FrozenBatchNorm2d if norm == "frozen" else _group_norm
        if name == "resnet10":
            # One basic block a stage and a stem that goes to stride 4 at once: two CPU cores train it in minutes.
            block = torchvision.models.resnet.BasicBlock
            self.body = torchvision.models.ResNet(block, [1, 1, 1, 1], norm_layer=norm_layer)
            self.body.conv1 = nn.Conv2d(3, 64, 7, stride=4, padding=3, bias=False)
            self.body.maxpool = nn.Identity()
        else:
            self.body = torchvision.models.get_model(name, weights=None, norm_layer=norm_layer)
        c5 = self.body.fc.in_features
        self.num_channels = [c5 // 4, c5 // 2, c5]
        del self.body.fc
        if norm == "frozen":
            for stage in (self.body.conv1, self.body.layer1):
                stage.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features (B, C, H/8, W/8), (B, C, H/16, W/16), (B, C, H/32, W/32) of images (B, 3, H, W)."""
        body = self.body
        x = body.layer1(body.maxpool(body.relu(body.bn1(body.conv1(images)))))
        c3 = body.layer2(x)
        c4 = body.layer3(c3)
        return [c3, c4, body.layer4(c4)]


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
    """Quotient and remainder; ONNX files cannot have `%` of a size that is dynamic."""
    quotient = index // size
    return quotient, index - quotient * size


class SwinBackbone(nn.Module):
    """A timm Swin transformer for images of any size, with a layer norm on each level that is handed on."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.body = timm.create_model(
            SWINS[name], features_only=True, out_indices=(1, 2, 3), strict_img_size=False, always_partition=True
        )
        for module in self.body.modules():
            if isinstance(module, SwinTransformerBlock):
                module.__class__ = _SwinBlock
        self.body.patch_embed.img_size = None  # would be asked whether images are whole patches, which they are
        self.num_channels = self.body.feature_info.channels()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.num_channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """As `ResNetBackbone.forward`."""
        height, width = images.shape[-2:]
        if height % 4 or width % 4:
            images = F.pad(images, (0, -width % 4, 0, -height % 4))  # whole patches
        return [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, self.body(images), strict=True)]


def build_backbone(name: str, norm: str) -> ResNetBackbone | SwinBackbone:
    """The backbone called `name`, with random weights."""
    if name in RESNETS:
        return ResNetBackbone(name, norm)
    if name in SWINS:
        return SwinBackbone(name)
    raise ValueError(f"backbone is {name!r}, must be one of {', '.join([*RESNETS, *SWINS])}")


def load_backbone_weights(backbone: ResNetBackbone | SwinBackbone, name: str, source: str) -> None:
    """Fill a backbone with ImageNet weights, in place.

    Args:
        backbone: as built by `build_backbone`.
        name: its name.
        source: ``"imagenet"`` to download them (torchvision for ResNets, timm for Swin), or the path of a state dict
            of the whole classifier (``.pth`` or ``.safetensors``).

    Raises:
        OSError: if they cannot be downloaded, or there is no such file.
        ValueError: if they do not fit, or the file is damaged.
    """
    state = _download(name) if source == "imagenet" else _read(Path(source))
    body = backbone.body
    if isinstance(backbone, SwinBackbone):  # features_only joins `layers.0` to `layers_0`
        state = {key.replace("layers.", "layers_", 1): tensor for key, tensor in state.items()}
    wanted = body.state_dict()
    missing = [key for key in wanted if key not in state or state[key].shape != wanted[key].shape]
    if missing:
        raise ValueError(
            f"backbone weights {source} do not fit {name}: {len(missing)} of {len(wanted)} tensors are missing "
            f"or of another shape, the first is {missing[0]}: give weights of {name}, or 'none'"
        )
    body.load_state_dict({key: state[key] for key in wanted})


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file; training scripts keep it under "model" or "state_dict"."""
    if not path.is_file():
        raise FileNotFoundError(f"backbone weights {path}: no such file (give a path, 'imagenet' or 'none')")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # zip, pickle and tensor readers each raise their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"backbone weights {path} are damaged or no state dict ({reason}): use another file"
        ) from error
    for entry in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(entry), dict):
            state = state[entry]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"backbone weights {path} hold no state dict: use another file")
    return state


def _download(name: str) -> dict[str, Tensor]:
    if name == "resnet10":
        raise ValueError("resnet10 has no ImageNet weights: give --backbone-weights none, or the PATH of your own")
    try:
        if name in SWINS:
            return timm.create_model(SWINS[name], pretrained=True).state_dict()
        # IMAGENET1K_V1 are the weights that the published model started from.
        weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        raise OSError(
            f"the ImageNet weights of {name} cannot be downloaded ({str(error).splitlines()[0]}): give "
            "--backbone-weights PATH with a file fetched elsewhere, or --backbone-weights none to train from scratch"
        ) from error
