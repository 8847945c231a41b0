"""What `write_dataset` reads: a source of images and labels, and the forms that most kinds of source take."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dist_defend.data.pictures import Tally, open_picture, picture_bytes


class Source(Protocol):
    """One split: items (image, label), the image (H, W, 3) or (H, W) uint8 or a PIL image, and the classes' names.

    Label -1 means that the source gives none. ``classes`` are those of all splits together. Our own sources also have
    ``name(row)``, what a message calls an image, and ``notes``: one line each of what was noticed, complete when all
    rows were read. Those that read files have ``encoded(row)``: the file's bytes, or None.
    """

    @property
    def classes(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> tuple[Any, int]: ...


@dataclass(frozen=True)
class Keys:
    """Names that the user gave for what holds images and labels: arrays, fields or endings. None: find them."""

    images: str | None = None
    labels: str | None = None


NO_KEYS = Keys()


class NotedSource(ABC):
    """Classes, labels (N,) and notes; the images are a subclass's. origin: where they were."""

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray,
        classes: Sequence[str],
        notes: Sequence[str] = (),
        origin: str = "the source",
    ) -> None:
        self._labels, self.classes, self._origin = labels, tuple(classes), origin
        self._notes, self._tally = list(notes), Tally()

    def __len__(self) -> int:
        return len(self._labels)

    @abstractmethod
    def __getitem__(self, row: int, /) -> tuple[Any, int]: ...

    def name(self, row: int) -> str:
        """What a message calls an image."""
        return f"{self._origin}: image {row}"

    @property
    def notes(self) -> list[str]:
        return [*self._notes, *self._tally.lines()]

    def add_note(self, line: str) -> None:
        self._notes.append(line)


class ArraySource(NotedSource):
    """Images (N, H, W[, 3]) uint8 and labels (N,) in memory."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        classes: Sequence[str],
        notes: Sequence[str] = (),
        origin: str = "the source",
    ) -> None:
        super().__init__(labels, classes, notes, origin)
        self._images = images

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        return self._images[row], int(self._labels[row])


class PictureSource(NotedSource):
    """Picture files; ``read(row)`` gives the content of those that are not files of their own."""

    def __init__(
        self,
        names: Sequence[str],
        labels: Sequence[int] | np.ndarray,
        classes: Sequence[str],
        notes: Sequence[str] = (),
        read: Callable[[int], bytes] | None = None,
    ) -> None:
        super().__init__(labels, classes, notes)
        self._names, self._read = names, read

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        image, told = open_picture(self._names[row] if self._read is None else self._read(row), self._names[row])
        self._tally.add(row, told)
        return image, int(self._labels[row])

    def encoded(self, row: int) -> bytes:
        return picture_bytes(self._names[row]) if self._read is None else self._read(row)

    def name(self, row: int) -> str:
        return self._names[row]


class TorchvisionSource(NotedSource):
    """A torchvision data set; target None becomes -1."""

    def __init__(self, dataset: Any, classes: Sequence[str], origin: str) -> None:
        super().__init__((), classes, origin=origin)
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        image, label = self._dataset[row]
        return image, -1 if label is None else int(label)
