"""Someone else's .beton file as a source: one field of images, one of labels."""

from pathlib import Path

import numpy as np

from dist_defend.data.beton import BetonError, BetonFile, open_beton
from dist_defend.data.class_order import classes_of_labels, label_notes
from dist_defend.data.reading import Keys, NotedSource
from dist_defend.data.splits import is_passed_over, listed, one_per_split, split_in
from dist_defend.errors import UserError

BETON_ENDINGS = (".beton", ".ffcv")


class BetonSource(NotedSource):
    """The images of a field, decoded one by one."""

    def __init__(self, file: BetonFile, field: str, labels: np.ndarray, classes: list[str], path: str) -> None:
        super().__init__(labels, classes)
        self._images, self._path = file.images(field), path

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        try:
            image = self._images[row : row + 1].decode().image(0)
        except UserError:
            raise UserError(f"{self.name(row)} is a damaged JPEG") from None
        return image, int(self._labels[row])

    def encoded(self, row: int) -> bytes | None:
        """The bytes of an image that is stored as JPEG."""
        images = self._images
        start = int(images.addresses[row])
        return None if images.is_raw[row] else images.memory[start : start + int(images.sizes[row])].tobytes()

    def name(self, row: int) -> str:
        return f"{self._path}: image {row}"


def beton_splits(place: Path, keys: Keys) -> list[str]:
    """The splits of a file, or of a folder of files."""
    return list(_files(place))


def open_beton_source(place: Path, split: str, keys: Keys) -> BetonSource:
    """One split. UserError for a damaged file, and for fields of images or labels that cannot be read or told apart."""
    opened, labels, fields = {}, {}, {}
    for name, path in _files(place).items():
        try:
            file = opened[name] = open_beton(Path(path))
        except BetonError as error:
            raise UserError(f"{path}: not a whole .beton file (it has {error}); ask for it again") from error
        fields[name] = _field(path, file, "RGBImageField", keys.images, "image", "--images")
        field = _field(path, file, "IntField", keys.labels, "label", "--labels")
        labels[name] = file.samples[field].astype(np.int64)
        if name == "unlabeled":
            labels[name] = np.full(len(file.samples), -1)
    path = _files(place)[split]
    classes = classes_of_labels(labels, place)
    try:
        source = BetonSource(opened[split], fields[split], labels[split], classes, path)
    except BetonError as error:
        raise UserError(f"{path}: not a whole .beton file (it has {error}); ask for it again") from error
    for note in label_notes(classes, labels, split):
        source.add_note(note)
    return source


def _files(place: Path) -> dict[str, str]:
    """Split -> file. A single file is the split that its name tells, or train."""
    if place.is_file():
        return {split_in(place.stem) or "train": str(place)}
    files = sorted(f.name for f in place.iterdir() if f.suffix.lower() in BETON_ENDINGS and not is_passed_over(f.name))
    named = [(split, name) for name in files if (split := split_in(Path(name).stem)) is not None]
    if not named:
        there = f"it has {listed(files)}" if files else f"no {' or '.join(BETON_ENDINGS)} in it"
        raise UserError(f"{place}: no file is named after a split (train.beton); {there}; give one as --path")
    names = one_per_split(place, named, "give one file as --path")
    return {split: str(place / name) for split, name in names.items()}


def _field(path: str, file: BetonFile, kind: str, wanted: str | None, usual: str, option: str) -> str:
    """The field of a type: the one that was asked for, the only one, or the one with the usual name."""
    told = ", ".join(f"{name} ({type_})" for name, type_ in file.fields.items())
    fit = [name for name, type_ in file.fields.items() if type_ == kind]
    if wanted is None and len(fit) > 1 and usual in fit:
        return usual
    if wanted is None and len(fit) == 1:
        return fit[0]
    if wanted in fit:
        return wanted
    if fit:
        raise UserError(f"{path}: several fields may be meant; choose one {kind} by {option}: it has {told}")
    raise UserError(f"{path}: no {kind}, which {option[2:]} must be; it has {told}")
