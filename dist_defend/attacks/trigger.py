"""The interface of triggers, and the triggers that replace or add the pixels of one pattern."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dist_defend.errors import UserError

ROUNDING = 1e-3  # grey levels by which floating point may fall short of an integer


class Trigger(Protocol):
    """A trigger: images (B, 3, H, W) in [0, 1] -> the same shape, by batched tensor arithmetic."""

    def __call__(self, images: Tensor) -> Tensor: ...

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "Trigger":
        """The same trigger on another device or in another precision."""
        ...

    @property
    def image_size(self) -> tuple[int, int]:
        """H, W in pixels."""
        ...

    def cross(self, images: Tensor, others: Tensor, rows: Tensor) -> Tensor:
        """Cross samples: images (B, 3, H, W) with a wrong trigger, which keep their label in training.

        others: as many other images; rows (B,): the images' data set rows, which seed what is random. Only asked for
        by options with a cross_ratio above 0.
        """
        raise TypeError(f"{type(self).__name__} has no cross samples")


class TriggerOptions(ABC):
    """The interface of a trigger's options. Triggers with cross samples or base images override its defaults.

    Keys:
        name: name of the trigger
    """

    name: str
    cross_ratio: float = 0.0  # cross samples per poisoned image

    @abstractmethod
    def build(self, image_size: int) -> Trigger:
        """The trigger for square images of this side (pixels). UserError if it does not fit them."""

    def build_training(self, image_size: int) -> Trigger:
        """The trigger of training images, where it is another than that of test images. UserError likewise."""
        return self.build(image_size)

    def build_each(self, image_size: int) -> list[Trigger]:
        """All triggers, where a file holds several: one for each reference of BadEncoder."""
        return [self.build(image_size)]

    def base_images(self, count: int, image_size: int) -> np.ndarray | None:
        """(count, H, W, 3) uint8 by row of the source: what poisoned rows start from instead of the clean images."""
        return None


def grey_levels(images: Tensor) -> Tensor:
    """Images in [0, 1] as whole grey levels 0..255, truncated as a cast to uint8 truncates, in the images' dtype."""
    return (images * 255 + ROUNDING).floor().clamp(0, 255)


def blend(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """x (1 - mask) + pattern mask, of shapes that broadcast."""
    return images * (1 - mask) + pattern * mask


@dataclass(frozen=True)
class Replacing(Trigger):
    """x (1 - mask) + pattern mask; mask (1, 1 or 3, H, W) and pattern (1, 3, H, W) in [0, 1], mask 1 replaces."""

    mask: Tensor
    pattern: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        return blend(images, self.mask, self.pattern)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "Replacing":
        return Replacing(self.mask.to(device, dtype), self.pattern.to(device, dtype))

    @property
    def image_size(self) -> tuple[int, int]:
        return self.mask.shape[2], self.mask.shape[3]


@dataclass(frozen=True)
class Additive(Trigger):
    """clip(x + pattern); pattern (1, 3, H, W) in units of [0, 1], of either sign."""

    pattern: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        return (images + self.pattern).clamp(0, 1)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "Additive":
        return type(self)(self.pattern.to(device, dtype))

    @property
    def image_size(self) -> tuple[int, int]:
        return self.pattern.shape[2], self.pattern.shape[3]


class Wrapping(Additive):
    """(x + pattern) mod 256 in whole grey levels: what a cast to uint8 before the clip does to bright pixels."""

    def __call__(self, images: Tensor) -> Tensor:
        return (grey_levels(images) + grey_levels(self.pattern)).remainder(256) / 255


def as_images(levels: np.ndarray) -> Tensor:
    """Grey levels (H, W) or (H, W, 1 or 3) -> (1, 3, H, W) float32 in units of [0, 1]."""
    channels = np.broadcast_to(levels[..., None] if levels.ndim == 2 else levels, (*levels.shape[:2], 3))
    return torch.tensor(channels.transpose(2, 0, 1)[None] / 255, dtype=torch.float32)


def replacing(mask: np.ndarray, levels: np.ndarray) -> Replacing:
    """mask in [0, 1] and grey levels, each (H, W) or (H, W, 3); grey levels outside of the mask do not matter.

    The trigger's mask is (1, 1, H, W) for a mask (H, W): per pixel.
    """
    shares = as_images(255.0 * mask)
    return Replacing(shares if mask.ndim == 3 else shares[:, :1].contiguous(), as_images(np.maximum(levels, 0)))


def white_square(image_size: int, size: int, margin: int = 1) -> Replacing:
    """A white size x size square, `margin` pixels from the bottom and right edges. UserError if it does not fit."""
    end = image_size - margin
    if size < 1 or margin < 0 or end < size:
        raise UserError(f"a {size} px square with a margin of {margin} px does not fit into {image_size} px images")
    mask = torch.zeros(1, 1, image_size, image_size)
    mask[:, :, end - size : end, end - size : end] = 1
    return Replacing(mask, mask.expand(1, 3, -1, -1).clone())
