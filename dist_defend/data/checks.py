"""What the files of a prepared data set must be before a back end reads them, which trusts them from then on.

Compiled code follows the addresses and sizes in these files, so each of them is compared with the manifest and with
the file that it points into. All checks are of whole tables at once.
"""

import os
import stat
from pathlib import Path

import numpy as np

from dist_defend.attacks.array_file import read_header
from dist_defend.data.beton import PAGE_BYTES, BetonError, BetonFile, open_beton
from dist_defend.data.jpeg import jpeg_sizes
from dist_defend.data.manifest import REMEDY, Manifest
from dist_defend.errors import UserError
from dist_defend.files import open_regular, sha256_file

_FIELDS = [("image", "RGBImageField"), ("label", "IntField")]


def check_files(folder: Path, manifest: Manifest) -> None:
    """UserError for a file that is missing, is no regular file, or has another size."""
    for name, file in manifest.files.items():
        path = os.path.join(folder, name)
        try:
            status = os.stat(path)
        except OSError:  # missing, or a link to itself
            raise UserError(f"{path}: is missing; {REMEDY}") from None
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: is not a regular file; {REMEDY}")
        if status.st_size != file.bytes:
            raise UserError(f"{path}: has {status.st_size} bytes instead of {file.bytes}; {REMEDY}")


def check_contents(folder: Path, manifest: Manifest) -> None:
    """Types, shapes, tables, addresses and ranges in every file. UserError for what does not fit the manifest."""
    count = manifest.num_samples
    _check_npy(folder / "labels.npy", np.dtype(np.int64), (count,))
    labels = read_numbers(folder / "labels.npy", count)
    _check_labels(folder / "labels.npy", labels, manifest)
    if "data.beton" in manifest.files:
        _check_beton(folder / "data.beton", manifest, labels)
    elif manifest.image_shape is None:
        raise UserError(f"{folder / 'manifest.json'}: image_shape is null, but images.npy has one shape; {REMEDY}")
    else:
        _check_npy(folder / "images.npy", np.dtype(np.uint8), (count, *manifest.image_shape))
    most_rows = manifest.source_samples or count
    if "order.npy" in manifest.files:
        _check_npy(folder / "order.npy", np.dtype(np.int64), (count,))
        rows = read_numbers(folder / "order.npy", count)
        if rows.min() < 0 or rows.max() >= most_rows or len(np.unique(rows)) != count:
            raise UserError(f"{folder / 'order.npy'}: does not name a row for each image; {REMEDY}")


def check_hashes(folder: Path, manifest: Manifest) -> None:
    """UserError names the first file that is not, byte for byte, what was written."""
    for name, file in manifest.files.items():
        if sha256_file(folder / name) != file.sha256:
            raise UserError(f"{folder / name}: content differs from manifest.json (sha256); {REMEDY}")


def read_numbers(path: Path, count: int) -> np.ndarray:
    """The ``count`` numbers (N,) int64 at the end of a .npy file that was checked."""
    return np.fromfile(path, "<i8", count, offset=os.stat(path).st_size - 8 * count)


def _check_npy(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """UserError for a file that is not one array of exactly this type and shape, in C order."""
    with open_regular(path) as file:
        try:
            found, is_fortran, kind = read_header(file)
        except Exception as error:  # ValueError, SyntaxError and what else its header can make numpy raise
            raise UserError(f"{path}: not a .npy file; {REMEDY}") from error
        size = file.tell() + dtype.itemsize * int(np.prod(shape, dtype=object))
        is_contiguous = not is_fortran or len(shape) == 1
        if found != shape or kind != dtype or not is_contiguous or os.fstat(file.fileno()).st_size != size:
            expected = f"expected {dtype} {shape} and nothing behind it"
            raise UserError(f"{path}: holds {kind} of shape {found}; {expected}; {REMEDY}")


def _check_labels(path: Path, labels: np.ndarray, manifest: Manifest) -> None:
    lowest, highest, classes = int(labels.min()), int(labels.max()), len(manifest.classes)
    if lowest < -1 or highest >= classes:
        odd = lowest if lowest < -1 else highest
        raise UserError(f"{path}: has the label {odd}, but there are {classes} classes; {REMEDY}")
    counts = np.bincount(labels[labels >= 0], minlength=classes)
    if counts.tolist() != list(manifest.class_counts):
        raise UserError(f"{path}: its labels are not as many of each class as manifest.json says; {REMEDY}")


def _check_beton(path: Path, manifest: Manifest, labels: np.ndarray) -> None:
    try:
        file = open_beton(path)
        if list(file.fields.items()) != _FIELDS:
            raise BetonError("other fields")
        if len(file.samples) != manifest.num_samples:
            raise BetonError(f"{len(file.samples)} images instead of {manifest.num_samples}")
        _check_tables(file, manifest)
    except BetonError as error:
        told = "not a whole .beton file with fields image and label"
        raise UserError(f"{path}: {told} (it has {error}); {REMEDY}") from error
    if not np.array_equal(file.samples["label"], labels):
        raise UserError(f"{path}: its labels are not those of labels.npy; {REMEDY}")


def _check_tables(file: BetonFile, manifest: Manifest) -> None:
    """BetonError unless each image lies alone between the header and the table, and is of its manifest's size."""
    images = file.images("image")
    if len(file.allocations) != len(images.rows) or file.has_rest:
        raise BetonError("a table that is not of its images alone")
    order = np.argsort(images.addresses)
    starts, ends = images.addresses[order], (images.addresses + images.sizes)[order]
    if starts[0] < file.header_end or ends[-1] > file.table_start or (starts[1:] < ends[:-1]).any():
        raise BetonError("images that lie over one another, over the header or over the table")
    modes = file.samples["image"]["mode"]
    if (modes != (1 if manifest.write_mode == "raw" else 0)).any():
        raise BetonError(f"images that are not {manifest.write_mode}")
    lengths = 3 * images.heights * images.widths
    if manifest.image_shape is not None:
        height, width, _ = manifest.image_shape
        is_right = (images.heights == height).all() and (images.widths == width).all()
    else:
        longest = manifest.max_resolution or PAGE_BYTES
        is_right = (images.heights <= longest).all() and (images.widths <= longest).all()
    if not is_right or (lengths > PAGE_BYTES).any():
        raise BetonError("images of another size than manifest.json says")
    if manifest.write_mode == "raw":
        is_right = (images.sizes == lengths).all()
    else:
        heights, widths = jpeg_sizes(images.memory, images.addresses, images.sizes)
        is_right = (heights == images.heights).all() and (widths == images.widths).all()
    if not is_right:
        raise BetonError("images of another size than their bytes")
