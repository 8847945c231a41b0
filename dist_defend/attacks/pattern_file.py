"""Patterns from files: pictures, npy and npz. Nothing is unpickled, and sizes are checked before pixels are read."""

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dist_defend.errors import UserError

_MAX_VALUES = 2**27  # of one file
_KEYS = ("x", "t", "trigger", "pattern")  # of an npz; x is what RNP's trojan file holds
_WANTED = "a picture, or an npy or npz file of (H, W), (H, W, 3) or (3, H, W) numbers"


def read_pattern(path: str | Path, image_size: int, lowest: float = 0, is_resized: bool = False) -> np.ndarray:
    """Grey levels (H, W, 3) float64 in lowest..255 of a picture or an array.

    Arrays: integers are grey levels; floats that stay within -1..1 are shares of 255. A leading axis of several
    patterns: the first is taken. is_resized: a picture of another size is resized (Pillow, bilinear) instead of
    refused. UserError for a missing or damaged file, another size, object arrays, values out of range.
    """
    path = Path(path)
    with _one_line(path):
        if path.suffix in (".npy", ".npz"):
            levels = _channels_last(_levels(_array(path)))
        else:
            levels = _picture(path, image_size if is_resized else None)
    if levels.shape[:2] != (image_size, image_size):
        own, wanted = f"{levels.shape[0]}x{levels.shape[1]}", f"{image_size}x{image_size}"
        raise UserError(f"pattern {path} is {own} px but the images are {wanted} px: use one of that size")
    if levels.min() < lowest or levels.max() > 255:
        raise UserError(f"pattern {path} holds {levels.min():g} to {levels.max():g}; keep it in {lowest:g} to 255")
    return levels


def read_mask(path: str | Path, image_size: int) -> np.ndarray:
    """Shares (H, W, 3) float64 in [0, 1]: 1 where the pattern replaces the pixel. UserErrors as read_pattern's."""
    mask = read_pattern(path, image_size)
    return mask / 255 if mask.max() > 1 else mask


def open_images(path: str | Path, count: int, image_size: int) -> np.ndarray:
    """An npy file (count, H, W, 3) uint8, mapped, not read: one image per row of the source. UserError if not so."""
    with _one_line(path):
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    wanted = (count, image_size, image_size, 3)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != wanted:
        raise UserError(f"{path} must be an npy file uint8 {wanted}, an image per row of the data set's source")
    return images


@contextlib.contextmanager
def _one_line(path: str | Path) -> Iterator[None]:
    """Whatever numpy, zipfile, zlib, pickle or a plugin of Pillow raises becomes one line."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"pattern {path} does not exist: it must be {_WANTED}") from None
    except _Unfit as error:
        raise UserError(f"pattern {path} {error}: it must be {_WANTED}") from None
    except Exception as error:
        raise UserError(f"pattern {path} is damaged or pickled: it must be {_WANTED}") from error


class _Unfit(Exception):
    """A file that can be read, but is no pattern."""


def _picture(path: Path, side: int | None) -> np.ndarray:
    with Image.open(path) as picture:
        _check_size(picture.width * picture.height * 3)
        rgb = picture.convert("RGB")
    if side is not None:
        rgb = rgb.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(rgb, np.float64)


def _array(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # a header that promises too much fails here
        _check_size(array.size)
        return np.array(array)
    with zipfile.ZipFile(path) as archive:
        _check_size(sum(member.file_size for member in archive.infolist()) // 8)
    with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
        key = next((key for key in _KEYS if key in file), None)
        if key is None:
            raise _Unfit(f"has none of the arrays {', '.join(_KEYS)}")
        return file[key]


def _check_size(values: int) -> None:
    if values > _MAX_VALUES:
        raise _Unfit(f"holds {values} values, more than any trigger")


def _levels(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "biuf" or not array.size or not np.isfinite(array).all():
        raise _Unfit(f"is {array.dtype} {array.shape}, not finite numbers")
    is_share = array.dtype.kind == "b" or (array.dtype.kind == "f" and np.abs(array).max() <= 1)
    return array.astype(np.float64) * (255 if is_share else 1)


def _channels_last(array: np.ndarray) -> np.ndarray:
    if array.ndim == 4:
        array = array[0]
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, 2)
    if array.ndim == 3 and array.shape[-1] != 3 and array.shape[0] == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] != 3:
        raise _Unfit(f"has the shape {array.shape}")
    return array
