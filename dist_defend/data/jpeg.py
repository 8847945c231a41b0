"""Decode JPEG: libturbojpeg through ctypes where it is installed (FFCV brings it), otherwise Pillow.

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


@functools.cache
def _library() -> ctypes.CDLL | None:
    name = ctypes.util.find_library("turbojpeg")
    if name is None:
        return None
    library = ctypes.CDLL(name)
    library.tjInitDecompress.restype = ctypes.c_void_p
    library.tjDestroy.argtypes = [ctypes.c_void_p]
    library.tjDecompress2.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        *[ctypes.c_int] * 5,
    ]
    return library


def decode_jpeg(data: np.ndarray, out: np.ndarray, row: int) -> None:
    """Decode the bytes ``data`` (n,) uint8 into ``out`` (H, W, 3) uint8, C-contiguous, of exactly the JPEG's size.

    Releases the interpreter lock. UserError, naming the row, for damaged data.
    """
    library = _library()
    if library is None:
        _decode_pillow(data, out, row)
        return
    height, width, _ = out.shape
    handle = library.tjInitDecompress()
    failed = library.tjDecompress2(
        handle, data.ctypes.data, data.size, out.ctypes.data, width, 3 * width, height, _RGB, 0
    )
    library.tjDestroy(handle)
    if failed:
        raise _damaged(row)


def _decode_pillow(data: np.ndarray, out: np.ndarray, row: int) -> None:
    try:
        with Image.open(io.BytesIO(data.tobytes())) as image:
            out[...] = np.asarray(image.convert("RGB"))
    except (OSError, ValueError) as error:
        raise _damaged(row) from error


def _damaged(row: int) -> UserError:
    return UserError(f"row {row} of the data set is a damaged JPEG; prepare the data set again")
