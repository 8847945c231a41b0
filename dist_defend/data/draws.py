"""The one source of random augmentation parameters, for every back end.

Counter based: a draw is a hash of (seed, epoch, data set row, view number, slot). It does not depend on the thread, the
rank, the batch or on which other draws were made, so two ranks see what one rank sees and a resumed epoch goes on as it
would have. The sampling rules are those of torchvision's RandomResizedCrop, RandomCrop(padding), RandomHorizontalFlip,
ColorJitter, RandomGrayscale, RandomApply(GaussianBlur) and RandomSolarize.
"""

import itertools
import math
from dataclasses import astuple

import numpy as np

from dist_defend.data.augment import (
    BLUR,
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GRAYSCALE,
    HEIGHT,
    HUE,
    JITTER,
    LEFT,
    NUM_PARAMETERS,
    ORDER,
    SATURATION,
    SIGMA,
    SOLARIZE,
    TOP,
    WIDTH,
    AugmentConfig,
)
from dist_defend.data.kernels import kernel

_ORDERS = np.array(list(itertools.permutations(range(4))), np.float32)  # (24, 4), of the jitter's steps
CROPS = ("none", "random_resized", "pad")
_TRIES = 10  # of a random resized crop, before it falls back to a central one
# One slot per number drawn: four per try of the crop first, so that no option shifts another one's draws.
_FLIP, _JITTER, _ORDER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GRAYSCALE = range(4 * _TRIES, 4 * _TRIES + 8)
_BLUR, _SIGMA, _SOLARIZE = range(4 * _TRIES + 8, 4 * _TRIES + 11)
BLUR_KERNEL, THRESHOLD = 15, 19  # places in a packed configuration
_NO_BLUR, _NO_SOLARIZE = (0.0, 0.0, (1.0, 1.0)), (0.0, 1.0)


def pack(config: AugmentConfig) -> np.ndarray:
    """The configuration as the float64 vector that compiled code reads: its keys' values in their order."""
    crop, size, scale, ratio, *others, blur, solarize = astuple(config)
    values = CROPS.index(crop), size or 0, scale, ratio, others, *(blur or _NO_BLUR), solarize or _NO_SOLARIZE
    return np.hstack(values).astype(np.float64)


@kernel()
def _mix(value: np.uint64) -> np.uint64:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@kernel()
def _key(seed: int, epoch: int, index: int, view: int) -> np.uint64:
    key = np.uint64(0)
    for part in (seed, epoch, index, view):
        key = _mix((key ^ np.uint64(part)) + np.uint64(0x9E3779B97F4A7C15))
    return key


@kernel()
def _uniform(key: np.uint64, slot: int, low: float, high: float) -> float:
    bits = _mix(key + np.uint64(slot + 1) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11)
    return low + (high - low) * (np.float64(bits) * 2.0**-53)


@kernel()
def _randint(key: np.uint64, slot: int, count: int) -> int:
    return int(_uniform(key, slot, 0.0, float(count)))


@kernel()
def _resized_crop(key: np.uint64, packed: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a crop of random area and aspect ratio."""
    scale_low, scale_high, ratio_low, ratio_high = packed[2], packed[3], packed[4], packed[5]
    for attempt in range(_TRIES):
        area = height * width * _uniform(key, 4 * attempt, scale_low, scale_high)
        ratio = math.exp(_uniform(key, 4 * attempt + 1, math.log(ratio_low), math.log(ratio_high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return _randint(key, 4 * attempt + 2, height - h + 1), _randint(key, 4 * attempt + 3, width - w + 1), h, w
    w, h = width, height
    if width < ratio_low * height:
        h = round(width / ratio_low)
    elif width > ratio_high * height:
        w = round(height * ratio_high)
    return (height - h) // 2, (width - w) // 2, h, w


@kernel()
def draw_one(
    seed: int, epoch: int, index: int, view: int, packed: np.ndarray, height: int, width: int, out: np.ndarray
) -> None:
    """Fill ``out`` (NUM_PARAMETERS,) with the parameters of one view of one image of height x width pixels."""
    key = _key(seed, epoch, index, view)
    crop, size, pad = int(packed[0]), int(packed[1]), int(packed[6])
    top, left, h, w = 0, 0, height, width
    if crop == 1:
        top, left, h, w = _resized_crop(key, packed, height, width)
    elif crop == 2:
        if size > 0:
            h, w = size, size
        top = _randint(key, 0, height + 2 * pad - h + 1) - pad
        left = _randint(key, 1, width + 2 * pad - w + 1) - pad
    out[TOP], out[LEFT], out[HEIGHT], out[WIDTH] = top, left, h, w
    out[FLIP] = _uniform(key, _FLIP, 0.0, 1.0) < packed[7]
    out[JITTER] = _uniform(key, _JITTER, 0.0, 1.0) < packed[8]
    out[ORDER:] = _ORDERS[_randint(key, _ORDER, 24)]
    out[BRIGHTNESS] = _uniform(key, _BRIGHTNESS, max(0.0, 1.0 - packed[9]), 1.0 + packed[9])
    out[CONTRAST] = _uniform(key, _CONTRAST, max(0.0, 1.0 - packed[10]), 1.0 + packed[10])
    out[SATURATION] = _uniform(key, _SATURATION, max(0.0, 1.0 - packed[11]), 1.0 + packed[11])
    out[HUE] = _uniform(key, _HUE, -packed[12], packed[12])
    out[GRAYSCALE] = _uniform(key, _GRAYSCALE, 0.0, 1.0) < packed[13]
    out[BLUR] = _uniform(key, _BLUR, 0.0, 1.0) < packed[14]
    out[SIGMA] = _uniform(key, _SIGMA, packed[16], packed[17])
    out[SOLARIZE] = _uniform(key, _SOLARIZE, 0.0, 1.0) < packed[18]


@kernel()
def _draw_many(
    seed: int,
    epoch: int,
    index: np.ndarray,
    view: int,
    packed: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    out: np.ndarray,
) -> None:
    for i in range(len(index)):
        draw_one(seed, epoch, index[i], view, packed, heights[i], widths[i], out[i])


def draw(
    seed: int,
    epoch: int,
    index: np.ndarray,
    view: int,
    config: AugmentConfig,
    height: int | np.ndarray,
    width: int | np.ndarray,
) -> np.ndarray:
    """Parameters (B, NUM_PARAMETERS) float32 of view number ``view`` of the rows ``index`` (B,).

    ``height`` and ``width`` are those of the source images in pixels, one number or (B,). The columns are named in
    augment.py; crop boxes are in pixels and may start outside of the image for a padded crop.
    """
    index = np.ascontiguousarray(index, np.int64)
    heights, widths = (np.full(len(index), n, np.int64) for n in (height, width))
    out = np.empty((len(index), NUM_PARAMETERS), np.float32)
    _draw_many(seed, epoch, index, view, pack(config), heights, widths, out)
    return out
