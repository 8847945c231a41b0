"""Triggered test sets: what a named trigger makes of a test set, or the images that others made.

A sample-specific attack (SSBA, LF, input-aware, another's WaNet) is no trigger that could be stamped again. Its test
images are enough to measure it: BackdoorBench's bd_test, which import writes as npz, or any labelled images.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_defend.attacks.array_file import read_npz
from dist_defend.attacks.attack import AttackConfig, backdoor_labels
from dist_defend.attacks.poison import MadeDataset, triggered
from dist_defend.data.sources import load_image_npz
from dist_defend.data.store import PreparedDataset, open_dataset
from dist_defend.data.writing import resized
from dist_defend.errors import UserError
from dist_defend.files import sha256_file

_WANTED = "an npz of x, y and y_bd (import writes bd_test.npz), an npz of x and y, or a prepared data set with labels"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TriggeredImages:
    """Triggered images, with their true labels. wanted: (N,) int64 by row, what the attacker wants to be predicted.

    rows: (M,) int64, those that count. is_stamped: row r is row r of the clean test set with the trigger.
    """

    dataset: PreparedDataset
    rows: np.ndarray
    wanted: np.ndarray
    is_stamped: bool


def triggered_images(
    test: PreparedDataset, rows: np.ndarray, attack: AttackConfig, num_classes: int
) -> TriggeredImages:
    """What the attack makes of these rows (M,) of a test set, or the images that it gives instead.

    num_classes: the model's, which may be more than those of the given images. UserError for images of another size
    than the test set's, labels out of range or missing, classes of other names, and files of another content.
    """
    if attack.images is None:
        dataset = triggered(test, attack)
        return TriggeredImages(dataset, rows, backdoor_labels(dataset.labels, attack, num_classes), True)
    path = Path(attack.images)
    given, own_targets, chosen = _read(path, test)
    if given.image_shape != test.image_shape:
        raise UserError(
            f"{path} has images of {given.image_shape}, the test set {test.image_shape}: give both one size"
        )
    _check_labels(given.labels, path, "label", num_classes)
    if own_targets is not None:
        _check_labels(own_targets, path, "backdoor label", num_classes)
        if attack.target_class is not None and (own_targets[chosen] != attack.target_class).any():
            raise UserError(
                f"key 'target_class' is {attack.target_class}, but y_bd in {path} names {_some(own_targets[chosen])}: "
                "leave target_class out"
            )
        wanted = own_targets
    elif attack.target_class is None and attack.labels != "all_to_all":
        raise UserError(f"{path} does not say which class the attacker wants: say target_class")
    else:
        wanted = backdoor_labels(given.labels, attack, num_classes)
    if (given.labels[chosen] == wanted[chosen]).all():
        raise UserError(f"{path}: each image is of the class that the attacker wants, so there is no ASR to count")
    log.info("%s: %d triggered images, wanted: %s", path, len(chosen), _some(wanted[chosen]))
    return TriggeredImages(given, chosen, wanted, False)


class NpzImages(MadeDataset):
    """Images x (N, H, W, 3) uint8 and labels (N,) int64 of one file, in memory; resize as a prepared data set's."""

    def __init__(
        self, path: Path, x: np.ndarray, labels: np.ndarray, classes: Sequence[str], resize: int | None
    ) -> None:
        height, width = (resize, resize) if resize else x.shape[1:3]
        self.path, self.labels, self.beton, self.resize = path, labels, None, resize
        self.classes, self.num_classes, self.image_shape = tuple(classes), len(classes), (height, width, 3)
        self._x = x

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def digest(self) -> str:
        """sha256 of the file."""
        return sha256_file(self.path)

    def images(self, rows: np.ndarray) -> np.ndarray:
        if not self.resize:
            return np.asarray(self._x[rows])
        return np.stack([resized(image, (self.resize, self.resize)) for image in self._x[rows]])


def _read(path: Path, test: PreparedDataset) -> tuple[PreparedDataset, np.ndarray | None, np.ndarray]:
    """The images with true labels as the test set counts them, backdoor labels (N,) where the file has some, rows."""
    if os.path.isdir(path):
        inside = path / "bd_test.npz"
        if inside.is_file() and not (path / "manifest.json").exists():
            raise UserError(f"{path} is a model folder: name its triggered test images, {inside}")
        dataset = open_dataset(path, test.resize)
        dataset.labels = _renumbered(dataset, test)
        return dataset, None, np.arange(len(dataset))
    if path.suffix != ".npz":
        raise UserError(f"{path}: triggered images are {_WANTED}")
    x, y = load_image_npz(path)
    arrays = _integers(path, ("y_bd", "flag"), len(x))
    flag = arrays.get("flag")
    rows = np.arange(len(x)) if flag is None else np.flatnonzero(flag)
    if len(rows) < len(x):
        log.info("%s: %d images without flag are left out: they carry no trigger", path, len(x) - len(rows))
    if not len(rows):
        raise UserError(f"{path}: no image has a flag, so none carries the trigger")
    return NpzImages(path, x, y, test.classes, test.resize), arrays.get("y_bd"), rows


def _integers(path: Path, names: Sequence[str], count: int) -> dict[str, np.ndarray]:
    """Those of the arrays that the file has, (count,) int64."""
    try:
        found = read_npz(path, names)
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each raise their own
        raise UserError(f"{path}: {' or '.join(names)} is damaged or pickled: it must be {count} integers") from error
    for name, array in found.items():
        if array.dtype.kind not in "biu" or array.shape not in ((count,), (count, 1)):
            raise UserError(f"{path}: {name} is {array.dtype} of shape {array.shape[:4]}; expected {count} integers")
    return {name: array.reshape(-1).astype(np.int64) for name, array in found.items()}


def _renumbered(given: PreparedDataset, test: PreparedDataset) -> np.ndarray:
    """Labels (N,) as the test set numbers its classes: by name, since a folder may lack some, the target's above all.

    Names that are just the numbers 0, 1, ... (those of an npz) are the labels themselves.
    """
    numbers = {_plain(name): number for number, name in enumerate(test.classes)}
    unknown = [name for name in given.classes if _plain(name) not in numbers]
    if unknown and given.classes == tuple(map(str, range(len(given.classes)))):
        return given.labels
    if unknown:
        raise UserError(
            f"{given.path} has the class {unknown[0]!r}, which {test.path} lacks: name folders as that names classes"
        )
    table = np.array([numbers[_plain(name)] for name in given.classes], np.int64)
    return np.where(given.labels < 0, -1, table[given.labels])


def _plain(name: str) -> str:
    return str(int(name)) if name.isdecimal() else name.casefold()


def _check_labels(labels: np.ndarray, path: Path, what: str, num_classes: int) -> None:
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        told = f"{path}: the {what} {wrong[0]} of {len(wrong)} images is none of the model's"
        raise UserError(f"{told} {num_classes} classes, 0 to {num_classes - 1}: give images of the model's own task")


def _some(classes: np.ndarray) -> str:
    names = np.unique(classes).tolist()
    told = ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "")
    return f"class{'es' if len(names) > 1 else ''} {told}"
