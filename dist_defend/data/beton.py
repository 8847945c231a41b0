"""Read a .beton file (FFCV's format, version 2) with numpy alone.

The file holds a header, a description of the fields, one metadata row per sample, the data in pages, and a table of
(sample, address, size) at the end. We read the fields ``image`` (RGBImageField, raw or jpg) and ``label`` (IntField).
"""

from pathlib import Path

import numpy as np

from dist_defend.data.jpeg import decode_jpeg
from dist_defend.errors import UserError

_HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("alloc_table", "<u8")],
    align=True,
)
_FIELD = np.dtype([("type_id", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)], align=True)
_ALLOCATION = np.dtype([("sample", "<u8"), ("address", "<u8"), ("size", "<u8")])
_IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("address", "<u8")])
_SAMPLE = np.dtype([("image", _IMAGE), ("label", "<i8")], align=True)
_JPG, _RAW = 0, 1
_INT_FIELD, _RGB_FIELD = 1, 2


class Beton:
    """Images and labels of a .beton file. UserError for a file that is cut short or is something else.

    labels: (N,) int64. heights, widths: (N,) int64 pixels. addresses, sizes: (N,) int64 bytes. is_raw: (N,) bool.
    memory: the whole file, uint8, mapped read-only.
    """

    def __init__(self, path: Path) -> None:
        broken = UserError(f"{path}: not a whole .beton file with fields image and label; prepare the data set again")
        try:
            self.memory = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError) as error:
            raise broken from error
        try:
            header = self.memory[: _HEADER.itemsize].view(_HEADER)[0]
            fields = self._take(_HEADER.itemsize, int(header["num_fields"]), _FIELD)
            names = [bytes(field["name"]).rstrip(b"\0").decode("ascii", "replace") for field in fields]
            types = fields["type_id"].tolist()
            if header["version"] != 2 or names != ["image", "label"] or types != [_RGB_FIELD, _INT_FIELD]:
                raise broken
            samples = self._take(_HEADER.itemsize + fields.nbytes, int(header["num_samples"]), _SAMPLE)
            table_bytes = len(self.memory) - int(header["alloc_table"])
            table = self._take(int(header["alloc_table"]), table_bytes // _ALLOCATION.itemsize, _ALLOCATION)
        except (ValueError, IndexError) as error:
            raise broken from error
        if len(table) != len(samples) or table_bytes % _ALLOCATION.itemsize:
            raise broken
        image = samples["image"]
        self.labels = samples["label"].astype(np.int64)
        self.heights, self.widths = image["height"].astype(np.int64), image["width"].astype(np.int64)
        self.addresses, self.is_raw = image["address"].astype(np.int64), image["mode"] == _RAW
        self.sizes = np.empty(len(samples), np.int64)
        self.sizes[table["sample"].astype(np.int64)] = table["size"].astype(np.int64)

    def _take(self, offset: int, count: int, dtype: np.dtype) -> np.ndarray:
        data = self.memory[offset : offset + count * dtype.itemsize]
        if len(data) != count * dtype.itemsize:
            raise ValueError("past the end of the file")
        return np.array(data).view(dtype)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, row: int) -> np.ndarray:
        """(H, W, 3) uint8; a view of the file where it is stored raw. UserError for a damaged JPEG."""
        data = self.memory[self.addresses[row] : self.addresses[row] + self.sizes[row]]
        shape = (int(self.heights[row]), int(self.widths[row]), 3)
        if self.is_raw[row]:
            return data.reshape(shape)
        out = np.empty(shape, np.uint8)
        decode_jpeg(data, out, row)
        return out
