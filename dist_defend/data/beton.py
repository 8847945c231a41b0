"""Read a .beton file (FFCV's format, version 2) with numpy alone.

The file holds a header, a description of the fields, one metadata row per sample, the data in pages, and a table of
(sample, address, size) at the end. We read one field of images (RGBImageField, raw or jpg) and one of labels
(IntField); our own files have no other.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_defend.data.pictures import MAX_PIXELS
from dist_defend.data.pixels import StoredImages
from dist_defend.errors import UserError
from dist_defend.files import open_regular

IMAGE_FIELD = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
PAGE_BYTES = 1 << 23  # of files that we write: an image must fit into a page
JPEG, _RAW = 0, 1  # modes
_HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("alloc_table", "<u8")],
    align=True,
)
_FIELD = np.dtype([("type_id", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)], align=True)
_ALLOCATION = np.dtype([("sample", "<u8"), ("address", "<u8"), ("size", "<u8")])
_POINTER = np.dtype([("ptr", "<u8"), ("size", "<u8")])
FIELD_TYPES = {
    0: ("FloatField", np.dtype("<f8")),
    1: ("IntField", np.dtype("<i8")),
    2: ("RGBImageField", IMAGE_FIELD),
    3: ("BytesField", _POINTER),
    4: ("NDArrayField", np.dtype("<u8")),
    5: ("JSONField", _POINTER),
    6: ("TorchTensorField", np.dtype("<u8")),
}  # FFCV's number of the type -> its name, and what a sample's metadata holds


class BetonError(Exception):
    """Why a file is none, as the end of a sentence."""


@dataclass(frozen=True)
class BetonFile:
    """An opened file. fields: name -> FFCV's name of the type; samples (N,): a metadata field for each.

    header_end, table_start: between them lie the images. has_rest: the file goes on behind the table's last entry.
    """

    memory: np.ndarray
    fields: dict[str, str]
    samples: np.ndarray
    allocations: np.ndarray
    header_end: int
    table_start: int
    has_rest: bool

    def images(self, name: str) -> StoredImages:
        """All images of a field. BetonError for one that does not lie whole in the file."""
        fields = self.samples[name]
        by_address = np.argsort(self.allocations["address"])
        table = self.allocations[by_address]
        place = np.searchsorted(table["address"], fields["data_ptr"]).clip(max=max(len(table) - 1, 0))
        if not len(table) or (table["address"][place] != fields["data_ptr"]).any():
            raise BetonError("images that the table at its end does not list")
        sizes = table["size"][place].astype(np.int64)
        images = stored_images(self.memory, np.arange(len(fields)), fields, sizes)
        lengths = 3 * images.heights * images.widths
        is_inside = (images.addresses >= 0) & (sizes >= 0) & (sizes <= len(self.memory))
        if not (is_inside & (images.addresses <= len(self.memory) - sizes)).all():  # the sum of both could overflow
            raise BetonError("images that lie outside of the file")
        if (sizes[images.is_raw] < lengths[images.is_raw]).any() or not lengths.all():
            raise BetonError("images of another size than their bytes")
        if (lengths > 3 * MAX_PIXELS).any():
            raise BetonError(f"images of more than {MAX_PIXELS:,} pixels")
        return images


def stored_images(memory: np.ndarray, rows: np.ndarray, image_fields: np.ndarray, sizes: np.ndarray) -> StoredImages:
    """The images that these metadata (B,) of type IMAGE_FIELD describe; sizes (B,) in bytes."""
    heights, widths, addresses = (image_fields[name].astype(np.int64) for name in ("height", "width", "data_ptr"))
    return StoredImages(memory, rows, addresses, sizes, heights, widths, image_fields["mode"] == _RAW)


def open_beton(path: Path) -> BetonFile:
    """Header, metadata and table of a file, mapped read-only. BetonError for anything else."""

    def take(offset: int, count: int, dtype: np.dtype) -> np.ndarray:
        data = memory[offset : offset + count * dtype.itemsize]
        if len(data) != count * dtype.itemsize:
            raise BetonError("an end before its header's")
        return np.array(data).view(dtype)

    try:
        with open_regular(path) as stream:
            memory = np.asarray(np.memmap(stream, np.uint8, "r"))
    except (OSError, ValueError, UserError) as error:
        raise BetonError("no bytes that can be read") from error
    header = take(0, 1, _HEADER)[0]
    if header["version"] != 2:
        raise BetonError("another header than FFCV's of version 2")
    page_size = int(header["page_size"])
    if not page_size or page_size & (page_size - 1):
        raise BetonError(f"pages of {page_size} bytes")
    described = take(_HEADER.itemsize, int(header["num_fields"]), _FIELD)
    names = [bytes(field["name"]).rstrip(b"\0").decode("latin-1") for field in described]
    types = [int(field["type_id"]) for field in described]
    if unknown := [name for name, number in zip(names, types, strict=True) if number not in FIELD_TYPES]:
        raise BetonError(f"a field '{unknown[0]}' of a type that is not FFCV's own")
    if len(set(names)) != len(names) or not all(names) or not names:
        raise BetonError("two fields of one name, or fields without one")
    metadata = np.dtype([(name, FIELD_TYPES[number][1]) for name, number in zip(names, types, strict=True)], align=True)
    samples = take(_HEADER.itemsize + described.nbytes, int(header["num_samples"]), metadata)
    table_start = int(header["alloc_table"])
    entries, rest = divmod(len(memory) - table_start, _ALLOCATION.itemsize)
    if entries < 0:
        raise BetonError("an end before its header's")
    allocations = take(table_start, entries, _ALLOCATION)
    fields = {name: FIELD_TYPES[number][0] for name, number in zip(names, types, strict=True)}
    header_end = _HEADER.itemsize + described.nbytes + samples.nbytes
    return BetonFile(memory, fields, samples, allocations, header_end, table_start, rest > 0)


def read_beton(path: Path) -> StoredImages:
    """All images of a file that was checked (checks.py)."""
    return open_beton(path).images("image")
