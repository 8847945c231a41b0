"""Image generators of data-free distillation, with the keys of their upstreams."""

import torch
from torch import Tensor, nn

from dist_defend.errors import UserError
from dist_defend.models.pixel_space import Normalize

_SLOPE = 0.2  # of the leaky ReLUs


class ZSKTGenerator(nn.Module):
    """polo5/ZeroShotKnowledgeTransfer's: z (B, z_dim) -> images (B, 3, H, W) as a network sees them, normalised.

    Nothing bounds them: the last layer is a batch norm. width: channels after the first layer, 128 as published.
    is_grey: the last layer has one channel, which stands for all three. pixels: normalisation of images in [0, 1]; with
    it the last layer's numbers h become pixels sigmoid(2 h - 1), most of them dark at first, and are normalised.
    """

    def __init__(
        self,
        z_dim: int = 100,
        image_size: int = 32,
        width: int = 128,
        is_grey: bool = False,
        pixels: Normalize | None = None,
    ) -> None:
        super().__init__()
        side = _first_side(image_size)
        self.is_grey, self.pixels = is_grey, pixels
        channels = 1 if is_grey else 3
        self.layers = nn.Sequential(
            nn.Linear(z_dim, width * side**2),
            nn.Unflatten(1, (width, side, side)),
            nn.BatchNorm2d(width),
            *_doubled(width, width),
            *_doubled(width, width // 2),
            nn.Conv2d(width // 2, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.layers(z)
        if self.is_grey:
            images = images.repeat(1, 3, 1, 1)
        if self.pixels is not None:
            images = self.pixels(torch.sigmoid(2 * images - 1))
        return images


class CMIGenerator(nn.Module):
    """zju-vipa/CMI's: z (B, z_dim) -> images (B, 3, H, W) in [0, 1]. Its large one has a width of 128."""

    def __init__(self, z_dim: int = 256, image_size: int = 32, width: int = 64) -> None:
        super().__init__()
        self.side, self.channels = _first_side(image_size), 2 * width
        self.l1 = nn.Sequential(nn.Linear(z_dim, 2 * width * self.side**2))
        self.conv_blocks = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            *_doubled(2 * width, 2 * width, bias=False),
            *_doubled(2 * width, width, bias=False),
            nn.Conv2d(width, 3, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, z: Tensor) -> Tensor:
        images: Tensor = self.conv_blocks(self.l1(z).view(len(z), self.channels, self.side, self.side))
        return images


def _doubled(inputs: int, outputs: int, bias: bool = True) -> tuple[nn.Module, ...]:
    """A map of twice the side: convolution, norm and leaky ReLU."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
    return nn.Upsample(scale_factor=2), convolution, nn.BatchNorm2d(outputs), nn.LeakyReLU(_SLOPE, inplace=True)


def _first_side(image_size: int) -> int:
    """The side of the first map, which is doubled twice."""
    if image_size < 8 or image_size % 4:
        raise UserError(
            f"images of {image_size} px cannot be generated: the size must be a multiple of 4 of at least 8; "
            "prepare the teacher's data set at such a size"
        )
    return image_size // 4
