"""Read a .beton file (FFCV's format, version 2) with numpy alone.

The file holds a header, a description of the fields, one metadata row per sample, the data in pages, and a table of
(sample, address, size) at the end. We read the fields ``image`` (RGBImageField, raw or jpg) and ``label`` (IntField).
"""

from pathlib import Path

import numpy as np

from dist_defend.data.pixels import StoredImages
from dist_defend.errors import UserError

IMAGE_FIELD = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_RAW = 1  # a mode
_HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("alloc_table", "<u8")],
    align=True,
)
_FIELD = np.dtype([("type_id", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)], align=True)
_ALLOCATION = np.dtype([("sample", "<u8"), ("address", "<u8"), ("size", "<u8")])
_SAMPLE = np.dtype([("image", IMAGE_FIELD), ("label", "<i8")], align=True)
_FIELDS = [("image", 2), ("label", 1)]  # name and FFCV's number of the type


def stored_images(memory: np.ndarray, rows: np.ndarray, image_fields: np.ndarray, sizes: np.ndarray) -> StoredImages:
    """The images that these metadata (B,) of type IMAGE_FIELD describe; sizes (B,) in bytes."""
    heights, widths, addresses = (image_fields[name].astype(np.int64) for name in ("height", "width", "data_ptr"))
    return StoredImages(memory, rows, addresses, sizes, heights, widths, image_fields["mode"] == _RAW)


def read_beton(path: Path) -> StoredImages:
    """All images of a file, mapped read-only. UserError for a file that is cut short or is something else."""
    broken = UserError(f"{path}: not a whole .beton file with fields image and label; prepare the data set again")

    def take(offset: int, count: int, dtype: np.dtype) -> np.ndarray:
        data = memory[offset : offset + count * dtype.itemsize]
        if len(data) != count * dtype.itemsize:
            raise broken
        return np.array(data).view(dtype)

    try:
        memory = np.asarray(np.memmap(path, np.uint8, "r"))
    except (OSError, ValueError) as error:
        raise broken from error
    header = take(0, 1, _HEADER)[0]
    fields = take(_HEADER.itemsize, int(header["num_fields"]), _FIELD)
    found = [(bytes(field["name"]).rstrip(b"\0").decode("latin-1"), int(field["type_id"])) for field in fields]
    if header["version"] != 2 or found != _FIELDS:
        raise broken
    samples = take(_HEADER.itemsize + fields.nbytes, int(header["num_samples"]), _SAMPLE)
    table = take(int(header["alloc_table"]), len(samples), _ALLOCATION)
    sizes = np.zeros(len(samples), np.int64)
    sizes[table["sample"].astype(np.int64)] = table["size"].astype(np.int64)
    return stored_images(memory, np.arange(len(samples)), samples["image"], sizes)
