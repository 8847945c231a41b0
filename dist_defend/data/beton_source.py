"""Someone else's .beton file as a source: one field of images, one of labels."""

from pathlib import Path

import numpy as np

from dist_defend.data.beton import BetonError, BetonFile, open_beton
from dist_defend.data.class_order import classes_of_labels, label_notes
from dist_defend.data.reading import Keys, NotedSource
from dist_defend.data.splits import files_by_split
from dist_defend.errors import UserError

BETON_ENDINGS = (".beton", ".ffcv")


class BetonSource(NotedSource):
    """The images of a field, decoded one by one."""

    def __init__(self, file: BetonFile, field: str, labels: np.ndarray, classes: list[str], path: str) -> None:
        super().__init__(labels, classes, origin=path)
        self._images = file.images(field)

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
    return files_by_split(place, BETON_ENDINGS, "file", "train.beton")


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
