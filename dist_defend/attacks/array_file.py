"""Arrays from npy and npz files of others. A header is checked against the file's size before memory is allocated.

Nothing is unpickled. Errors are those of numpy, zipfile and zlib, which callers turn into messages.
"""

import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from dist_defend.files import open_regular, read_into
from dist_defend.models.foreign_file import check_listing

_SWELL, _FREE = 2, 64 << 20  # an array may take _SWELL times the file's bytes, plus _FREE bytes


class TooLarge(Exception):
    """An array that takes far more memory than its file; the message says of how many values."""


def read_npy(path: str | Path) -> np.ndarray:
    """The numbers of an npy file. UserError for what is no regular file."""
    with open_regular(path) as file:
        return read_array(file, os.fstat(file.fileno()).st_size)


def npz_names(path: str | Path) -> list[str]:
    """Names of the arrays of an npz file. UserError for what is no regular file."""
    with open_regular(path) as file:
        check_listing(file, path)
        with zipfile.ZipFile(file) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def read_npz(path: str | Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of the named arrays that an npz file has. UserError for what is no regular file; TooLarge."""
    found: dict[str, np.ndarray] = {}
    with open_regular(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        check_listing(file, path)
        with zipfile.ZipFile(file) as archive:
            members = {entry.filename: entry for entry in archive.infolist()}
            left = _SWELL * num_bytes + _FREE
            for name in names:
                member = members.get(f"{name}.npy")
                if member is None:
                    continue
                left -= member.file_size
                if left < 0:
                    raise TooLarge(member.file_size // 8)
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError("a compression that numpy does not write")
                with archive.open(member) as stored:
                    found[name] = read_array(stored, member.file_size)
    return found


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether it is in Fortran's order, and type, off the beginning of an npy file."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    header: tuple[tuple[int, ...], bool, np.dtype] = read(file)
    return header


def read_array(file: IO[bytes], num_bytes: int) -> np.ndarray:
    """The array of a file, or a member, of so many bytes."""
    shape, is_fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise ValueError("an array of Python objects")
    count = math.prod(shape)
    if not dtype.itemsize or min(shape, default=0) < 0 or count * dtype.itemsize > num_bytes:
        raise ValueError("a header that promises more than there is")
    array = np.empty(count, dtype)
    if count and not read_into(file, array.view(np.uint8).data):
        raise ValueError("an array cut short")
    return array.reshape(shape[::-1]).T if is_fortran else array.reshape(shape)
