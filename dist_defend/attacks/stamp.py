"""What every trigger offers, and the two triggers that add a pattern to the image."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

ROUNDING = 1e-3  # grey levels by which floating point may fall short of an integer


class Stamp(Protocol):
    """A trigger: images (B, 3, H, W) in [0, 1] -> the same shape, by batched tensor arithmetic."""

    def __call__(self, images: Tensor) -> Tensor: ...

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "Stamp":
        """The same trigger on another device or in another precision."""
        ...

    @property
    def image_size(self) -> tuple[int, int]:
        """H, W in pixels."""
        ...


@runtime_checkable
class CrossStamp(Stamp, Protocol):
    """A trigger whose training also needs images that carry a wrong trigger and keep their label."""

    def cross(self, images: Tensor, others: Tensor, rows: Tensor) -> Tensor:
        """images (B, 3, H, W), as many other images, and the images' data set rows (B,): they seed what is random."""
        ...


def grey_levels(images: Tensor) -> Tensor:
    """Images in [0, 1] as whole grey levels 0..255, truncated as a cast to uint8 truncates, in the images' dtype."""
    return (images * 255 + ROUNDING).floor().clamp(0, 255)


@dataclass(frozen=True)
class Additive:
    """clip(x + pattern); pattern (1, 3, H, W) in units of [0, 1], of either sign."""

    pattern: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        return (images + self.pattern).clamp(0, 1)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "Additive":
        return Additive(self.pattern.to(device, dtype))

    @property
    def image_size(self) -> tuple[int, int]:
        return self.pattern.shape[2], self.pattern.shape[3]


@dataclass(frozen=True)
class Wrapping:
    """(x + pattern) mod 256 in whole grey levels: what a cast to uint8 before the clip does to bright pixels."""

    pattern: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        return (grey_levels(images) + grey_levels(self.pattern)).remainder(256) / 255

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "Wrapping":
        return Wrapping(self.pattern.to(device, dtype))

    @property
    def image_size(self) -> tuple[int, int]:
        return self.pattern.shape[2], self.pattern.shape[3]
