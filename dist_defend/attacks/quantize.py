"""BPP (Wang, Zhai and Ma 2022): fewer grey levels as trigger, with or without dithering."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Quantize:
    """round(x (levels - 1)) / (levels - 1); dithered: Floyd and Steinberg's error diffusion, row by row."""

    levels: int
    is_dithered: bool
    image_size: tuple[int, int]

    def __call__(self, images: Tensor) -> Tensor:
        if self.is_dithered:
            return _dithered(images, self.levels - 1)
        return (images * (self.levels - 1)).round() / (self.levels - 1)

    def cross(self, images: Tensor, others: Tensor, rows: Tensor) -> Tensor:
        """Negative samples: the image plus what the trigger changes in another one, clipped."""
        return (images + self(others) - others).clamp(0, 1)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "Quantize":
        return self


def _dithered(images: Tensor, steps: int) -> Tensor:
    """7/16 of a pixel's error goes right, 3/16, 5/16 and 1/16 down left, down and down right.

    Pixels with the same column + 2 row do not influence each other, so such a diagonal is done at once.
    """
    _, _, height, width = images.shape
    x = torch.nn.functional.pad(images, (1, 1, 0, 1))  # takes the errors that fall off
    for diagonal in range(width + 2 * height - 2):
        row = torch.arange(max(0, (diagonal - width + 2) // 2), min(height, diagonal // 2 + 1), device=x.device)
        column = diagonal - 2 * row + 1
        old = x[:, :, row, column]
        new = (old * steps).round() / steps
        error = old - new
        x[:, :, row, column] = new
        x[:, :, row + 1, column - 1] += error * (3 / 16)
        x[:, :, row + 1, column] += error * (5 / 16)
        x[:, :, row + 1, column + 1] += error * (1 / 16)
        x[:, :, row, column + 1] += error * (7 / 16)
    return x[:, :, :height, 1 : width + 1].clamp(0, 1)
