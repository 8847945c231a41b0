"""Patterns from files: pictures, npy and npz. Nothing is unpickled, and sizes are checked before pixels are read."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from dist_defend.attacks.array_file import TooLarge, read_npy, read_npz
from dist_defend.data.pictures import FORMATS, open_picture
from dist_defend.errors import UserError
from dist_defend.files import open_regular, read_regular

log = logging.getLogger(__name__)

MAX_VALUES = 2**22  # of one pattern in an array
MAX_PIXELS = 2**24  # of a picture, before it is resized
_MAX_FILE = 1 << 28  # bytes of a picture
_KEYS = ("x", "t", "trigger", "pattern")  # of an npz; x is what RNP's trojan file holds
_WANTED = "a picture, or an npy or npz file of (H, W), (H, W, 3) or (3, H, W) numbers"


@dataclass(frozen=True)
class Pattern:
    """What a file shows, at its own size.

    levels: grey levels (H, W, 3), a picture's as uint8. opacity: 0..255 (H, W) uint8 of a picture that is transparent
    somewhere, else None. is_lossy: the colours went through JPEG or lossy WebP, so that black is not exactly black.
    """

    path: Path
    levels: np.ndarray
    opacity: np.ndarray | None = None
    is_picture: bool = False
    is_lossy: bool = False

    @property
    def alpha(self) -> np.ndarray | None:
        """Shares (H, W) float64 in [0, 1]."""
        return None if self.opacity is None else self.opacity / 255

    @property
    def size(self) -> tuple[int, int]:
        """H, W in pixels."""
        return self.levels.shape[0], self.levels.shape[1]

    def resized(self, height: int, width: int, how: Image.Resampling = Image.Resampling.BILINEAR) -> "Pattern":
        """A picture at another size, by Pillow; hidden colours have no weight. UserError for an array."""
        if self.size == (height, width):
            return self
        if not self.is_picture:
            raise UserError(
                f"pattern {self.path} is {shown_size(self.size)} px but {shown_size((height, width))} are wanted, and "
                "arrays are not resized: use one of that size"
            )
        layers = self.levels
        if self.opacity is not None:
            layers = np.concatenate([layers, self.opacity[..., None]], 2)
        pixels = np.asarray(Image.fromarray(layers).resize((width, height), how))
        opacity = None if self.opacity is None else pixels[..., 3]
        return replace(self, levels=pixels[..., :3], opacity=opacity)

    def on_black(self) -> np.ndarray:
        """Grey levels (H, W, 3) float64, transparent parts black."""
        levels = self.levels.astype(np.float64)
        return levels if self.alpha is None else levels * self.alpha[..., None]


def open_pattern(path: str | Path, lowest: float = 0) -> Pattern:
    """The pattern of a file, grey levels in lowest..255.

    Arrays: integers are grey levels; floats that stay within -1..1 are shares of 255. A leading axis of several
    patterns: the first is taken. A picture whose alpha is 255 everywhere counts as one without.
    UserError for a missing or damaged file, object arrays, values out of range.
    """
    path = Path(path)
    with _one_line(path):
        if path.suffix.lower() in (".npy", ".npz"):
            pattern = Pattern(path, _channels_last(_levels(_array(path))))
        else:
            pattern = _picture(path)
    levels = pattern.levels
    if levels.min() < lowest or levels.max() > 255:
        raise UserError(f"pattern {path} holds {levels.min():g} to {levels.max():g}; keep it in {lowest:g} to 255")
    return pattern


def read_pattern(path: str | Path, image_size: int, lowest: float = 0, is_resized: bool = False) -> np.ndarray:
    """Grey levels (H, W, 3) float64 of a pattern of the images' size, on which black and transparent mean nothing.

    is_resized: a picture of another size is resized instead of refused. UserErrors as open_pattern's; for another size;
    for a JPEG or lossy WebP without transparency, whose black is noise.
    """
    pattern = open_pattern(path, lowest)
    refuse_noise(pattern, "save it as PNG")
    if is_resized:
        pattern = pattern.resized(image_size, image_size)
    check_shape(pattern, (image_size, image_size), "the images are")
    return pattern.on_black()


def read_mask(
    path: str | Path, shape: int | tuple[int, int], of: str = "the images are", size: tuple[int, int] | None = None
) -> np.ndarray:
    """Shares in [0, 1]: 1 where the pattern replaces the pixel. shape: H, W, or both in one, of the file.

    Of a picture (H, W): the brightest channel, transparent parts 0. Of an array (H, W, 3), each channel for itself.
    size: H, W to which it is resized. UserErrors as read_pattern's; ``of``: what has that shape, for their text.
    """
    pattern = open_pattern(path)
    refuse_noise(pattern, "save the mask as PNG")
    check_shape(pattern, (shape, shape) if isinstance(shape, int) else shape, of)
    if size is not None:
        pattern = pattern.resized(*size)
    mask = pattern.on_black()
    if pattern.is_picture:
        mask = mask.max(2)
    return mask / 255 if mask.max() > 1 else mask


def check_shape(pattern: Pattern, shape: tuple[int, int], of: str, remedy: str = "use one of that size") -> None:
    """UserError unless the pattern has this height and width."""
    if pattern.size != shape:
        raise UserError(
            f"pattern {pattern.path} is {shown_size(pattern.size)} px but {of} {shown_size(shape)} px: {remedy}"
        )


def refuse_noise(pattern: Pattern, remedy: str) -> None:
    """UserError where black must mean nothing, but lossy compression has left noise in it."""
    if pattern.is_lossy and pattern.opacity is None:
        raise UserError(
            f"pattern {pattern.path} is a JPEG or a lossy WebP, whose compression leaves noise where it was black: "
            f"{remedy}"
        )


def shown_size(size: tuple[int, int]) -> str:
    """HxW."""
    return f"{size[0]}x{size[1]}"


def open_images(path: str | Path, count: int, image_size: int) -> np.ndarray:
    """An npy file (count, H, W, 3) uint8, mapped, not read: one image per row of the source. UserError if not so."""
    with _one_line(path):
        open_regular(path).close()  # np.load would wait for a pipe
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    wanted = (count, image_size, image_size, 3)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != wanted:
        raise UserError(f"{path} must be an npy file uint8 {wanted}, an image per row of the data set's source")
    return images


@contextlib.contextmanager
def _one_line(path: str | Path) -> Iterator[None]:
    """Whatever numpy, zipfile, zlib or pickle raises becomes one line."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"pattern {path} does not exist: it must be {_WANTED}") from None
    except _Unfit as error:
        raise UserError(f"pattern {path} {error}: it must be {_WANTED}") from None
    except TooLarge as error:
        raise UserError(f"pattern {path} holds {error} values, more than any trigger: it must be {_WANTED}") from None
    except UserError as error:
        raise UserError(f"pattern {error}") from error
    except OSError as error:
        raise UserError(f"pattern {path} cannot be read ({error.strerror}): it must be {_WANTED}") from error
    except Exception as error:
        raise UserError(f"pattern {path} is damaged or pickled: it must be {_WANTED}") from error


class _Unfit(Exception):
    """A file that can be read, but is no pattern."""


def _picture(path: Path) -> Pattern:
    content = read_regular(path, _MAX_FILE)
    _check_pixels(content)
    pixels, told = open_picture(content, str(path), keep_alpha=True)
    for line in told:
        log.info("pattern %s: %s", path, line)
    opacity = pixels[..., 3] if pixels.shape[2] == 4 and pixels[..., 3].min() < 255 else None
    return Pattern(path, pixels[..., :3], opacity, is_picture=True, is_lossy=_is_lossy(content))


def _check_pixels(content: bytes) -> None:
    """_Unfit for a picture of more than MAX_PIXELS; what is none is left to open_picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(content), formats=FORMATS)
    except Exception:
        return
    with picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise _Unfit(f"has {picture.width}x{picture.height} pixels, more than {MAX_PIXELS:,}")


def _is_lossy(content: bytes) -> bool:
    """Whether a file is a JPEG, or a WebP whose colours are in a 'VP8 ' chunk."""
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP":
        return content[:2] == b"\xff\xd8"
    place = 12
    while place + 8 <= len(content):
        name, length = content[place : place + 4], int.from_bytes(content[place + 4 : place + 8], "little")
        if name in (b"VP8 ", b"VP8L"):
            return name == b"VP8 "
        place += 8 + length + length % 2
    return False


def _array(path: Path) -> np.ndarray:
    if path.suffix.lower() == ".npy":
        return read_npy(path)
    found = read_npz(path, _KEYS)
    if not found:
        raise _Unfit(f"has none of the arrays {', '.join(_KEYS)}")
    return next(found[key] for key in _KEYS if key in found)


def _levels(array: np.ndarray) -> np.ndarray:
    """Grey levels float64 of the first pattern in the array; all of it says whether floats are shares."""
    if array.dtype.kind not in "biuf" or not array.size or not np.isfinite(array).all():
        raise _Unfit(f"is {array.dtype} {_shape(array)}, not finite numbers")
    is_share = array.dtype.kind == "b" or (array.dtype.kind == "f" and array.max() <= 1 and array.min() >= -1)
    first = array[0] if array.ndim == 4 else array
    if first.size > MAX_VALUES:
        raise _Unfit(f"holds {first.size} values, more than any trigger")
    levels = first.astype(np.float64)
    if is_share:
        levels *= 255
    return levels


def _shape(array: np.ndarray) -> str:
    return str(array.shape) if array.ndim <= 6 else f"of {array.ndim} dimensions"


def _channels_last(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, 2)
    if array.ndim == 3 and array.shape[-1] != 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] != 3:
        raise _Unfit(f"has the shape {_shape(array)}")
    return array
