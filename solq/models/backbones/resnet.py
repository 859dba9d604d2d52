"""The ResNet backbone: an image to its C3, C4 and C5 features."""

import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


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
