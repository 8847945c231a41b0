"""The ResNets for CIFAR-10 of He et al. 2016, section 4.2, with the keys of akamaster/pytorch_resnet_cifar10.

Three stages of n blocks with 16, 32 and 64 channels: 6 n + 2 layers. Shortcuts have no parameters (option A).
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from dist_defend.models.resnet import BasicBlock


class PaddedShortcut(nn.Module):
    """Every ``stride``-th pixel, and zeros for the channels that are added, half before and half behind."""

    def __init__(self, added_channels: int, stride: int) -> None:
        super().__init__()
        self.added_channels, self.stride = added_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        before = self.added_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.added_channels - before))


class CifarResNet(nn.Module):
    """Stem, three stages at strides 1, 2, 2, mean, linear. depth = 6 n + 2."""

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(_first(before, width, stride), *(BasicBlock(width, width, 1) for _ in range(blocks - 1)))
            for (before, width), stride in zip(pairwise((16, 16, 32, 64)), (1, 2, 2), strict=True)
        )
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.linear(x.mean((2, 3)))
        return x


def _first(before: int, width: int, stride: int) -> BasicBlock:
    return BasicBlock(before, width, stride, None if before == width else PaddedShortcut(width - before, stride))
