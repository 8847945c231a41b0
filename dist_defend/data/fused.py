"""One compiled operation per view: uint8 pixels in, finished float32 view out, nothing between in main memory.

The same arithmetic as augment.py: Pillow's fixed-point bilinear resize (equal to the last bit), then float32 colour
(where the compiler may reorder sums, so within a small part of a grey level). Loops over pixels run over float32 or
integer planes that stay in the cache, without branches, and LLVM makes vector instructions of them. The kernels are
compiled once per machine and content (kernels.py), release the interpreter lock and start no threads.
"""

from collections.abc import Sequence

import numpy as np

from dist_defend.data.augment import (
    BLUR,
    BRIGHTNESS,
    FLIP,
    GRAYSCALE,
    HEIGHT,
    JITTER,
    LEFT,
    LUMA,
    NUM_PARAMETERS,
    ORDER,
    PRECISION,
    SIGMA,
    SOLARIZE,
    TOP,
    WIDTH,
    View,
)
from dist_defend.data.draws import BLUR_KERNEL, THRESHOLD, draw_one, pack
from dist_defend.data.kernels import kernel
from dist_defend.data.pixels import Pixels

_HALF = np.int32(1 << (PRECISION - 1))
_SHIFT = np.int32(PRECISION)
_LEVELS = (np.arange(256, dtype=np.float32) / np.float32(255)).astype(np.float32)  # uint8 -> [0, 1]
_0, _1, _2, _3, _4, _6 = (np.float32(n) for n in (0, 1, 2, 3, 4, 6))
_5 = np.float32(5)
_255, _HALF_LEVEL = np.float32(255), np.float32(0.5)
_RED, _GREEN, _BLUE = (np.float32(weight) for weight in LUMA)


@kernel(error_model="numpy")
def _taps(length: int, out: int, flip: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of ``out`` resized pixels: the first source pixel, how many there are, their weights in 1 / 2^22."""
    scale = length / out
    support = max(1.0, scale)
    first, count = np.zeros(out, np.int64), np.zeros(out, np.int64)
    weights = np.zeros((out, int(np.ceil(2 * support)) + 1), np.int32)  # one more, of weight 0, by rounding of centre
    for n in range(out):
        centre = (n + 0.5) * scale
        low = max(0, int(np.floor(centre - support + 0.5)))
        high = min(length, int(np.floor(centre + support + 0.5)))
        place = out - 1 - n if flip else n
        first[place], count[place] = low, high - low
        total = 0.0
        for position in range(low, high):
            total += max(0.0, 1.0 - abs((position - centre + 0.5) * (1.0 / support)))
        for position in range(low, high):
            weight = max(0.0, 1.0 - abs((position - centre + 0.5) * (1.0 / support)))
            weights[place, position - low] = np.int32(0.5 + weight / total * (1 << PRECISION))
    return first, count, weights


@kernel(error_model="numpy")
def _resize(
    memory: np.ndarray,
    start: int,
    stride: int,
    box_height: int,
    box_width: int,
    flip: bool,
    rows: np.ndarray,
    planes: np.ndarray,
    out_height: int,
    out_width: int,
) -> None:
    """Resize the box that starts at byte ``start`` of ``memory`` (rows of ``stride`` bytes) into the float planes.

    ``rows`` (3, box_height * out_width) uint8 holds the box after its first pass, over columns.
    """
    first, count, weights = _taps(box_width, out_width, flip)
    for y in range(box_height):
        line = start + y * stride
        for x in range(out_width):
            at = line + 3 * first[x]
            red, green, blue = _HALF, _HALF, _HALF
            for tap in range(count[x]):
                weight = weights[x, tap]
                red = np.int32(red + weight * np.int32(memory[at]))
                green = np.int32(green + weight * np.int32(memory[at + 1]))
                blue = np.int32(blue + weight * np.int32(memory[at + 2]))
                at += 3
            rows[0, y * out_width + x] = np.uint8(red >> _SHIFT)
            rows[1, y * out_width + x] = np.uint8(green >> _SHIFT)
            rows[2, y * out_width + x] = np.uint8(blue >> _SHIFT)
    first, count, weights = _taps(box_height, out_height, False)
    total = np.empty(out_width, np.int32)
    for channel in range(3):
        for y in range(out_height):
            total[:] = _HALF
            for tap in range(count[y]):
                weight = weights[y, tap]
                source = rows[channel, (first[y] + tap) * out_width : (first[y] + tap + 1) * out_width]
                for x in range(out_width):
                    total[x] = np.int32(total[x] + weight * np.int32(source[x]))
            target = planes[channel, y * out_width : (y + 1) * out_width]
            for x in range(out_width):
                target[x] = np.float32(np.int32(total[x] >> _SHIFT)) / _255


@kernel(error_model="numpy")
def _copy(
    memory: np.ndarray,
    start: int,
    height: int,
    width: int,
    top: int,
    left: int,
    flip: bool,
    planes: np.ndarray,
    out_height: int,
    out_width: int,
) -> None:
    """Copy a box that may reach over the image's borders, black there, into the float planes."""
    low, high = max(0, -left), min(out_width, width - left)  # columns of the box that lie in the image
    for y in range(out_height):
        target = planes[:, y * out_width : (y + 1) * out_width]
        target[:] = _0
        if 0 <= top + y < height:
            at = start + 3 * ((top + y) * width + left + low)
            place, step = (out_width - 1 - low, -1) if flip else (low, 1)
            for _ in range(low, high):
                target[0, place] = _LEVELS[memory[at]]
                target[1, place] = _LEVELS[memory[at + 1]]
                target[2, place] = _LEVELS[memory[at + 2]]
                at += 3
                place += step


@kernel(fastmath=True, inline="always")
def _clamp(value: np.float32) -> np.float32:
    return min(max(value, _0), _1)


@kernel(fastmath=True)
def _scale(plane: np.ndarray, factor: np.float32, offset: np.float32) -> None:
    for i in range(plane.size):
        plane[i] = _clamp(factor * plane[i] + offset)


@kernel(fastmath=True)
def _mean_grey(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> np.float32:
    total = _0
    for i in range(red.size):
        total += _RED * red[i] + _GREEN * green[i] + _BLUE * blue[i]
    return total / np.float32(red.size)


@kernel(fastmath=True)
def _saturate(red: np.ndarray, green: np.ndarray, blue: np.ndarray, factor: np.float32) -> None:
    """Blend with the pixel's grey; factor 0 is the grey image."""
    rest = _1 - factor
    for i in range(red.size):
        grey = rest * (_RED * red[i] + _GREEN * green[i] + _BLUE * blue[i])
        red[i], green[i], blue[i] = (
            _clamp(factor * red[i] + grey),
            _clamp(factor * green[i] + grey),
            _clamp(factor * blue[i] + grey),
        )


@kernel(fastmath=True, inline="always")
def _wrap(sixths: np.float32) -> np.float32:
    return sixths - _6 if sixths >= _6 else sixths


@kernel(fastmath=True, inline="always")
def _channel(value: np.float32, chroma: np.float32, k: np.float32) -> np.float32:
    return value - chroma * min(max(min(k, _4 - k), _0), _1)


@kernel(fastmath=True, error_model="numpy")
def _shift_hue(red: np.ndarray, green: np.ndarray, blue: np.ndarray, turns: np.float32) -> None:
    """As augment._shift_hue, hue in sixths of the circle."""
    shift = _6 * turns
    for i in range(red.size):
        r, g, b = red[i], green[i], blue[i]
        value = max(r, max(g, b))
        chroma = value - min(r, min(g, b))
        scale = _1 / (chroma if chroma > _0 else _1)
        hue = (g - b) * scale if value == r else (_2 + (b - r) * scale if value == g else _4 + (r - g) * scale)
        hue += shift
        hue = _wrap(hue + _6 if hue < _0 else hue)
        red[i] = _channel(value, chroma, _wrap(hue + _5))
        green[i] = _channel(value, chroma, _wrap(hue + _3))
        blue[i] = _channel(value, chroma, _wrap(hue + _1))


@kernel()
def _jitter(planes: np.ndarray, params: np.ndarray) -> None:
    red, green, blue = planes[0], planes[1], planes[2]
    for position in range(4):
        step = int(params[ORDER + position])
        factor = params[BRIGHTNESS + step]
        if step == 2:
            _saturate(red, green, blue, factor)
        elif step == 3:
            if factor != _0:
                _shift_hue(red, green, blue, factor)
        else:
            offset = (_1 - factor) * _mean_grey(red, green, blue) if step == 1 else _0
            for channel in range(3):
                _scale(planes[channel], factor, offset)


@kernel(error_model="numpy")
def _gaussian(radius: int, sigma: float) -> np.ndarray:
    """Weights (2 radius + 1,) that add up to 1."""
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    shares: np.ndarray = (weights / weights.sum()).astype(np.float32)
    return shares


@kernel(fastmath=True, inline="always")
def _add(total: np.ndarray, weight: np.float32, part: np.ndarray) -> None:
    for i in range(total.size):
        total[i] += weight * part[i]


@kernel()
def _blur(plane: np.ndarray, weights: np.ndarray, height: int, width: int) -> None:
    """Columns, then rows; mirrored at the border without the last pixel."""
    radius = weights.size // 2
    line, rows = np.empty(width + 2 * radius, np.float32), np.zeros((height, width), np.float32)
    for y in range(height):
        source = plane[y * width : (y + 1) * width]
        line[radius : radius + width] = source
        for x in range(radius):
            line[radius - 1 - x] = source[1 + x]
            line[radius + width + x] = source[width - 2 - x]
        for tap in range(weights.size):
            _add(rows[y], weights[tap], line[tap : tap + width])
    for y in range(height):
        target = plane[y * width : (y + 1) * width]
        target[:] = _0
        for tap in range(weights.size):
            place = abs(y + tap - radius)
            _add(target, weights[tap], rows[min(place, 2 * (height - 1) - place)])
        for x in range(width):
            target[x] = min(target[x], _1)


@kernel()
def _solarize(plane: np.ndarray, threshold: np.float32) -> None:
    for i in range(plane.size):
        plane[i] = _1 - plane[i] if plane[i] >= threshold else plane[i]


@kernel()
def _interleave(planes: np.ndarray, out: np.ndarray) -> None:
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(red.size):
        out[3 * i], out[3 * i + 1], out[3 * i + 2] = red[i], green[i], blue[i]


@kernel()
def _cut(
    memory: np.ndarray,
    address: int,
    height: int,
    width: int,
    params: np.ndarray,
    resamples: bool,
    scratch: np.ndarray,
    planes: np.ndarray,
    out_height: int,
    out_width: int,
) -> None:
    """The box that ``params`` name, resized and flipped, into the float planes."""
    top, left, flip = int(params[TOP]), int(params[LEFT]), params[FLIP] > 0
    if resamples:
        start = address + 3 * (top * width + left)
        box = int(params[HEIGHT]), int(params[WIDTH])
        _resize(memory, start, 3 * width, box[0], box[1], flip, scratch, planes, out_height, out_width)
    else:
        _copy(memory, address, height, width, top, left, flip, planes, out_height, out_width)


@kernel()
def _render(
    memory: np.ndarray,
    addresses: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    rows: np.ndarray,
    seed: int,
    epoch: int,
    view: int,
    packed: np.ndarray,
    out: np.ndarray,
) -> None:
    """One view of each row; out (B, S, S, 3) float32. Image i lies at byte addresses[i] of ``memory``."""
    out_height, out_width = out.shape[1], out.shape[2]
    params = np.empty(NUM_PARAMETERS, np.float32)
    planes = np.empty((3, out_height * out_width), np.float32)
    scratch = np.empty((3, heights.max() * out_width), np.uint8)
    resamples = packed[0] == 1 or (packed[0] == 0 and packed[1] > 0)
    for i in range(len(rows)):
        height, width = heights[i], widths[i]
        draw_one(seed, epoch, rows[i], view, packed, height, width, params)
        _cut(memory, addresses[i], height, width, params, resamples, scratch, planes, out_height, out_width)
        if params[JITTER] > 0:
            _jitter(planes, params)
        if params[GRAYSCALE] > 0:
            _saturate(planes[0], planes[1], planes[2], _0)
        if params[BLUR] > 0:
            weights = _gaussian(int(packed[BLUR_KERNEL] * out_height) // 2, params[SIGMA])
            for channel in range(3):
                _blur(planes[channel], weights, out_height, out_width)
        if params[SOLARIZE] > 0:
            for channel in range(3):
                _solarize(planes[channel], np.float32(packed[THRESHOLD]))
        _interleave(planes, out[i].reshape(-1))


@kernel()
def _crop(
    memory: np.ndarray,
    addresses: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    rows: np.ndarray,
    seed: int,
    epoch: int,
    view: int,
    packed: np.ndarray,
    out: np.ndarray,
) -> None:
    """As _render, up to the colours; out (B, S, S, 3) uint8."""
    out_height, out_width = out.shape[1], out.shape[2]
    params = np.empty(NUM_PARAMETERS, np.float32)
    planes = np.empty((3, out_height * out_width), np.float32)
    scratch = np.empty((3, heights.max() * out_width), np.uint8)
    resamples = packed[0] == 1 or (packed[0] == 0 and packed[1] > 0)
    for i in range(len(rows)):
        draw_one(seed, epoch, rows[i], view, packed, heights[i], widths[i], params)
        _cut(memory, addresses[i], heights[i], widths[i], params, resamples, scratch, planes, out_height, out_width)
        levels = out[i].reshape(-1)
        for channel in range(3):
            for n in range(planes.shape[1]):
                levels[3 * n + channel] = np.uint8(planes[channel, n] * _255 + _HALF_LEVEL)


def empty_views(views: Sequence[View], count: int, height: int, width: int) -> list[np.ndarray]:
    """Memory for the views of ``count`` images of height x width pixels: (B, S, S, 3) float32 each."""
    shapes = [view.image.shape[:2] if view.image is not None else (height, width) for view in views]
    outs = [view.augment.output_shape(*shape) for view, shape in zip(views, shapes, strict=True)]
    return [np.empty((count, *out, 3), np.float32) for out in outs]


def fill_views(
    outs: Sequence[np.ndarray], views: Sequence[View], pixels: Pixels, rows: np.ndarray, seed: int, epoch: int
) -> None:
    """Write the views of the data set rows ``rows`` (B,), whose images are ``pixels``, to ``outs`` (B, H, W, 3)."""
    for number, (out, view) in enumerate(zip(outs, views, strict=True)):
        source = pixels
        if view.image is not None:
            source = Pixels.of(view.image[None])[np.zeros(len(rows), np.int64)]
        _render(*_bytes_of(source), rows, seed, epoch, number, pack(view.augment), out)


def crops(view: View, pixels: Pixels, rows: np.ndarray, seed: int, epoch: int, number: int) -> np.ndarray:
    """The boxes of a loader's number-th view, resized and flipped, colours as they were: (B, S, S, 3) uint8.

    Of the data set rows ``rows`` (B,), whose images are ``pixels``, of any sizes; the view names its size.
    """
    size = view.augment.size
    assert size is not None
    out = np.empty((len(rows), size, size, 3), np.uint8)
    _crop(*_bytes_of(pixels), rows, seed, epoch, number, pack(view.augment), out)
    return out


def _bytes_of(pixels: Pixels) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Memory, addresses, heights and widths, for a kernel."""
    memory = pixels.memory.view()
    memory.flags.writeable = False  # so that one compiled version serves mapped files and arrays
    return memory, pixels.addresses, pixels.heights, pixels.widths
