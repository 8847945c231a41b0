"""npz files: images and labels under the names that people give them, one split per file or several in one.

Known names: x and y (BadEncoder), x_train and y_train (Keras), train_images and train_labels (MedMNIST), and what is
made of such words; others by --images and --labels. Nothing is unpickled.
"""

import contextlib
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_defend.attacks.array_file import read_array
from dist_defend.data.class_order import classes_of_labels, label_notes
from dist_defend.data.reading import NO_KEYS, ArraySource, Keys
from dist_defend.data.splits import SPLITS, is_passed_over, listed, one_per_split, split_of
from dist_defend.errors import UserError
from dist_defend.files import open_regular

_IMAGES = ("x", "image", "images", "img", "imgs", "data", "pixels")
_LABELS = ("y", "label", "labels", "target", "targets", "class", "classes")
_MOST_LABELS = 1 << 23
_CHUNK = 1 << 20  # levels that are looked at once
_FREE_BYTES = 64 << 20  # that an array may have beyond four times its file
_WANTED = "expected arrays x (N, H, W, 3) uint8 and y (N,) or (N, 1)"


@dataclass(frozen=True)
class _Part:
    """Where one split lies: a file, the name of its images and of its labels, which an unlabelled split may lack."""

    file: Path
    images: str
    labels: str | None


def npz_splits(place: Path, keys: Keys) -> list[str]:
    """The splits of a file or of a folder of files named after splits."""
    return list(_parts(place, keys))


def open_npz(place: Path, split: str, keys: Keys) -> ArraySource:
    """One split, images (N, H, W, 3) or (N, H, W) uint8. UserError for a file that is something else."""
    parts = _parts(place, keys)
    part = parts[split]
    labels = {name: _read_labels(one, name) for name, one in parts.items()}
    classes = classes_of_labels(labels, f"{part.file}: {part.labels}")
    images, notes = _as_images(_array(part.file, part.images), f"{part.file}: {part.images}")
    if len(images) != len(labels[split]) and part.labels is not None:
        raise UserError(_unfit_labels(part, _array(part.file, part.labels), len(images)))
    own = labels[split] if part.labels is not None else np.full(len(images), -1)
    return ArraySource(images, own, classes, [*notes, *label_notes(classes, labels, split)], str(part.file))


def load_image_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images x (N, H, W, 3) uint8 and labels y (N,) int64 of a file in BadEncoder's layout. UserError if it is not."""
    for name in ("x", "y"):
        if name not in _names(path):
            raise UserError(f"{path}: no array {name!r}; {_WANTED}")
    x = _array(path, "x")
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or not x.size:
        raise UserError(f"{path}: x is {x.dtype} of shape {x.shape}; expected uint8 (N, H, W, 3)")
    labels = _read_labels(_Part(path, "x", "y"), "train")
    if len(labels) != len(x):
        raise UserError(_unfit_labels(_Part(path, "x", "y"), _array(path, "y"), len(x)))
    return x, labels


def _parts(place: Path, keys: Keys) -> dict[str, _Part]:
    """Split -> part. A single file without splits in its arrays' names is its own stem's split, or train."""
    if place.is_file():
        found = _parts_of_file(place, keys)
        return found if "" not in found else {_split_of_file(place) or "train": found[""]}
    files = sorted(f.name for f in place.iterdir() if f.suffix.lower() == ".npz" and not is_passed_over(f.name))
    named = [(split, name) for name in files if (split := _split_of_file(Path(name))) is not None]
    if not named:
        there = f" (it has {listed(files)}; give one as --path)" if files else "; check --path"
        raise UserError(f"{place}: no train.npz, test.npz or train_unlabeled.npz in this folder{there}")
    parts = {}
    for split, name in one_per_split(place, named, "give one file as --path").items():
        found = _parts_of_file(place / name, keys, split)
        if "" not in found:
            raise UserError(f"{place / name}: holds several splits ({', '.join(found)}); give this file as --path")
        parts[split] = found[""]
    return parts


def _split_of_file(file: Path) -> str | None:
    """train.npz, Train.npz and train_224.npz are train."""
    return split_of(re.sub(r"_\d+$", "", file.stem))


def _parts_of_file(file: Path, keys: Keys, split: str | None = None) -> dict[str, _Part]:
    """Split -> part by the arrays' names; "" for names without a split. UserError where that cannot be told."""
    names = _names(file)
    for key, option in ((keys.images, "--images"), (keys.labels, "--labels")):
        if key is not None and key not in names:
            raise UserError(f"{file}: no array {key!r} for {option}; it has {listed(names)}")
    if {"x", "y"} <= set(names) and keys == NO_KEYS:
        return {"": _Part(file, "x", "y")}
    images = {"": keys.images} if keys.images else _of_role(file, names, _IMAGES, "--images")
    labels = {"": keys.labels} if keys.labels else _of_role(file, names, _LABELS, "--labels")
    if "" in images:
        images = {"": images[""]}
    if not images:
        raise UserError(f"{file}: no array 'x'; {_WANTED}, or name them by --images and --labels: {listed(names)}")
    parts = {}
    for name in sorted(images, key=("", *SPLITS).index):
        is_unlabelled = (name or split or _split_of_file(file)) == "unlabeled"
        if name not in labels and not is_unlabelled:
            raise UserError(f"{file}: no array 'y' beside {images[name]!r}; {_WANTED}, or name it by --labels")
        parts[name] = _Part(file, images[name], labels.get(name))
    return parts


def _of_role(file: Path, names: list[str], words: tuple[str, ...], option: str) -> dict[str, str]:
    """Split, or "" for none -> array, of names made of one such word and perhaps a split: x, x_train, train_images."""
    found: dict[str, str] = {}
    for name in names:
        first, *rest = re.split(r"[_\-. ]", name.lower(), maxsplit=1)
        for word, other in ((first, "".join(rest)), ("".join(rest).rpartition("_")[2], first)):
            split = "" if not other else split_of(other)
            if word in words and split is not None:
                if split in found and found[split] != name:
                    raise UserError(f"{file}: both {found[split]!r} and {name!r} may be meant; choose one by {option}")
                found[split] = name
    return found


def _names(file: Path) -> list[str]:
    with _opened(file) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def _array(file: Path, name: str) -> np.ndarray:
    """UserError before memory is taken for an array that would be more than its file accounts for."""
    with _opened(file) as archive:
        member = archive.getinfo(f"{name}.npy")
        most = 4 * os.path.getsize(file) + _FREE_BYTES
        if member.file_size > most:
            raise UserError(f"{file}: {name} unpacks to more than {most:,} bytes; save it with numpy.savez, unpacked")
        with archive.open(member) as stream:
            array = read_array(stream, member.file_size)
            if stream.read(1):
                raise ValueError("another size than its header's")
    return array


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    """An npz; whatever zipfile, zlib and numpy raise becomes one line."""
    try:
        with open_regular(file) as stream, zipfile.ZipFile(stream) as archive:
            yield archive
    except UserError:
        raise
    except Exception as error:
        is_pickle = "Python objects" in str(error)
        reason = "it holds Python objects, which are not read" if is_pickle else "not a whole npz file"
        raise UserError(f"{file}: {reason}; {_WANTED}") from error


def _read_labels(part: _Part, split: str) -> np.ndarray:
    """(N,) int64; -1 for all of an unlabelled split. UserError for other shapes and fractions."""
    if part.labels is None:
        return np.empty(0, np.int64)
    labels = _array(part.file, part.labels)
    if labels.size > _MOST_LABELS:
        raise UserError(f"{part.file}: {part.labels} has {labels.size:,} entries, more than a data set has images")
    is_whole = np.issubdtype(labels.dtype, np.integer) or (
        np.issubdtype(labels.dtype, np.floating) and np.isfinite(labels).all() and (labels == np.rint(labels)).all()
    )
    if not is_whole or labels.ndim not in (1, 2) or (labels.ndim == 2 and labels.shape[1] != 1):
        raise UserError(_unfit_labels(part, labels, len(labels) if labels.ndim else 0))
    return np.full(len(labels), -1) if split == "unlabeled" else labels.reshape(-1).astype(np.int64)


def _unfit_labels(part: _Part, labels: np.ndarray, count: int) -> str:
    return (
        f"{part.file}: {part.labels} is {labels.dtype} of shape {labels.shape}; expected {count} integer labels, "
        "(N,) or (N, 1)"
    )


def _as_images(images: np.ndarray, name: str) -> tuple[np.ndarray, list[str]]:
    """(N, H, W, 3) or (N, H, W) uint8 and what was done to it. UserError for other shapes and ranges."""
    notes = []
    shape = images.shape
    if images.ndim == 4 and shape[3] not in (1, 3) and shape[1] in (1, 3):
        notes.append(f"images of shape {shape} are taken as channels first")
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    is_grey, is_colour = images.ndim == 3, images.ndim == 4 and images.shape[3] == 3
    if not images.size or not (is_grey or is_colour) or images.dtype.kind not in "buif":
        raise UserError(f"{name} is {images.dtype} of shape {shape}; expected uint8 (N, H, W, 3) or (N, H, W)")
    if images.dtype == np.uint8:
        return images, notes
    lowest, highest = images.min(), images.max()
    if images.dtype.kind in "bf" and lowest >= 0 and highest <= 1:  # never so for levels that are not finite
        notes.append(f"{images.dtype} levels in 0..1 scaled to 8 bits")
        return np.concatenate([np.rint(c.astype(np.float64) * 255).astype(np.uint8) for c in _chunks(images)]), notes
    if (
        lowest >= 0
        and highest <= 255
        and (images.dtype.kind != "f" or all((c == np.rint(c)).all() for c in _chunks(images)))
    ):
        notes.append(f"{images.dtype} levels in 0..255 taken as 8 bits")
        return images.astype(np.uint8), notes
    if images.dtype == np.uint16:
        notes.append("16-bit levels scaled to 8 bits")
        levels = [((c.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8) for c in _chunks(images)]
        return np.concatenate(levels), notes
    raise UserError(
        f"{name} is {images.dtype} of shape {shape} with levels from {lowest} to {highest}; expected uint8, or floats "
        "in 0..1: undo the normalisation"
    )


def _chunks(images: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, _CHUNK * len(images) // images.size)
    return (images[start : start + step] for start in range(0, len(images), step))
