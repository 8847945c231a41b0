"""WideResNets (Zagoruyko and Komodakis 2016) with the keys of polo5/ZeroShotKnowledgeTransfer.

conv1, block{1,2,3}.layer.{i}.{bn1,conv1,bn2,conv2,convShortcut}, bn1, fc.
"""

from itertools import pairwise

from torch import Tensor, nn

from dist_defend.ops.fused_norm import norm_relu


class WideBlock(nn.Module):
    """Pre-activation block; the projecting shortcut takes the activated input, the identity the raw one."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        is_identity = in_channels == width
        self.convShortcut = None if is_identity else nn.Conv2d(in_channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = norm_relu(self.bn1, x)
        y: Tensor = self.conv2(norm_relu(self.bn2, self.conv1(activated)))
        return y + (x if self.convShortcut is None else self.convShortcut(activated))


class WideGroup(nn.Module):
    """A stage: its blocks under ``layer``, the first of them with the stride."""

    def __init__(self, in_channels: int, width: int, depth: int, stride: int) -> None:
        super().__init__()
        rest = (WideBlock(width, width, stride=1) for _ in range(depth - 1))
        self.layer = nn.Sequential(WideBlock(in_channels, width, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x


class WideResNet(nn.Module):
    """WRN-depth-widen, depth = 6 n + 4: three groups of n blocks with 16, 32, 64 times ``widen`` channels."""

    def __init__(self, depth: int, widen: int, num_classes: int) -> None:
        super().__init__()
        widths = (16, 16 * widen, 32 * widen, 64 * widen)
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.block1, self.block2, self.block3 = (
            WideGroup(before, width, (depth - 4) // 6, stride)
            for (before, width), stride in zip(pairwise(widths), (1, 2, 2), strict=True)
        )
        self.bn1 = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def layers(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The three groups' outputs (B, C, H', W') and the logits, of one pass over normalised images."""
        return self.layers_from(self.conv1(x), 0)

    def layers_from(self, x: Tensor, first: int) -> tuple[list[Tensor], Tensor]:
        """As layers, from the input of group ``first`` (0 to 2) on."""
        maps = []
        for group in (self.block1, self.block2, self.block3)[first:]:
            x = group(x)
            maps.append(x)
        return maps, self.fc(norm_relu(self.bn1, x).mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[1]
