"""The poisoned images in BackdoorBench's attack_result.pt, from the file itself or from the PNGs beside it.

bd_train and bd_test hold, per poisoned image of the clean data set, (image, backdoor label, true label) or the path of
a PNG and both labels. Such a path was written on another machine: what follows bd_*_dataset/ is looked up beside the
file, and nowhere else.
"""

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dist_defend.errors import UserError
from dist_defend.files import read_regular
from dist_defend.models.pickled_data import PickledArray, PickledImage
from dist_defend.models.restricted_pickle import shown, shown_list

SPLITS = ("bd_train", "bd_test")
_FOLDER = re.compile(r"(bd|cross)_\w+")
_MOST_BYTES = 1 << 33
_MOST_PNG = 64 << 20  # bytes
_MOST_PATH = 4096  # characters
_MOST_PARTS = 16  # of a row's entry
_SWELL, _FREE = 3, 128 << 20  # pixels may take so many times the stored bytes (grey becomes RGB), and so much beside


class MissingImages(Exception):
    """The folder of a split's PNGs is not beside the file; the message says which."""


@dataclass(frozen=True)
class PoisonedImages:
    """x (N, H, W, 3) uint8; y, y_bd: true and backdoor labels (N,); index: rows (N,) of the clean data set; all int64.

    flag (N,) bool: what upstream's poison_indicator says of the row.
    """

    x: np.ndarray
    y: np.ndarray
    y_bd: np.ndarray
    index: np.ndarray
    flag: np.ndarray

    def rule(self, num_classes: int) -> str:
        """How backdoor labels follow from the true ones."""
        if np.array_equal(self.y, self.y_bd):
            return "clean label"
        if len(np.unique(self.y_bd)) == 1:
            return f"all to {self.y_bd[0]}"
        shifts = np.unique((self.y_bd - self.y) % num_classes)
        return f"all to all, shift {shifts[0]}" if len(shifts) == 1 else "several labels"


def read_poisoned(
    state: Any, split: str, path: Path, img_size: Sequence[int] | None, num_classes: int
) -> PoisonedImages | None:
    """The split's state in what read_checkpoint gave for ``path``, in upstream's order; None where it has no images.

    img_size: (H, W, channels). MissingImages where the images' whole folder is not there. UserError for a state of
    another version, a wrong type, a label or row out of range, an image that is missing, damaged or of another size,
    and a path or symbolic link that leads out of the file's folder.
    """
    if state is None:
        return None
    if img_size is None:
        raise UserError(f"{path}: img_size is missing: ask for the file as BackdoorBench wrote it")
    reader = _Reader(split, path, img_size, num_classes)
    try:
        stored = state["bd_data_container"]["data_dict"]
        order, flags = _vector(state["original_index_array"]), _vector(state["poison_indicator"])
        if not isinstance(stored, dict) or (order < 0).any() or len(np.unique(order)) != len(order):
            raise ValueError("rows")
        rows = [row for row in order.tolist() if row in stored]
        missing = sum(row not in stored for row in order[flags[order] != 0].tolist())
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise reader.error(f"is no state of a poisoned data set of BackdoorBench 2 ({type(error).__name__})") from error
    if missing:
        raise reader.error(f"marks {missing} rows as poisoned that it has no image of")
    return reader.read(rows, stored, flags) if rows else None


def _vector(values: Any) -> np.ndarray:
    """(N,) int64 of a list, a tensor or an array of numbers."""
    if isinstance(values, torch.Tensor):
        values = values.numpy()
    elif isinstance(values, PickledArray):
        values = values.value
    elif not isinstance(values, list | tuple) or not all(type(value) in (int, float, bool) for value in values):
        raise ValueError("vector")  # numpy would follow nested lists into all their branches
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "biuf" or (np.abs(array.astype(np.float64)) > 2**53).any():
        raise ValueError("vector")
    if not np.isfinite(array).all():
        raise ValueError("vector")
    return array.astype(np.int64)


class _Reader:
    def __init__(self, split: str, path: Path, img_size: Sequence[int], num_classes: int) -> None:
        self.split, self.path, self.num_classes = split, path, num_classes
        self.height, self.width = img_size[:2]
        self.stored_bytes = 0  # of the images so far, one that several rows share counted once
        self._seen: set[int | Path] = set()

    def error(self, what: str) -> UserError:
        return UserError(f"{self.path}: {self.split} {what}: ask for the whole folder of the attack, unchanged")

    def read(self, rows: list[int], stored: dict[Any, Any], flags: np.ndarray) -> PoisonedImages:
        size = len(rows) * self.height * self.width * 3
        if size > _MOST_BYTES:
            raise self.error(f"would need {size / 2**30:.0f} GiB of memory, more than {_MOST_BYTES >> 30}")
        x = np.empty((len(rows), self.height, self.width, 3), np.uint8)  # which takes memory as it is filled
        labels = np.empty((2, len(rows)), np.int64)
        for number, row in enumerate(rows):
            image, labels[:, number] = self._entry(row, stored[row])
            if (number + 1) * image.nbytes > _SWELL * self.stored_bytes + _FREE:
                raise self.error("has images that take far more memory than their bytes in the file")
            x[number] = image
        index = np.array(rows, np.int64)
        return PoisonedImages(x, labels[1], labels[0], index, flags[index].astype(bool))

    def _entry(self, row: int, entry: Any) -> tuple[np.ndarray, tuple[int, int]]:
        """One image, and its backdoor and true label."""
        image: np.ndarray | None = None
        labels: Any = None
        if isinstance(entry, dict):
            image, labels = self._file(row, entry.get("path")), entry.get("other_info")
        elif isinstance(entry, tuple | list) and entry and isinstance(entry[0], PickledImage):
            image, labels = entry[0].value, entry[1:_MOST_PARTS]
            self._count(id(entry[0]), entry[0].stored)
        if not isinstance(labels, tuple | list) or len(labels) < 2:
            raise self.error(f"has no image with two labels for row {row}")
        backdoor, true = (v.item() if isinstance(v, torch.Tensor) and v.numel() == 1 else v for v in labels[:2])
        if not all(type(label) is int and 0 <= label < self.num_classes for label in (backdoor, true)):
            raise self.error(f"has labels {shown_list([backdoor, true])} for row {row} of {self.num_classes} classes")
        if image is None or image.shape != (self.height, self.width, 3):
            raise self.error(f"has no image of {self.height}x{self.width} px for row {row}")
        return image, (int(backdoor), int(true))

    def _count(self, image: int | Path, num_bytes: int) -> None:
        self.stored_bytes += 0 if image in self._seen else num_bytes
        self._seen.add(image)

    def _place(self, row: int, told: Any) -> Path:
        """Where a PNG of another machine lies here. UserError or MissingImages; the file itself may be missing."""
        parts = re.split(r"[\\/]+", told) if isinstance(told, str) and len(told) <= _MOST_PATH else []
        found = [number for number, part in enumerate(parts) if _FOLDER.fullmatch(part)]
        if not found or ".." in parts or not told.isprintable():
            raise self.error(f"names '{shown(told)}' for row {row}, which is not below a bd_*_dataset folder")
        folder = self.path.parent.resolve()
        home = folder / parts[found[-1]]
        try:
            if not home.exists() and not home.is_symlink():
                raise MissingImages(
                    f"{self.split}: NO IMAGES, as {home.name} is not beside {self.path.name}; the weights came in "
                    "without: fetch that folder and import again to have them"
                )
            place = folder.joinpath(*parts[found[-1] :]).resolve()
        except (OSError, RuntimeError) as error:  # a name that is too long, a circle of links
            raise self.error(f"names '{shown(told)}' for row {row}, which cannot be looked for") from error
        if not place.is_relative_to(folder):
            raise self.error(f"names '{shown(told)}' for row {row}, which leads out of the file's folder")
        return place

    def _file(self, row: int, told: Any) -> np.ndarray:
        place = self._place(row, told)
        try:
            data = read_regular(place, _MOST_PNG)
            self._count(place, len(data))
        except OSError as error:
            raise self.error(f"names '{shown(told)}' for row {row}, which is not beside the file") from error
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
                    if image.size != (self.width, self.height):
                        raise self.error(f"has an image of {image.width}x{image.height} px for row {row}")
                    return np.asarray(image.convert("RGB"))
        except UserError:
            raise
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and its bomb warnings
            raise self.error(f"has a damaged PNG for row {row} ({shown(place.name)})") from error
