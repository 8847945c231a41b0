"""GTSRB as the papers use it: 39,209 training and 12,630 test images of 43 classes, whole signs with their border.

Read as the official archives unpack (GTSRB/Final_Training/Images/000NN, GTSRB/Final_Test/Images and GT-final_test.csv
anywhere above or beside), or as Kaggle has it (Train/N, Test, Test.csv). Columns are found by their names.
"""

import csv
import io
import os
from pathlib import Path

import numpy as np

from dist_defend.data.class_order import is_whole, label_notes
from dist_defend.data.pictures import is_picture
from dist_defend.data.reading import PictureSource
from dist_defend.data.splits import listed
from dist_defend.data.walking import Walk
from dist_defend.errors import UserError
from dist_defend.files import read_regular

NUM_IMAGES = {"train": 39209, "test": 12630}
CLASSES = tuple(str(sign) for sign in range(43))
_BASES = ("", "GTSRB", "gtsrb/GTSRB", "gtsrb")
_TRAIN = ("Final_Training/Images", "Train", "train")
_TEST = ("Final_Test/Images", "Test", "test")
_TABLES = ("GT-final_test.csv", "Test.csv", "test.csv")
_MOST_BYTES = 64 << 20  # of a table
_ARCHIVES = {
    "train": (("GTSRB_Final_Training_Images.zip", "f33fd80ac59bff73c82d25ab499e03a3"),),
    "test": (
        ("GTSRB_Final_Test_Images.zip", "c7e4e6327067d32654124b0fe9e82185"),
        ("GTSRB_Final_Test_GT.zip", "fe31e9c9270bbcd7b84b7f21a9d9d9e5"),
    ),
}  # and their md5
_ADDRESS = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"


def open_gtsrb(place: str | None, split: str) -> PictureSource:
    """One split as it lies in ``place``, else downloaded there. UserError where neither can be."""
    if place is None:
        raise UserError("gtsrb needs --path: a folder that has it, or that it may be downloaded to")
    path = Path(place)
    found = _find(path, split)
    if found is None:
        if split == "train" and any((path / base / "Training").is_dir() for base in _BASES):
            raise UserError(
                f"{path}: holds torchvision's smaller training set (26,640 images), not the papers'; take the kind "
                "gtsrb_torchvision, or another --path"
            )
        _download(path, split)
        found = _find(path, split)
    if found is None:
        raise UserError(f"{path}: GTSRB's {split} images are not there after the download; check --path")
    files, labels, notes = found
    if len(files) != NUM_IMAGES[split]:
        notes.append(f"{len(files)} images in {split}, not the {NUM_IMAGES[split]} of the papers")
    return PictureSource(files, labels, CLASSES, [*notes, *label_notes(CLASSES, {split: np.array(labels)}, split)])


def _find(path: Path, split: str) -> tuple[list[str], list[int], list[str]] | None:
    """Files, labels and what to tell, or None where the split is in none of the known places."""
    for base in (path / base for base in _BASES):
        for name in _TRAIN if split == "train" else _TEST:
            folder = base / name
            if folder.is_dir():
                found = _from_folders(folder) if split == "train" else _from_table(path, base, folder)
                if found is not None:
                    return found
    return None


def _from_folders(folder: Path) -> tuple[list[str], list[int], list[str]]:
    """A folder per class, named by its number, with or without leading zeros."""
    walk = Walk()
    folders = walk.folders(folder)
    odd = [name for name in folders if not is_whole(name) or int(name) >= len(CLASSES)]
    if odd or not folders:
        raise UserError(
            f"{folder}: expected a folder per class, 0 to {len(CLASSES) - 1}; found {listed(odd) or 'none'}"
        )
    files, labels = [], []
    for name in sorted(folders, key=int):
        pictures = walk.pictures(folders[name])
        files += pictures
        labels += [int(name)] * len(pictures)
    return files, labels, [note for note in walk.notes() if ".csv" not in note]


def _from_table(path: Path, base: Path, folder: Path) -> tuple[list[str], list[int], list[str]] | None:
    """The images and classes that the table of the test names, or those of class folders; None without either."""
    places = (folder, folder.parent, base, path, path / "gtsrb")
    table = next((p / name for p in places for name in _TABLES if (p / name).is_file()), None)
    if table is None:
        return _from_folders(folder) if Walk().folders(folder) else None
    try:
        text = read_regular(table, _MOST_BYTES).decode("utf-8-sig")
        separator = ";" if ";" in text.partition("\n")[0] else ","
        lines = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
        rows = [{(key or "").strip(): value for key, value in row.items()} for row in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table}: not a table that can be read ({error}); unpack it again") from error
    files, labels = [], []
    for number, row in enumerate(rows, 2):
        named, label = row.get("Path") or row.get("Filename"), (row.get("ClassId") or "").strip()
        if not isinstance(named, str) or not is_whole(label) or int(label) >= len(CLASSES):
            raise UserError(f"{table}: line {number}: expected the columns Path or Filename, and ClassId 0 to 42")
        file_name = os.path.basename(named.strip().replace("\\", "/"))
        files.append(str(folder / file_name))
        labels.append(int(label))
    there = {name for name in os.listdir(folder) if is_picture(name)}
    missing = [file for file in files if os.path.basename(file) not in there]
    if missing or not files:
        first = missing[0] if missing else "any"
        raise UserError(f"{table}: {len(missing)} of {len(files)} images are missing, first {first}; unpack them again")
    left = len(there) - len(files)
    return files, labels, [f"test images that {table.name} does not name, left out: {left}"] if left > 0 else []


def _download(path: Path, split: str) -> None:
    from torchvision.datasets.utils import download_and_extract_archive

    try:
        for name, md5 in _ARCHIVES[split]:
            download_and_extract_archive(_ADDRESS + name, download_root=str(path), md5=md5)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{path}: GTSRB {split} is not there and cannot be downloaded ({error}); unpack "
            f"{' and '.join(name for name, _ in _ARCHIVES[split])} there, or Kaggle's copy"
        ) from error
