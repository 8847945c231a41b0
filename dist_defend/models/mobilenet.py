"""MobileNetV2 (Sandler et al. 2018) with the strides that CIFAR images ask for, and bboylyg/RNP's keys."""

import torch.nn.functional as F
from torch import Tensor, nn

_STAGES = (  # expansion, channels, blocks, stride of the first
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 up, 3x3 per channel, 1x1 down; at stride 1 a shortcut, projected where the channels differ."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        width = expansion * in_channels
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Sequential | None = None
        if stride == 1:
            self.shortcut = nn.Sequential()
            if in_channels != out_channels:
                projection = nn.Conv2d(in_channels, out_channels, 1, bias=False)
                self.shortcut.extend((projection, nn.BatchNorm2d(out_channels)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return y if self.shortcut is None else y + self.shortcut(x)


class MobileNetV2(nn.Module):
    """Stem at stride 1, seventeen blocks, 1x1 to 1280 channels, average pool, linear."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.layers = nn.Sequential()
        before = 32
        for expansion, channels, blocks, first_stride in _STAGES:
            for number in range(blocks):
                stride = 1 if number else first_stride
                self.layers.append(InvertedResidual(before, channels, expansion, stride))
                before = channels
        self.conv2 = nn.Conv2d(before, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.linear(x.mean((2, 3)))
        return x
