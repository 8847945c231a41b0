"""Data without data: many patches of one photograph (Asano and Saeed 2023, The augmented image prior).

As yukimasano/single-img-extrapolating makes them: a square of half the photograph's shorter side, of it a random
resized crop with 1/500 to all of the area, rotated and sheared by up to 30 degrees, its middle, colour jitter for half
of the patches. Patch i is a function of i alone.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dist_defend.data.pictures import ENDINGS, Tally, open_picture
from dist_defend.data.reading import NotedSource
from dist_defend.data.walking import Walk
from dist_defend.errors import UserError

NUM_PATCHES = 50_000
SIDE = 64  # pixels of a patch, before --image-size
_TURN, _SHEAR = 30.0, 30.0  # degrees
_SMALLEST = 1 / 500  # share of the area
_RATIO = 4 / 3
_JITTERED = 0.5


class PatchSource(NotedSource):
    """NUM_PATCHES unlabelled patches (SIDE, SIDE, 3) uint8, taken from the photographs in turn."""

    def __init__(self, photographs: Sequence[Image.Image], notes: Sequence[str] = ()) -> None:
        super().__init__((), ("patch",), notes)
        self._photographs = photographs

    def __len__(self) -> int:
        return NUM_PATCHES

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        draw = np.random.default_rng(row)
        return np.asarray(_patch(self._photographs[row % len(self._photographs)], draw)), -1

    def name(self, row: int) -> str:
        return f"patch {row}"


def open_patches(path: str | None, split: str) -> PatchSource:
    """The patches of a photograph, of a folder's, or of scikit-learn's two; there is one split."""
    photographs, notes = open_photographs(path)
    return PatchSource(photographs, notes)


def open_photographs(path: str | None) -> tuple[list[Image.Image], list[str]]:
    """The picture, or the pictures of the folder in the order of their names, RGB; None: scikit-learn's two.

    Also what there is to tell. UserError for a path that is missing, and for files too small for a patch.
    """
    if path is None:
        from sklearn.datasets import load_sample_images

        return [Image.fromarray(image) for image in load_sample_images().images], []
    place, walk, tally = Path(path), Walk(), Tally()
    if not place.exists():
        raise UserError(f"{path}: no such file or folder; check --path")
    files = walk.look(place)[1] if place.is_dir() else [str(place)]
    if not files:
        raise UserError(f"{path}: no picture in this folder ({', '.join(ENDINGS)}); check --path")
    photographs = []
    for number, file in enumerate(files):
        pixels, told = open_picture(file)
        tally.add(number, told)
        height, width, _ = pixels.shape
        if min(height, width) < SIDE:
            raise UserError(f"{file}: {width}x{height} px; patches need at least {SIDE} px a side")
        photographs.append(Image.fromarray(pixels))
    return photographs, [*walk.notes(), *tally.lines()]


def _patch(photograph: Image.Image, draw: np.random.Generator) -> Image.Image:
    from torchvision.transforms import functional

    window = min(photograph.size) // 2
    left, top = (int(draw.integers(side - window + 1)) for side in photograph.size)
    width, height = _box(window, draw)
    left, top = left + int(draw.integers(window - width + 1)), top + int(draw.integers(window - height + 1))
    large = math.ceil(math.sqrt(2) * SIDE)  # so that the turned patch has corners
    patch: Image.Image = photograph.crop((left, top, left + width, top + height))
    patch = patch.resize((large, large), Image.Resampling.BICUBIC)
    turn, shear = draw.uniform(-_TURN, _TURN), draw.uniform(-_SHEAR, _SHEAR)
    patch = functional.affine(
        patch, turn, [0, 0], 1.0, [shear, 0.0], interpolation=functional.InterpolationMode.BILINEAR
    )
    patch = functional.center_crop(patch, [SIDE, SIDE])
    factors, hue = draw.uniform(0.6, 1.4, 3), draw.uniform(-0.1, 0.1)
    if draw.random() < _JITTERED:
        patch = functional.adjust_brightness(patch, factors[0])
        patch = functional.adjust_contrast(patch, factors[1])
        patch = functional.adjust_saturation(patch, factors[2])
        patch = functional.adjust_hue(patch, hue)
    return patch


def _box(window: int, draw: np.random.Generator) -> tuple[int, int]:
    """Width and height in pixels of a random part of the window."""
    while True:
        area = window**2 * draw.uniform(_SMALLEST, 1)
        ratio = math.exp(draw.uniform(-math.log(_RATIO), math.log(_RATIO)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= window and 0 < height <= window:
            return width, height
