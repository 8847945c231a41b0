"""JPEG. Decoded by libturbojpeg through ctypes where it is installed (FFCV brings it), otherwise Pillow.

Both run libjpeg-turbo's accurate inverse DCT and smooth chroma upsampling, so both give the same pixels.
"""

import ctypes
import ctypes.util
import functools
import io

import numpy as np
from PIL import Image

from dist_defend.errors import UserError

_RGB = 0  # TJPF_RGB
_SEGMENTS = 32  # of a header, before the one that holds the size
_NO_FRAMES = (0xC4, 0xC8, 0xCC)  # markers among those of frames, 0xC0 to 0xCF, that begin something else


@functools.cache
def _library() -> ctypes.CDLL | None:
    name = ctypes.util.find_library("turbojpeg")
    if name is None:
        return None
    library = ctypes.CDLL(name)
    address, number = ctypes.c_void_p, ctypes.c_int
    library.tjInitDecompress.restype = address
    library.tjDestroy.argtypes = [address]
    library.tjDecompressHeader3.argtypes = [address, address, ctypes.c_ulong, *[ctypes.POINTER(number)] * 4]
    library.tjDecompress2.argtypes = [address, address, ctypes.c_ulong, address, *[number] * 5]
    return library


def decode_jpeg(data: np.ndarray, out: np.ndarray, row: int) -> None:
    """Decode the bytes ``data`` (n,) uint8 into ``out`` (H, W, 3) uint8, C-contiguous.

    Releases the interpreter lock. UserError, naming the row, for damaged data and for a JPEG of another size.
    """
    library = _library()
    if library is None:
        _decode_pillow(data, out, row)
        return
    height, width, _ = out.shape
    wide, high, sampling, colours = (ctypes.c_int() for _ in range(4))
    handle = library.tjInitDecompress()
    failed = library.tjDecompressHeader3(handle, data.ctypes.data, data.size, wide, high, sampling, colours)
    failed = failed or (high.value, wide.value) != (height, width)  # it would scale, or leave memory as it was
    failed = failed or library.tjDecompress2(
        handle, data.ctypes.data, data.size, out.ctypes.data, width, 3 * width, height, _RGB, 0
    )
    library.tjDestroy(handle)
    if failed:
        raise _damaged(row)


def through_jpeg(images: np.ndarray, quality: int) -> np.ndarray:
    """Images (B, H, W, 3) uint8 as they are after a JPEG of this quality with halved colours (4:2:0), by Pillow."""
    made = np.empty_like(images)
    for image, out in zip(images, made, strict=True):
        content = io.BytesIO()
        Image.fromarray(image).save(content, "JPEG", quality=quality, subsampling="4:2:0")
        out[...] = np.asarray(Image.open(content, formats=("JPEG",)))
    return made


def jpeg_sizes(memory: np.ndarray, addresses: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Heights and widths (N,) int64 by the headers of N JPEGs that lie in ``memory``; 0 where there is no header.

    Goes from segment to segment of all images at once.
    """
    heights, widths = np.zeros(len(addresses), np.int64), np.zeros(len(addresses), np.int64)
    rows, at, ends = np.arange(len(addresses)), addresses + 2, addresses + sizes
    for _ in range(_SEGMENTS):
        is_whole = at + 9 <= ends[rows]
        rows, at = rows[is_whole], at[is_whole]
        head = memory[at[:, None] + np.arange(9)].astype(np.int64)
        marker = head[:, 1]
        is_frame = (marker >= 0xC0) & (marker <= 0xCF) & ~np.isin(marker, _NO_FRAMES)
        heights[rows[is_frame]] = head[is_frame, 5] * 256 + head[is_frame, 6]
        widths[rows[is_frame]] = head[is_frame, 7] * 256 + head[is_frame, 8]
        goes_on = ~is_frame & (head[:, 0] == 0xFF)
        rows, at = rows[goes_on], (at + 2 + head[:, 2] * 256 + head[:, 3])[goes_on]
        if not len(rows):
            break
    return heights, widths


def _decode_pillow(data: np.ndarray, out: np.ndarray, row: int) -> None:
    try:
        with Image.open(io.BytesIO(data.tobytes()), formats=("JPEG",)) as image:  # other readers start programs
            if image.size != (out.shape[1], out.shape[0]):
                raise ValueError("another size")
            out[...] = np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        raise _damaged(row) from error


def _damaged(row: int) -> UserError:
    return UserError(f"row {row} of the data set is a damaged JPEG; prepare the data set again")
