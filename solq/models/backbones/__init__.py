"""Backbones by name. A backbone is imported when it is built: timm only for a Swin transformer."""

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from solq.models.backbones.resnet import ResNetBackbone
    from solq.models.backbones.swin import SwinBackbone

ResNet = Literal["resnet10", "resnet18", "resnet50", "resnet101"]
Swin = Literal["swin-t", "swin-s", "swin-b", "swin-l"]
Backbone = Literal[ResNet, Swin]

Norm = Literal["frozen", "running", "group"]

RESNETS, SWINS = get_args(ResNet), get_args(Swin)


def build_backbone(name: Backbone, norm: Norm, first_level: int = 3) -> "ResNetBackbone | SwinBackbone":
    """Build the backbone called `name` with random weights.

    Args:
        name: of :data:`Backbone`.
        norm: the normalization of a ResNet, see :class:`solq.models.backbones.resnet.ResNetBackbone`.
        first_level: l of the finest feature C_l that it returns, of stride 2**l; the last one is C5.

    Raises:
        ValueError: if there is no such backbone.
    """
    if name in RESNETS:
        from solq.models.backbones.resnet import ResNetBackbone

        return ResNetBackbone(name, norm, first_level)
    if name in SWINS:
        from solq.models.backbones.swin import SwinBackbone

        return SwinBackbone(name, first_level)
    raise ValueError(f"backbone is {name!r}, must be one of {', '.join([*RESNETS, *SWINS])}")
