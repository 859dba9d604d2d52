"""Backbones by name. A backbone is imported when it is built: timm only for a Swin transformer."""

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from solq.models.backbones.resnet import ResNetBackbone
    from solq.models.backbones.swin import SwinBackbone

ResNet = Literal["resnet10", "resnet18", "resnet50", "resnet101"]
Swin = Literal["swin-t", "swin-s", "swin-b", "swin-l"]
Backbone = Literal[ResNet, Swin]

RESNETS, SWINS = get_args(ResNet), get_args(Swin)


def build_backbone(name: Backbone, norm: Literal["frozen", "group"]) -> "ResNetBackbone | SwinBackbone":
    """Build the backbone called `name` with random weights.

    Raises:
        ValueError: if there is no such backbone.
    """
    if name in RESNETS:
        from solq.models.backbones.resnet import ResNetBackbone

        return ResNetBackbone(name, norm)
    if name in SWINS:
        from solq.models.backbones.swin import SwinBackbone

        return SwinBackbone(name)
    raise ValueError(f"backbone is {name!r}, must be one of {', '.join([*RESNETS, *SWINS])}")
