"""The encoders' own networks: an nn.Sequential of conv, norm, relu, four stages, pool.

The order of children is jinyuan-jia/BadEncoder's (0 conv, 1 norm, 2 relu, 3..6 stages, 7 pool), so that its checkpoints
fit key by key. The blocks are torchvision's, which is imported when one is made: that takes a second.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

from torch import nn

Block = Literal["BasicBlock", "Bottleneck"]


def resnet_encoder(block: Block, depths: Sequence[int]) -> nn.Sequential:
    """torchvision's ResNet with a 3x3 stem and neither max pool nor linear layer."""
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    net = ResNet(BasicBlock if block == "BasicBlock" else Bottleneck, list(depths))  # its Kaiming-normal initialisation
    stem = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)  # torch's default initialisation, as published
    stages = (net.layer1, net.layer2, net.layer3, net.layer4)
    return nn.Sequential(stem, net.bn1, net.relu, *stages, net.avgpool)


def small_encoder() -> nn.Sequential:
    """One BasicBlock per stage, each halving the map: 15 MMAC at 32 px, 1.2 M parameters. Made for a laptop."""
    from torchvision.models.resnet import BasicBlock

    widths = [16, 32, 64, 128, 256]
    stages = []
    for before, width in itertools.pairwise(widths):
        shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride=2, bias=False), nn.BatchNorm2d(width))
        stages.append(nn.Sequential(BasicBlock(before, width, stride=2, downsample=shortcut)))
    stem = nn.Conv2d(3, widths[0], kernel_size=3, padding=1, bias=False)
    f = nn.Sequential(stem, nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True), *stages, nn.AdaptiveAvgPool2d(1))
    for module in f.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return f
