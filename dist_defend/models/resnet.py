"""ResNets for small images (He et al. 2016, CIFAR stem: 3x3 at stride 1, no max pooling), with bboylyg/RNP's keys.

Activations are out of place: defences differentiate these networks twice.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from dist_defend.ops.fused_norm import norm_relu


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; conv1 bn1 conv2 bn2 shortcut.0 shortcut.1, unless another shortcut is given."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(in_channels, width, stride) if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = norm_relu(self.bn1, self.conv1(x))
        return norm_relu(self.bn2, self.conv2(y), self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (carries the stride), 1x1 to four times the width."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = self.expansion * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = norm_relu(self.bn1, self.conv1(x))
        y = norm_relu(self.bn2, self.conv2(y))
        return norm_relu(self.bn3, self.conv3(y), self.shortcut(x))


class ResNet(nn.Module):
    """Stem, four stages (64, 128, 256, 512 channels at strides 1, 2, 2, 2 unless told otherwise), mean, linear."""

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: Sequence[int],
        num_classes: int,
        widths: Sequence[int] = (64, 128, 256, 512),
        strides: Sequence[int] = (1, 2, 2, 2),
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        channels = [widths[0], *(block.expansion * width for width in widths)]
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(block(before, width, stride), *(block(after, width, stride=1) for _ in range(depth - 1)))
            for (before, after), width, stride, depth in zip(pairwise(channels), widths, strides, depths, strict=True)
        )
        self.linear = nn.Linear(channels[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = norm_relu(self.bn1, self.conv1(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.linear(x.mean((2, 3)))
        return x


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
