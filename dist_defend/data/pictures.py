"""Open a picture file as 8-bit RGB, and tell what was done to its pixels.

Only six formats are tried, by content and not by the file's ending: other readers of Pillow start programs.
"""

import contextlib
import io
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from dist_defend.errors import UserError
from dist_defend.files import read_regular
from dist_defend.screen import printable

FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP", "TIFF")
ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".ppm", ".pgm", ".pbm", ".webp", ".tif", ".tiff")
MAX_PIXELS = 100_000_000  # of one picture
FREE_PIXELS = 10_000_000  # of a file of any size; beyond, a file must have a byte for so many pixels:
PIXELS_PER_BYTE = 8
_MOST_BYTES = 1 << 30  # of a file
_STRIP = 1 << 18  # pixels whose levels are brought to 8 bits at once
BACKGROUND = 255  # what transparent pixels lie on: white

SIXTEEN_BIT = "16-bit pictures scaled to 8 bits"
FLOAT = "float pictures in 0..1 scaled to 8 bits"
UPRIGHT = "pictures turned as their EXIF orientation says"
TRANSPARENT = "pictures with transparent pixels, laid on white"
FRAMES = "pictures of several frames, of which the first is taken"
BAD_EXIF = "pictures whose EXIF data cannot be read, taken as they lie"

_RANGE_16, _RANGE_12 = 65535, 4095
_EXIF = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # what Pillow looks for an orientation in
_header = threading.Lock()  # Python's warning filters belong to the process, not to a thread


def is_picture(name: str) -> bool:
    """Whether a file's name ends as a picture's does, in any case."""
    return name.lower().endswith(ENDINGS)


def picture_bytes(path: str | Path) -> bytes:
    """A picture's file. UserError for what is no regular file or too large, OSError for what is not there."""
    return read_regular(path, _MOST_BYTES)


def open_picture(
    place: str | Path | bytes, name: str | None = None, *, keep_alpha: bool = False
) -> tuple[np.ndarray, tuple[str, ...]]:
    """A picture (H, W, 3) uint8 and what was done to it, as lines that can be counted.

    place: a file, or its content. 16-bit levels become v * 255 / 65535, float levels v * 255; the EXIF orientation is
    applied; transparent pixels are laid on white; CMYK is converted as Pillow does. With ``keep_alpha`` a picture that
    has alpha stays (H, W, 4), not laid on anything. UserError, opening with ``name`` (default: the path), for a file
    that cannot be read whole, is no regular file, has another format or more than MAX_PIXELS, swells to far more
    pixels than it has bytes for, or has levels whose range is not known.
    """
    name = printable(name or ("picture" if isinstance(place, bytes) else str(place)))
    try:
        data = place if isinstance(place, bytes) else picture_bytes(place)
        with _quiet():
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
        with picture:
            size, num_pixels = f"{picture.width}x{picture.height}", picture.width * picture.height
            if num_pixels > MAX_PIXELS:
                raise UserError(f"{name}: {size} px, more than {MAX_PIXELS:,} pixels; shrink it")
            if num_pixels > FREE_PIXELS + PIXELS_PER_BYTE * len(data):
                raise UserError(f"{name}: {size} px in only {len(data):,} bytes; shrink it, or save it unpacked")
            pixels, told = _pixels(picture, keep_alpha)
            return pixels, tuple(told)
    except UserError:
        raise
    except _UnknownRange as error:
        raise UserError(f"{name}: {error}; save it with 8 or 16 bits") from None
    except UnidentifiedImageError:
        raise UserError(f"{name}: not a picture that can be read (none of {', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        reason = getattr(error, "strerror", None) or printable(" ".join(str(error).split()), 200)
        raise UserError(f"{name}: not a picture that can be read ({type(error).__name__}: {reason})") from error


class Tally:
    """Counts what was told of rows; may be added to by several threads."""

    def __init__(self) -> None:
        self._lock, self._rows = threading.Lock(), dict[str, set[int]]()

    def add(self, row: int, told: Sequence[str]) -> None:
        """A row that is read twice counts once."""
        with self._lock:
            for line in told:
                self._rows.setdefault(line, set()).add(row)

    def lines(self) -> list[str]:
        with self._lock:
            return [f"{line}: {len(rows)}" for line, rows in sorted(self._rows.items())]


class _UnknownRange(Exception):
    """Levels that cannot be brought to 8 bits without a guess."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings of sizes, which are looked at here, and of EXIF data; for what is quickly done."""
    with _header, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _pixels(picture: Image.Image, keep_alpha: bool) -> tuple[np.ndarray, list[str]]:
    tile = getattr(picture, "tile", None)
    layout = tile[0].args if tile else None  # the names and ranges of the stored levels
    parts = layout if isinstance(layout, tuple) else (layout,)
    stored = " ".join(str(part) for part in parts)
    is_deep = ";16" in stored or (picture.format == "PPM" and isinstance(parts[-1], int) and parts[-1] > 255)
    told = [FRAMES] if getattr(picture, "is_animated", False) else []
    if picture.format == "PNG":
        picture.load()  # whose EXIF data may come last; a TIFF has forgotten its orientation when it is loaded
    orientation = 1
    if picture.format == "TIFF" or any(key in picture.info for key in _EXIF):
        try:
            with _quiet():
                orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:
            told.append(BAD_EXIF)
    mode, format_ = picture.mode, picture.format
    picture.load()
    if orientation in range(2, 9):
        told.append(UPRIGHT)
        picture = ImageOps.exif_transpose(picture)  # Pillow itself turns a TIFF
    if mode == "F":
        told.append(FLOAT)
        return _as_rgb(_float_levels(np.asarray(picture))), told
    if mode.startswith("I"):
        told.append(SIXTEEN_BIT)
        top = _RANGE_12 if "I;12" in stored else _RANGE_16
        return _as_rgb(_whole_levels(np.asarray(picture), mode, format_, top)), told
    if is_deep:
        told.append(SIXTEEN_BIT)  # colour: Pillow's decoder gives 8 bits of each channel
    if mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in picture.info:
        return _lay(np.asarray(_converted(picture, "RGBA")), told, keep_alpha), told
    return np.asarray(_converted(picture, "RGB")), told


def _converted(picture: Image.Image, mode: str) -> Image.Image:
    return picture if picture.mode == mode and "transparency" not in picture.info else picture.convert(mode)


def _whole_levels(levels: np.ndarray, mode: str, format_: str | None, top: int) -> np.ndarray:
    """16-bit grey levels (H, W) as uint8; mode I holds 16 bits in a PPM or PNG, anything in a TIFF."""
    if mode == "I" and format_ not in ("PPM", "PNG"):
        raise _UnknownRange("whole numbers of 32 bits or with a sign, whose range is not known")
    return _by_strips(levels, lambda strip: (strip.astype(np.int64) * 255 + top // 2) // top)


def _float_levels(levels: np.ndarray) -> np.ndarray:
    """Levels (H, W) in 0..1 as uint8."""
    if not np.isfinite(levels).all():
        raise _UnknownRange("float levels that are not finite")
    if levels.min() < 0 or levels.max() > 1:
        raise _UnknownRange(f"float levels from {levels.min():g} to {levels.max():g}, outside of 0..1")
    return _by_strips(levels, lambda strip: np.rint(strip.astype(np.float64) * 255))


def _by_strips(levels: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """function(levels) as uint8, of some lines (H, W[, C]) at a time, as it makes wider numbers on its way."""
    step = max(1, _STRIP // levels.shape[1])
    return np.concatenate([function(levels[y : y + step]).astype(np.uint8) for y in range(0, len(levels), step)])


def _as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[:, :, None], 3, axis=2)


def _lay(rgba: np.ndarray, told: list[str], keep_alpha: bool) -> np.ndarray:
    """(H, W, 4) uint8 on the background, or as it is."""
    alpha = rgba[:, :, 3:]
    if keep_alpha:
        return rgba
    if alpha.min() == 255:
        return rgba[:, :, :3]
    told.append(TRANSPARENT)
    return _by_strips(rgba, _on_background)


def _on_background(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[:, :, 3:].astype(np.uint32)
    return (rgba[:, :, :3] * alpha + BACKGROUND * (255 - alpha) + 127) // 255
