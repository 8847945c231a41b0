"""Image augmentation as batched torch operations on any device.

The list is SimCLR's as BadEncoder uses it (jinyuan-jia/BadEncoder, datasets/__init__.py): random resized crop, flip,
colour jitter, grey scale. Blur (Chen et al. 2020, appendix A) and solarisation (Grill et al. 2020, BYOL, appendix B)
come after these where a configuration has them. Random numbers come from draws.py. Geometry works on uint8 with the
fixed-point arithmetic of Pillow's bilinear resize and is equal to it to the last bit; colour works on float32 in [0, 1]
with the formulas of torchvision's transforms on float tensors, each step clamped.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_defend.keys import UNWRITTEN

# Columns of a parameter row. The four from ORDER on say which step of the jitter comes when:
# 0 brightness, 1 contrast, 2 saturation, 3 hue.
TOP, LEFT, HEIGHT, WIDTH, FLIP, JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAYSCALE = range(11)
BLUR, SIGMA, SOLARIZE, ORDER = range(11, 15)
NUM_PARAMETERS = ORDER + 4
PRECISION = 22  # bits of a resampling weight
LUMA = (0.2989, 0.587, 0.114)


@dataclass(frozen=True)
class BlurConfig:
    """Gaussian blur; defaults are Chen et al.'s for 224 px. Raises ValueError for values that mean nothing.

    Keys:
        probability: of an image to be blurred
        kernel: width of the kernel as a share of the view's height, rounded to an odd number of pixels as published
        sigma: lowest and highest standard deviation in pixels, drawn uniformly
    """

    probability: float = 0.5
    kernel: float = 0.1
    sigma: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        _check_probability(self, "probability")
        if not 0 < self.kernel <= 1:
            raise ValueError(f"key 'kernel' is {self.kernel}; it must be a share of the height, in (0, 1]")
        if len(self.sigma) != 2 or not 0 < self.sigma[0] <= self.sigma[1] < math.inf:
            raise ValueError(f"key 'sigma' is {self.sigma}; it must be two numbers of pixels, 0 < low <= high")

    def radius(self, height: int) -> int:
        """Pixels on each side of the kernel's middle, for views of this height; 0 blurs nothing."""
        return int(self.kernel * height) // 2


@dataclass(frozen=True)
class SolarizeConfig:
    """Solarisation: what is bright is inverted; defaults are BYOL's. Raises ValueError for values that mean nothing.

    Keys:
        probability: of an image to be solarised
        threshold: value in [0, 1] from which on x becomes 1 - x
    """

    probability: float = 0.2
    threshold: float = 128 / 255

    def __post_init__(self) -> None:
        _check_probability(self, "probability")
        _check_probability(self, "threshold", "a value of a pixel")


def _check_probability(config: object, key: str, what: str = "a probability") -> None:
    if not 0 <= getattr(config, key) <= 1:
        raise ValueError(f"key '{key}' is {getattr(config, key)}; {what} is in [0, 1]")


@dataclass(frozen=True)
class AugmentConfig:
    """How one view is made; raises ValueError for values that mean nothing.

    Keys:
        crop: none (a size then resizes the whole image), random_resized (a box of area share scale and aspect ratio),
            or pad (a box at a random place in the image with black pixels around)
        size: height and width of the view in pixels; null: the image's own
        scale: shares of the area, lowest and highest, of random_resized
        ratio: widths by heights, lowest and highest, of random_resized
        pad: black pixels on each side, of crop pad
        flip, jitter, grayscale: probability
        brightness, contrast, saturation: of the jitter: factors are uniform in 1 +- value
        hue: of the jitter: shift uniform in +- value, in turns of the colour circle
        blur: Gaussian blur after the colours; null: none
        solarize: inversion of bright pixels, last of all; null: none
    """

    crop: Literal["none", "random_resized", "pad"] = "none"
    size: int | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    pad: int = 4
    flip: float = 0.0
    jitter: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grayscale: float = 0.0
    blur: BlurConfig | None = field(default=None, metadata=UNWRITTEN)
    solarize: SolarizeConfig | None = field(default=None, metadata=UNWRITTEN)

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grayscale"):
            _check_probability(self, name)
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise ValueError(f"key '{name}' is {getattr(self, name)}; it cannot be negative")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"key 'hue' is {self.hue}; it must be in [0, 0.5]")
        if self.crop not in ("none", "random_resized", "pad"):
            raise ValueError(f"key 'crop' is {self.crop!r}; it must be none, random_resized or pad")
        if self.size is not None and self.size < 1:
            raise ValueError(f"key 'size' is {self.size}; it must be at least 1 pixel")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"key 'scale' is {self.scale}; it must be two shares of the area, 0 < low <= high <= 1")
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"key 'ratio' is {self.ratio}; it must be two aspect ratios, 0 < low <= high")
        if self.pad < 0:
            raise ValueError(f"key 'pad' is {self.pad}; it cannot be negative")

    def output_shape(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels of the view of an image of this height and width."""
        return (self.size, self.size) if self.size else (height, width)

    @property
    def resamples(self) -> bool:
        """Whether pixels are interpolated."""
        return self.crop == "random_resized" or (self.crop == "none" and self.size is not None)

    @property
    def recolours(self) -> bool:
        """Whether colours may change."""
        return self.jitter > 0 or self.grayscale > 0 or self.blur is not None or self.solarize is not None


IDENTITY = AugmentConfig()
REFERENCE = AugmentConfig(flip=0.5, jitter=0.8, grayscale=0.2)
SIMCLR = AugmentConfig(crop="random_resized", flip=0.5, jitter=0.8, grayscale=0.2)


@dataclass(frozen=True, eq=False)
class View:
    """One of the views in a batch. With ``image`` (H, W, 3) uint8 that constant is augmented instead of the sample,
    with the sample's own draws (BadEncoder's augmented reference). ValueError for an image of another kind."""

    augment: AugmentConfig = IDENTITY
    image: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.image is not None and (
            self.image.dtype != np.uint8 or self.image.ndim != 3 or self.image.shape[2] != 3
        ):
            raise ValueError(f"a constant image is {self.image.dtype} {self.image.shape}; it must be uint8 (H, W, 3)")


def apply_augment(images: Tensor, params: Tensor, config: AugmentConfig) -> Tensor:
    """Views (B, 3, S, S) float32 in [0, 1], channels_last, of uint8 images (B, H, W, 3).

    params: (B, NUM_PARAMETERS) float32 from draws.draw for this config, on the images' device.
    """
    out = config.output_shape(images.shape[1], images.shape[2])
    if config.resamples:
        images = _resized_crop(images, params, out)
    elif config.crop == "pad":
        images = _padded_crop(images, params, out)
    if config.flip > 0:
        images = torch.where(_column(params, FLIP) > 0, images.flip(2), images)
    return apply_colours(images, params, config)


def apply_colours(images: Tensor, params: Tensor, config: AugmentConfig) -> Tensor:
    """apply_augment's last part, of images (B, S, S, 3) uint8 that are cropped and flipped already."""
    x = images.permute(0, 3, 1, 2).float() / torch.full((), 255.0, device=images.device)  # a true division on CUDA too
    if config.jitter > 0:
        x = _jitter(x, params, config)
    if config.grayscale > 0:
        x = torch.where(_column(params, GRAYSCALE) > 0, _luma(x), x)
    if config.blur is not None:
        x = blurred(x, params, config.blur.radius(x.shape[2]))
    if config.solarize is not None:
        x = solarized(x, params, config.solarize.threshold)
    return x.contiguous(memory_format=torch.channels_last)


def crop_and_flip(images: Tensor, params: Tensor, config: AugmentConfig) -> Tensor:
    """Crops and flips of float images (B, 3, H, W), differentiable in them: (B, 3, S, S). Colours stay.

    params as for apply_augment, in the images' precision. Bilinear without widening, which is for enlarging; a padded
    crop is exact up to rounding, with black around.
    """
    height, width = images.shape[2:]
    out = config.output_shape(height, width)
    is_padded = config.crop == "pad"
    centres = []
    for start, length, size, source in ((TOP, HEIGHT, out[0], height), (LEFT, WIDTH, out[1], width)):
        first, extent = params[:, start, None], params[:, length, None]
        steps = (torch.arange(size, device=images.device, dtype=images.dtype) + 0.5) / size
        centre = first + steps * extent  # in pixels, where the first one has its centre at 0.5
        if not is_padded:  # no neighbours of the box
            centre = torch.minimum(torch.maximum(centre, first + 0.5), first + extent - 0.5)
        centres.append(2 * centre / source - 1)
    y, x = centres
    if config.flip > 0:
        x = torch.where(params[:, FLIP, None] > 0, x.flip(1), x)
    grid = torch.stack([x[:, None, :].expand(-1, out[0], -1), y[:, :, None].expand(-1, -1, out[1])], dim=3)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def blurred(x: Tensor, params: Tensor, radius: int) -> Tensor:
    """Those of the images x (B, 3, H, W) that params choose, through a Gaussian of 2 radius + 1 pixels.

    Columns, then rows; at the border the picture is mirrored without its last pixel, as torchvision does. Any
    precision, that of params (B, NUM_PARAMETERS).
    """
    steps = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    weights = torch.exp(-0.5 * (steps / params[:, SIGMA, None]) ** 2)
    weights = (weights / weights.sum(1, keepdim=True)).view(-1, 2 * radius + 1, 1, 1, 1)
    smooth = x
    for dim, pad in ((3, [radius, radius, 0, 0]), (2, [0, 0, radius, radius])):
        padded = F.pad(smooth, pad, mode="reflect")
        smooth = torch.zeros_like(x)
        for tap in range(2 * radius + 1):
            smooth = torch.addcmul(smooth, padded.narrow(dim, tap, x.shape[dim]), weights[:, tap])
    return torch.where(_column(params, BLUR) > 0, smooth.clamp(max=1), x)  # weights may add up to a bit more


def solarized(x: Tensor, params: Tensor, threshold: float) -> Tensor:
    """Those of the images x (B, 3, H, W) in [0, 1] that params choose, with 1 - x for x >= threshold."""
    return torch.where((_column(params, SOLARIZE) > 0) & (x >= threshold), 1 - x, x)


def _column(params: Tensor, column: int) -> Tensor:
    """(B, 1, 1, 1), ready to meet a batch of images."""
    return params[:, column].view(-1, 1, 1, 1)


def _padded_crop(images: Tensor, params: Tensor, out: tuple[int, int]) -> Tensor:
    batch, height, width, _ = images.shape
    y = params[:, TOP, None].long() + torch.arange(out[0], device=images.device)
    x = params[:, LEFT, None].long() + torch.arange(out[1], device=images.device)
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    rows = torch.arange(batch, device=images.device)[:, None, None]
    picked = images[rows, y.clamp(0, height - 1)[:, :, None], x.clamp(0, width - 1)[:, None, :]]
    return picked * inside[..., None]


def _resized_crop(images: Tensor, params: Tensor, out: tuple[int, int]) -> Tensor:
    """Crop, then resize to ``out``: columns first, uint8 in between.

    So does Pillow, except that from version 13 on it does rows first where they shrink much more than columns; that
    moves a pixel by at most one grey level.
    """
    images = _resample(images, 2, params[:, LEFT], params[:, WIDTH], out[1])
    return _resample(images, 1, params[:, TOP], params[:, HEIGHT], out[0])


def _resample(images: Tensor, dim: int, start: Tensor, length: Tensor, out: int) -> Tensor:
    """Bilinear resize along ``dim`` of the pixels start..start+length; shrinking widens the filter."""
    size = images.shape[dim]
    length = length.double()[:, None]
    scale = length / out
    support = scale.clamp(min=1.0)
    centre = (torch.arange(out, device=images.device) + 0.5) * scale
    first = (centre - support + 0.5).floor().clamp(min=0)
    last = torch.minimum((centre + support + 0.5).floor(), length)
    taps = torch.arange(2 * max(1, math.ceil(size / out)), device=images.device)  # an upper bound that needs no look
    position = first[..., None] + taps
    weight = (1 - ((position - centre[..., None] + 0.5) * (1 / support)[..., None]).abs()).clamp(min=0)
    weight = torch.where(position < last[..., None], weight, 0.0)
    total = weight.cumsum(-1)[..., -1:]  # summed left to right, as Pillow does
    fixed = (weight / total * (1 << PRECISION) + 0.5).to(torch.int32)  # (B, out, taps)
    position = (position + start.double()[:, None, None]).long().clamp(max=size - 1)
    view = [len(images), 1, 1, 1]
    view[dim] = out
    target = list(images.shape)
    target[dim] = out
    accumulator = torch.full(target, 1 << (PRECISION - 1), dtype=torch.int32, device=images.device)
    for tap in range(len(taps)):
        pixels = images.gather(dim, position[..., tap].view(view).expand(target))
        accumulator += pixels.int() * fixed[..., tap].view(view)
    return (accumulator >> PRECISION).to(torch.uint8)


def _luma(x: Tensor) -> Tensor:
    """Grey (B, 1, H, W) of float images, ITU-R 601 weights."""
    red, green, blue = x.unbind(1)
    return (red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]).unsqueeze(1)


def _jitter(x: Tensor, params: Tensor, config: AugmentConfig) -> Tensor:
    """Brightness, contrast, saturation and hue in each sample's own order.

    The first three are one blend, factor * x + (1 - factor) * base, with base black, the image's mean grey, or the
    pixel's grey. So every position of the order costs one blend and one hue for the whole batch, without a look at
    the parameters that would make the device wait.
    """
    on = _column(params, JITTER) > 0
    for position in range(4):
        step = _column(params, ORDER + position)
        factor = params.gather(1, BRIGHTNESS + step.long().view(-1, 1)).view(-1, 1, 1, 1)
        grey = _luma(x)
        base = torch.where(step == 1, grey.mean((2, 3), keepdim=True), torch.where(step == 2, grey, 0.0))
        changed = (factor * x + (1 - factor) * base).clamp(0, 1)
        changed = torch.where(step == 3, _shift_hue(x, factor) if config.hue > 0 else x, changed)
        x = torch.where(on, changed, x)
    return x


def _shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of float images (B, 3, H, W) by ``turns`` (B, 1, 1, 1) of the circle, through HSV."""
    low, value = x.aminmax(dim=1, keepdim=True)
    chroma = value - low
    red, green, blue = ((value - x) / torch.where(chroma > 0, chroma, 1.0)).split(1, dim=1)  # distance from the maximum
    is_red, is_green = value == x[:, :1], value == x[:, 1:2]
    sixth = torch.where(is_red, blue - green, torch.where(is_green, 2 + red - blue, 4 + green - red))
    sixth = (sixth / 6 + 1 + turns).remainder(1) * 6
    # A channel is value - chroma * max(0, min(k, 4 - k, 1)) with k = (n + 6h) mod 6; n = 5, 3, 1 for red, green, blue.
    ks = [(sixth + n).remainder(6) for n in (5, 3, 1)]
    return torch.cat([value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in ks], dim=1)
