"""SSLBKD's trigger (Saha et al., CVPR 2022): a small picture, at another place in each image.

The column of its upper left pixel is uniform on floor(a W), ..., floor(b W - w) and the row on floor(a H), ...,
floor(b H - h), for images of W x H and a patch of w x h pixels. Training and test images have each their a and b.
"""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dist_defend.attacks.drawn import coloured_cells
from dist_defend.attacks.pattern_file import Pattern, open_pattern, shown_size
from dist_defend.attacks.trigger import Replacing, Trigger, TriggerOptions, as_images
from dist_defend.bounds import at_least_one, not_negative, positive, share
from dist_defend.errors import UserError
from dist_defend.ops.hashing import mixed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlacedPatch(Trigger):
    """patch (1, 3, h, w) in [0, 1]; opacity (1, 1, h, w), its share of a pixel.

    shape: H, W of the images. columns, rows: the first and the last one that its upper left pixel can have. The place
    is a function of the seed and of the image's row in its data set. jpeg: quality of the stored images' compression.
    """

    patch: Tensor
    opacity: Tensor
    shape: tuple[int, int]
    columns: tuple[int, int]
    rows: tuple[int, int]
    seed: int
    jpeg: int | None = None
    is_rounded = True

    def __call__(self, images: Tensor) -> Tensor:
        """Stamp the images as those of the rows 0, 1, ... of a data set."""
        return self.at(torch.arange(len(images), device=images.device))(images)

    def at(self, rows: Tensor) -> Replacing:
        """The trigger of the images in these rows (B,) of their data set. The column is drawn before the row."""
        drawn = mixed(rows + mixed(torch.full_like(rows, self.seed)))
        places = []
        for first, last in (self.columns, self.rows):
            places.append(first + (drawn >> 1 & 2**62 - 1) % (last - first + 1))
            drawn = mixed(drawn)
        return self.pasted(*places)

    def pasted(self, columns: Tensor, rows: Tensor) -> Replacing:
        """With the upper left pixels there, each (B,) int64; what sticks out of the image is cut."""
        (height, width), (h, w) = self.shape, self.patch.shape[2:]
        down = torch.arange(height, device=rows.device) - rows[:, None]  # (B, H), the patch's row
        right = torch.arange(width, device=rows.device) - columns[:, None]  # (B, W), its column
        is_inside = ((down >= 0) & (down < h))[:, None, :, None] & ((right >= 0) & (right < w))[:, None, None, :]
        cells = down.clamp(0, h - 1)[:, :, None], right.clamp(0, w - 1)[:, None, :]
        opacity, patch = (part[0][:, cells[0], cells[1]].transpose(0, 1) for part in (self.opacity, self.patch))
        return Replacing(opacity * is_inside, patch)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "PlacedPatch":
        patch, opacity = self.patch.to(device, dtype), self.opacity.to(device, dtype)
        return PlacedPatch(patch, opacity, self.shape, self.columns, self.rows, self.seed, self.jpeg)

    @property
    def image_size(self) -> tuple[int, int]:
        return self.shape


@dataclass(frozen=True)
class RandomPatch(TriggerOptions):
    """Saha et al. 2022 (SSLBKD): a small picture at a random place of each image; for self-supervised training.

    Keys:
        file: the picture; null: 5 x 5 colours, drawn from the seed
        size: width in pixels to which it is resized (Pillow, bicubic); published 50 of 224, others take 8 of 32
        opacity: share of the patch in its pixels, in whole 255ths; 1 replaces them
        train: range [a, b] of the patch in a training image, as shares of its side
        test: the same for test images and BadEncoder's shadow images
        jpeg: quality of the JPEG that stamped images go through, published 75; null: none. Only images that are stored
            or loaded as bytes do, so not those that BadEncoder stamps
        seed: seed of the places and of the drawn colours
    """

    file: str | None = None
    name: Literal["random_patch"] = "random_patch"
    size: int = 50
    opacity: float = 1.0
    train: tuple[float, float] = (0.25, 0.75)
    test: tuple[float, float] = (0.1, 0.9)
    jpeg: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        at_least_one(self, "size", "jpeg")
        share(self, "opacity")
        positive(self, "opacity")
        not_negative(self, "seed")
        for key in ("train", "test"):
            span = getattr(self, key)
            if len(span) != 2 or not 0 <= span[0] <= span[1] <= 1:
                raise ValueError(f"key '{key}' is {list(span)}; it must be two shares of the side, 0 <= a <= b <= 1")
        if self.jpeg is not None and self.jpeg > 100:
            raise ValueError(f"key 'jpeg' is {self.jpeg}; a quality is 1 to 100")
        if self.seed >= 2**63:
            raise ValueError(f"key 'seed' is {self.seed}; it must be below 2**63")

    def build(self, image_size: int) -> PlacedPatch:
        """Of test images. UserError for a file that is no picture, and for a patch larger than the images."""
        return self.placed((image_size, image_size), self.test)

    def build_training(self, image_size: int) -> PlacedPatch:
        return self.placed((image_size, image_size), self.train)

    def placed(self, shape: tuple[int, int], span: tuple[float, float]) -> PlacedPatch:
        """The trigger for images of H x W pixels, within these shares of their sides."""
        pattern = self._picture()
        size = max(1, pattern.size[0] * self.size // pattern.size[1]), self.size
        sides = list(zip(shape, size, strict=True))
        if any(patch > side for side, patch in sides):
            raise UserError(
                f"trigger 'random_patch' is {shown_size(size)} px but the images are {shown_size(shape)} px: make it "
                "smaller with key 'size'"
            )
        pattern = pattern.resized(*size, Image.Resampling.BICUBIC)
        rows, columns = (place_range(*side, span) for side in sides)
        if any(last + patch > side for (side, patch), (_, last) in zip(sides, (rows, columns), strict=True)):
            log.info("trigger 'random_patch': there is one place alone, where the patch sticks out and is cut")
        shares = np.full(size, 255 - math.floor(255 * (1 - self.opacity)), np.float64)
        if pattern.alpha is not None:
            shares = shares * pattern.alpha
        return PlacedPatch(
            as_images(pattern.levels), as_images(shares)[:, :1], shape, columns, rows, self.seed, self.jpeg
        )

    def _picture(self) -> Pattern:
        if self.file is not None:
            return open_pattern(self.file)
        return Pattern(Path("drawn"), coloured_cells(self.seed), is_picture=True)


def place_range(side: int, patch: int, span: tuple[float, float]) -> tuple[int, int]:
    """First and last place of a patch along a side, in pixels, both included; one alone where the span is too short."""
    first = math.floor(span[0] * side)
    return first, max(first, math.floor(span[1] * side - patch))
