"""PreActResNet-18 (He et al. 2016, "Identity Mappings") with the keys of SCLBD/BackdoorBench: no norm after the stem
or before the pool, shortcuts without norm."""

from itertools import pairwise

from torch import Tensor, nn

from dist_defend.ops.fused_norm import norm_relu


class PreActBlock(nn.Module):
    """bn1 conv1 bn2 conv2 shortcut.0; a projecting shortcut takes the activated input, an identity the raw one."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        is_identity = stride == 1 and in_channels == width
        projection = nn.Sequential(nn.Conv2d(in_channels, width, 1, stride, bias=False))
        self.shortcut = None if is_identity else projection

    def forward(self, x: Tensor) -> Tensor:
        activated = norm_relu(self.bn1, x)
        y: Tensor = self.conv2(norm_relu(self.bn2, self.conv1(activated)))
        return y + (x if self.shortcut is None else self.shortcut(activated))


class PreActResNet18(nn.Module):
    """Stem, four stages of two blocks, average pool, linear."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(PreActBlock(before, width, stride), PreActBlock(width, width, stride=1))
            for (before, width), stride in zip(pairwise((64, 64, 128, 256, 512)), (1, 2, 2, 2), strict=True)
        )
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        x = self.linear(x.mean((2, 3)))
        return x
