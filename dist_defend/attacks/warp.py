"""WaNet (Nguyen and Tran 2021): a smooth warp of the whole image as trigger."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Warp:
    """Samples the image at grid (1, H, W, 2), (x, y) from -1 to 1 between the corner pixels' centres, bilinear."""

    grid: Tensor
    seed: int

    def __call__(self, images: Tensor) -> Tensor:
        return _sample(images, self.grid)

    def cross(self, images: Tensor, others: Tensor, rows: Tensor) -> Tensor:
        """Noise mode: the warp plus U(-1, 1) / H in every pixel, drawn from (seed, row); ``others`` are not used."""
        height, width = self.image_size
        draws = [np.random.default_rng([self.seed, int(row)]).uniform(-1, 1, (height, width, 2)) for row in rows]
        noise = torch.from_numpy(np.stack(draws)).to(self.grid) / height
        return _sample(images, (self.grid + noise).clamp(-1, 1))

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "Warp":
        return Warp(self.grid.to(device, dtype), self.seed)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.grid.shape[1], self.grid.shape[2]


def elastic_warp(image_size: int, cells: int, strength: float, rescale: float, seed: int) -> Warp:
    """A fixed warp (WaNet, sec. 3.2): cells x cells control points U(-1, 1) over their mean magnitude, upsampled
    bicubically; strength / H of it is added to the identity, times ``rescale``, clipped to the image."""
    control = np.random.default_rng(seed).uniform(-1, 1, (1, 2, cells, cells))
    points = torch.from_numpy(control / np.abs(control).mean())
    size = (image_size, image_size)
    flow = functional.interpolate(points, size, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    line = torch.linspace(-1, 1, image_size, dtype=torch.float64)
    identity = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)[None]
    return Warp(((identity + strength * flow / image_size) * rescale).clamp(-1, 1).float(), seed)


def _sample(images: Tensor, grid: Tensor) -> Tensor:
    return functional.grid_sample(images, grid.expand(len(images), -1, -1, -1), align_corners=True)
