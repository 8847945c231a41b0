"""CTRL's trigger (Li et al., ICCV 2023): a magnitude on a few frequencies of the chrominance of each window.

    x' = clip(R A x + (R s) P / 255),  P(i, j) = m sum_p c_p(i) c_p(j),  c_p(i) = sqrt(2 / w) cos(pi (2 i + 1) p / 2 w)

A makes YUV of RGB and R, which is its inverse but for rounding, makes RGB of YUV; s is 1 for each channel that is
changed. This is the published transformation (YUV, orthonormal DCT of each window, back again) in closed form.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_defend.attacks.trigger import Trigger

CHANNELS = ("y", "u", "v")
_TO_YUV = ((0.299, 0.587, 0.114), (-0.147, -0.289, 0.436), (0.615, -0.515, -0.100))
_TO_RGB = ((1, 0, 1.14), (1, -0.396, -0.581), (1, 2.029, 0))


@dataclass(frozen=True)
class Spectral(Trigger):
    """clip(matrix x + pattern); matrix (3, 3), pattern (1, 3, H, W) in units of [0, 1]. uint8 images are rounded."""

    matrix: Tensor
    pattern: Tensor
    is_rounded = True

    def __call__(self, images: Tensor) -> Tensor:
        return (torch.einsum("rc,bchw->brhw", self.matrix, images) + self.pattern).clamp(0, 1)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "Spectral":
        return Spectral(self.matrix.to(device, dtype), self.pattern.to(device, dtype))

    @property
    def image_size(self) -> tuple[int, int]:
        return self.pattern.shape[2], self.pattern.shape[3]


def spectral(
    image_size: int, magnitude: float, positions: Sequence[int], channels: Sequence[str], window: int
) -> Spectral:
    """In float64. magnitude: of the coefficients (p, p) of each window, in grey levels; image_size: whole windows."""
    to_yuv, to_rgb = (torch.tensor(rows, dtype=torch.float64) for rows in (_TO_YUV, _TO_RGB))
    place = torch.arange(window, dtype=torch.float64)
    waves = [
        math.sqrt((2 if p else 1) / window) * torch.cos(math.pi * (2 * place + 1) * p / (2 * window)) for p in positions
    ]
    picture = magnitude * torch.stack([torch.outer(wave, wave) for wave in waves]).sum(0)
    count = image_size // window
    chosen = torch.tensor([float(name in channels) for name in CHANNELS], dtype=torch.float64)
    pattern = (to_rgb @ chosen).view(1, 3, 1, 1) * picture.repeat(count, count) / 255
    return Spectral(to_rgb @ to_yuv, pattern)
