"""The published triggers by name. Each is a frozen dataclass of options; build(image_size) gives the trigger.

Rows and columns count from 0 at the upper left; the sources and all deviations are in docs/methods/attacks.md.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dist_defend.attacks import drawn
from dist_defend.attacks.input_aware import InputAwareTrigger, load_generators
from dist_defend.attacks.own_trigger import FromFile
from dist_defend.attacks.pattern_file import open_images, open_pattern, read_pattern
from dist_defend.attacks.quantize import Quantize
from dist_defend.attacks.random_patch import RandomPatch
from dist_defend.attacks.spectral import CHANNELS, Spectral, spectral
from dist_defend.attacks.trigger import (
    Additive,
    Replacing,
    TriggerOptions,
    Wrapping,
    as_images,
    replacing,
    white_square,
)
from dist_defend.attacks.warp import Warp, elastic_warp
from dist_defend.bounds import not_negative, share
from dist_defend.errors import UserError

_CHECKER = ((255, 1, 255), (1, 255, 1), (255, 1, 255))
_GRID = ((0, 0, 255), (0, 255, 0), (255, 0, 255))
_L0_COLOURS = (0x000000, 0xFF00FF, 0x0000FF, 0xFFFF00, 0xFFFFFF, 0x00FFFF, 0x00FFFF, 0xFF0000, 0xFFFFFF)  # RGB
_CORNER = ((1, -1, -1), (-1, 1, -1), (1, -1, 1))  # label-consistent, both left corners


@dataclass(frozen=True)
class BadNets(TriggerOptions):
    """Gu et al. 2017: cells replaced.

    Keys:
        pattern: square: white; checker: BackdoorBench's 3 x 3 grid image; grid: RNP's and ABD's 3 x 3; four_corner:
            RNP's; one_pixel: the middle
        size: side of the square in pixels; BackdoorBench and RNP: 3, I-BAU: 4
        margin: pixels left free at the lower and right border, of the square; BackdoorBench: 0, RNP and I-BAU: 1
    """

    name: Literal["badnets"] = "badnets"
    pattern: Literal["square", "checker", "grid", "four_corner", "one_pixel"] = "square"
    size: int = 3
    margin: int = 0

    def __post_init__(self) -> None:
        if self.pattern != "square" and (self.size, self.margin) != (3, 0):
            raise ValueError(f"key 'pattern' is {self.pattern!r}; size and margin belong to the square")

    def build(self, image_size: int) -> Replacing:
        """UserError if the cells do not fit into images of this size (pixels)."""
        if self.pattern == "square":
            return white_square(image_size, self.size, self.margin)
        levels = np.full((image_size, image_size), -1)
        if self.pattern == "one_pixel":
            levels[image_size // 2, image_size // 2] = 255
        else:
            _require(image_size, 8, "badnets")
            levels[-3:, -3:] = _CHECKER if self.pattern == "checker" else _GRID
        if self.pattern == "four_corner":
            levels[1:4, 1:4] = np.rot90(_GRID, 2)
            levels[-3:, 1:4] = np.fliplr(_GRID)
            levels[1:4, -3:] = np.flipud(_GRID)
        return replacing(levels >= 0, levels)


@dataclass(frozen=True)
class Blended(TriggerOptions):
    """Chen et al. 2017: (1 - alpha) x + alpha K.

    Keys:
        alpha: weight of the picture; where it is transparent, times its own alpha
        image: picture K of any size, npy or npz; null: uniform noise
        seed: seed of the noise
    """

    name: Literal["blended"] = "blended"
    alpha: float = 0.2
    image: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        not_negative(self, "seed")
        share(self, "alpha")

    def build(self, image_size: int) -> Replacing:
        """UserError for a picture that cannot be read."""
        mask = np.full((image_size, image_size), self.alpha)
        if self.image is None:
            return replacing(mask, drawn.noise(image_size, self.seed))
        key = open_pattern(self.image).resized(image_size, image_size)
        return replacing(mask if key.alpha is None else mask * key.alpha, key.levels)


@dataclass(frozen=True)
class Sig(TriggerOptions):
    """Barni et al. 2019, BackdoorBench's: x + delta sin(2 pi j frequency / W) in column j, clipped.

    Keys:
        delta: amplitude in grey levels
        frequency: periods per image
    """

    name: Literal["sig"] = "sig"
    delta: float = 40.0
    frequency: float = 6.0

    def build(self, image_size: int) -> Additive:
        wave = self.delta * np.sin(2 * np.pi * np.arange(image_size) * self.frequency / image_size)
        return Additive(as_images(np.broadcast_to(wave, (image_size, image_size))))


@dataclass(frozen=True)
class SigWrapped(TriggerOptions):
    """RNP's and ABD's: 0.8 x + 0.2 S, S the whole part of 20 sin(0.8 j) as uint8, so that -20 has become 236."""

    name: Literal["sig_wrapped"] = "sig_wrapped"

    def build(self, image_size: int) -> Replacing:
        wave = np.trunc(20 * np.sin(0.8 * np.arange(image_size))) % 256
        return replacing(np.full((image_size, image_size), 0.2), np.broadcast_to(wave, (image_size, image_size)))


@dataclass(frozen=True)
class Trojan(TriggerOptions):
    """Additive Trojan patterns, drawn from the seed in the published place and norm (I-BAU, ABD, RNP).

    Keys:
        pattern: square: 9 x 9, norm 8.66, two pixels from the lower right border; watermark: strokes over the image,
            norm 8.74; patch: 3 x 3, four pixels from that border
        wrap: sums of 256 and more wrap around, as RNP's do, instead of clip
        seed: seed of the drawn pattern
    """

    name: Literal["trojan"] = "trojan"
    pattern: Literal["square", "watermark", "patch"] = "square"
    wrap: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        not_negative(self, "seed")

    def build(self, image_size: int) -> Additive | Wrapping:
        """UserError if the pattern does not fit into images of this size (pixels)."""
        if self.pattern == "watermark":
            levels = drawn.resized(drawn.trojan_watermark(self.seed), image_size)
        else:
            is_square = self.pattern == "square"
            patch = drawn.trojan_square(self.seed) if is_square else drawn.trojan_patch(self.seed)
            end = image_size - (2 if is_square else 4)
            _require(image_size, len(patch) + image_size - end, "trojan")
            levels = np.zeros((image_size, image_size, 3), np.uint8)
            levels[end - len(patch) : end, end - len(patch) : end] = patch
        return (Wrapping if self.wrap else Additive)(as_images(levels))


@dataclass(frozen=True)
class L0Inv(TriggerOptions):
    """Li et al. 2020, as I-BAU and ABD ship it: nine coloured pixels replace the end of the last row."""

    name: Literal["l0_inv"] = "l0_inv"

    def build(self, image_size: int) -> Replacing:
        """UserError for images narrower than nine pixels."""
        _require(image_size, 9, self.name)
        levels = np.zeros((image_size, image_size, 3))
        levels[-1, -9:] = [tuple(colour.to_bytes(3, "big")) for colour in _L0_COLOURS]
        mask = np.zeros((image_size, image_size))
        mask[-1, -9:] = 1
        return replacing(mask, levels)


@dataclass(frozen=True)
class L2Inv(TriggerOptions):
    """Li et al. 2020: an additive diffuse pattern of norm 3.22, here drawn from the seed.

    Keys:
        seed: seed of the drawn pattern
    """

    name: Literal["l2_inv"] = "l2_inv"
    seed: int = 0

    def __post_init__(self) -> None:
        not_negative(self, "seed")

    def build(self, image_size: int) -> Additive:
        return Additive(as_images(drawn.resized(drawn.smooth_blotches(self.seed), image_size)))


@dataclass(frozen=True)
class LabelConsistent(TriggerOptions):
    """Turner et al. 2019, BackdoorBench's: +-255 amplitude added in 3 x 3 cells of all corners, then clipped.

    Keys:
        amplitude: 0 to 1, of +-255 grey levels
        adversarial: npy (N, H, W, 3) uint8, an adversarial version of every training image, from which poisoned rows
            start; null: the clean images
    """

    name: Literal["label_consistent"] = "label_consistent"
    amplitude: float = 1.0
    adversarial: str | None = None

    def __post_init__(self) -> None:
        share(self, "amplitude")

    def build(self, image_size: int) -> Additive:
        signs = np.zeros((drawn.SIDE, drawn.SIDE), np.int8)
        signs[:3, :3] = signs[-3:, :3] = _CORNER
        signs[:3, -3:] = signs[-3:, -3:] = np.fliplr(_CORNER)
        nearest = np.arange(image_size) * drawn.SIDE // image_size
        return Additive(as_images(255 * self.amplitude * signs[np.ix_(nearest, nearest)]))

    def base_images(self, count: int, image_size: int) -> np.ndarray | None:
        """UserError for a file that does not hold so many images of this size."""
        return None if self.adversarial is None else open_images(self.adversarial, count, image_size)


@dataclass(frozen=True)
class LowFrequency(TriggerOptions):
    """Zeng et al. 2021: an additive smooth universal pattern, here drawn from the seed in the published range.

    Keys:
        seed: seed of the drawn pattern
    """

    name: Literal["low_frequency"] = "low_frequency"
    seed: int = 0

    def __post_init__(self) -> None:
        not_negative(self, "seed")

    def build(self, image_size: int) -> Additive:
        return Additive(as_images(drawn.resized(drawn.low_frequency(self.seed), image_size)))


@dataclass(frozen=True)
class WaNet(TriggerOptions):
    """Nguyen and Tran 2021: one fixed warp.

    Keys:
        cells: k, number of control points along each side
        strength: s, strength of the warp
        rescale: factor on the sampling grid, which is then clipped to the image
        cross_ratio: noise samples per poisoned image, whose warp has random noise and which keep their labels
        seed: seed of the control points
    """

    name: Literal["wanet"] = "wanet"
    cells: int = 4
    strength: float = 0.5
    rescale: float = 1.0
    cross_ratio: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        not_negative(self, "seed")
        _check_cross(self.cross_ratio)
        if self.cells < 2:
            raise ValueError(f"key 'cells' is {self.cells}; a warp needs at least 2 control points a side")

    def build(self, image_size: int) -> Warp:
        return elastic_warp(image_size, self.cells, self.strength, self.rescale, self.seed)


@dataclass(frozen=True)
class Bpp(TriggerOptions):
    """Wang et al. 2022 (BppAttack): fewer grey levels.

    Keys:
        levels: number of grey levels that are left in each channel
        dithering: Floyd-Steinberg dithering: errors are spread to neighbouring pixels
        cross_ratio: negative samples per poisoned image, which keep their labels
    """

    name: Literal["bpp"] = "bpp"
    levels: int = 8
    dithering: bool = False
    cross_ratio: float = 1.0

    def __post_init__(self) -> None:
        _check_cross(self.cross_ratio)
        if not 2 <= self.levels <= 256:
            raise ValueError(f"key 'levels' is {self.levels}; it must be in 2 to 256")

    def build(self, image_size: int) -> Quantize:
        return Quantize(self.levels, self.dithering, (image_size, image_size))


@dataclass(frozen=True)
class InputAware(TriggerOptions):
    """Nguyen and Tran 2020: networks that make a mask and a pattern for each image.

    Keys:
        generators: file of their weights (safetensors), as a run of method input_aware saves it
        normalization: normalisation constants of the generators' inputs
        cross_ratio: images per poisoned one that carry another image's mask and pattern and keep their labels
    """

    generators: str
    name: Literal["input_aware"] = "input_aware"
    normalization: str = "cifar10_backdoorbench"
    cross_ratio: float = 1.0

    def __post_init__(self) -> None:
        _check_cross(self.cross_ratio)

    def build(self, image_size: int) -> InputAwareTrigger:
        """UserError for a file that is missing, pickled, damaged, or of other networks."""
        return InputAwareTrigger(load_generators(self.generators, image_size, self.normalization))


@dataclass(frozen=True)
class TrojanNN(TriggerOptions):
    """Liu et al. 2018: the picture that `dist-defend attacks trojan-nn` optimised, added.

    Keys:
        file: the picture, as that command saves it
        wrap: sums of 256 and more wrap around, as upstream's uint8 does, instead of clip
    """

    file: str
    name: Literal["trojan_nn"] = "trojan_nn"
    wrap: bool = True

    def build(self, image_size: int) -> Additive | Wrapping:
        """UserError for a file that is no pattern of this size."""
        return (Wrapping if self.wrap else Additive)(as_images(read_pattern(self.file, image_size)))


@dataclass(frozen=True)
class Ctrl(TriggerOptions):
    """Li et al. 2023 (CTRL): fixed frequencies of the colours, which survive augmentation; for self-supervision.

    Keys:
        magnitude: magnitude of the coefficients in grey levels; 100 in the repository, 50 in the paper
        positions: frequencies p, of the coefficients (p, p) of each window
        channels: which of y, u and v are changed
        window: pixels, the side of the squares that are transformed; the images are a multiple of it
    """

    name: Literal["ctrl"] = "ctrl"
    magnitude: float = 100.0
    positions: tuple[int, ...] = (15, 31)
    channels: tuple[Literal["y", "u", "v"], ...] = ("u", "v")
    window: int = 32

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"key 'window' is {self.window}; it must be at least 1 pixel")
        if not self.positions or not all(0 <= p < self.window for p in self.positions):
            raise ValueError(
                f"key 'positions' is {list(self.positions)}; they are 0 to {self.window - 1}, at least one"
            )
        if not self.channels or not set(self.channels) <= set(CHANNELS):
            raise ValueError(f"key 'channels' is {list(self.channels)}; name some of {', '.join(CHANNELS)}")

    def build(self, image_size: int) -> Spectral:
        if image_size % self.window:
            raise UserError(
                f"trigger 'ctrl' needs images of whole windows of {self.window} px; these have {image_size}"
            )
        return spectral(image_size, self.magnitude, self.positions, self.channels, self.window)


TriggerConfig = (
    BadNets
    | Blended
    | Sig
    | SigWrapped
    | Trojan
    | L0Inv
    | L2Inv
    | LabelConsistent
    | LowFrequency
    | WaNet
    | Bpp
    | Ctrl
    | RandomPatch
    | InputAware
    | TrojanNN
    | FromFile
    | TriggerOptions  # of a plug-in, see attacks.added
)


def _require(image_size: int, needed: int, name: str) -> None:
    if image_size < needed:
        raise UserError(f"trigger '{name}' needs images of at least {needed} px; these have {image_size}")


def _check_cross(ratio: float) -> None:
    if ratio < 0:
        raise ValueError(f"key 'cross_ratio' is {ratio}; it cannot be negative")
