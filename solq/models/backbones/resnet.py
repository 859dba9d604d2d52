"""The ResNet backbone: an image to its features C2 or C3 to C5."""

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


class RunningBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that uses its running statistics in training too and never changes them; its affine map is trained."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


NORMS = {"frozen": FrozenBatchNorm2d, "running": RunningBatchNorm2d, "group": _group_norm}


class ResNetBackbone(nn.Module):
    """A torchvision ResNet without its classifier.

    With ``norm="frozen"`` it is fine-tuned as in DETR: batch norm is a fixed affine map, and the stem and the first
    stage are not trained. ``norm="running"`` is the same but for the affine maps after the first stage, which are
    trained, as in mmdetection. With ``norm="group"`` everything is trained, from any start, at any batch size.
    """

    def __init__(self, name: str, norm: str, first_level: int = 3) -> None:
        super().__init__()
        norm_layer = NORMS[norm]
        if name == "resnet10":
            # One basic block a stage and a stem that goes to stride 4 at once: two CPU cores train it in minutes.
            block = torchvision.models.resnet.BasicBlock
            self.body = torchvision.models.ResNet(block, [1, 1, 1, 1], norm_layer=norm_layer)
            self.body.conv1 = nn.Conv2d(3, 64, 7, stride=4, padding=3, bias=False)
            self.body.maxpool = nn.Identity()
        else:
            self.body = torchvision.models.get_model(name, weights=None, norm_layer=norm_layer)
        c5 = self.body.fc.in_features
        self.first_level = first_level
        self.num_channels = [c5 >> (5 - level) for level in range(first_level, 6)]
        del self.body.fc
        if norm != "group":
            for stage in (self.body.conv1, self.body.bn1, self.body.layer1):
                stage.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the features C_l (B, C, H / 2**l, W / 2**l) of images (B, 3, H, W), from the first level on."""
        body = self.body
        maps = [body.layer1(body.maxpool(body.relu(body.bn1(body.conv1(images)))))]
        for stage in (body.layer2, body.layer3, body.layer4):
            maps.append(stage(maps[-1]))
        return maps[self.first_level - 2 :]
