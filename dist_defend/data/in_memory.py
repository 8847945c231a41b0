"""Images and labels of a Python program: tensors, arrays, torch Datasets, as a source of `write_dataset`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dist_defend.data.reading import ArraySource
from dist_defend.errors import UserError

Images: TypeAlias = Tensor | np.ndarray
InMemory: TypeAlias = tuple[Images, Any] | Images | Dataset[Any]
_SLACK = 1e-6  # beyond [0, 1], which resizing leaves behind
_LOSSLESS = 1e-3  # grey levels by which an image may miss a whole one


def is_in_memory(value: object) -> bool:
    """Whether a value is one of InMemory: a pair whose first part is an array, an array, or a torch Dataset."""
    if isinstance(value, tuple | list) and len(value) == 2:
        value = value[0]
    return isinstance(value, Tensor | np.ndarray | Dataset)


@dataclass(frozen=True)
class ReadData:
    """Images (N, H, W, 3) uint8, labels (N,) int64, -1 where there are none, and the names that a Dataset has."""

    what: str
    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...] | None
    notes: list[str]

    def source(self, classes: Sequence[str]) -> ArraySource:
        """For write_dataset, in the order given. UserError for a label that has no class."""
        if self.labels.max() >= len(classes):
            raise UserError(
                f"{self.what}: label {self.labels.max()} is none of {len(classes)} classes, 0 to {len(classes) - 1}: "
                "give labels of the model's own task"
            )
        return ArraySource(self.images, self.labels, classes, self.notes, self.what)


def read_data(data: InMemory, what: str) -> ReadData:
    """Read what a program holds; what: its name in messages.

    data: a pair (images, labels), images alone, or a Dataset of pairs (image, label). Images: float in [0, 1] or uint8,
    (N, 3, H, W) or (N, H, W, 3); of a Dataset also PIL's. Labels: (N,) whole numbers.
    UserError for other types, shapes and ranges, and for a Dataset that changes its images between two reads.
    """
    images: Any
    labels: Any
    if isinstance(data, Dataset):
        images, labels, classes = *_read(data, what), _own_classes(data)
    elif isinstance(data, tuple | list):
        (images, labels), classes = data, None
    else:
        images, labels, classes = data, np.full(len(data), -1), None
    pixels, notes = _as_pixels(images, what)
    return ReadData(what, pixels, _as_labels(labels, len(pixels), what), classes, notes)


def _own_classes(data: Dataset[Any]) -> tuple[str, ...] | None:
    names = getattr(data, "classes", None)
    is_list = isinstance(names, list | tuple) and len(names) > 0 and all(isinstance(name, str) for name in names)
    return tuple(names) if is_list and names is not None else None


def _read(data: Dataset[Any], what: str) -> tuple[np.ndarray, np.ndarray]:
    """All images (N, H, W, 3) and labels (N,), read once."""
    try:
        count = len(data)  # type: ignore[arg-type]
    except TypeError:
        raise UserError(f"{what}: a Dataset without a length is not read: give one with __len__, or tensors") from None
    if not count:
        raise UserError(f"{what}: there are no images")
    items = [_item(data[row], row, what) for row in range(count)]
    images = [image for image, _ in items]
    shapes = sorted({image.shape for image in images})
    if len(shapes) > 1:
        raise UserError(f"{what}: images differ in size ({shapes[0]}, {shapes[1]}): resize them in the Dataset")
    again = _item(data[0], 0, what)[0]
    if not np.array_equal(images[0], again):
        raise UserError(
            f"{what}: image 0 is another one when it is read again: take random transforms out of the Dataset; a "
            "method's key 'augment' has them"
        )
    return np.stack(images), np.array([label for _, label in items])


def _item(item: Any, row: int, what: str) -> tuple[np.ndarray, int]:
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise UserError(f"{what}: item {row} of the Dataset is a {type(item).__name__}, not a pair (image, label)")
    image, label = item
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB")), int(label)
    if not isinstance(image, Tensor | np.ndarray):
        told = f"{what}: image {row} is a {type(image).__name__}"
        raise UserError(f"{told}; give tensors, arrays or PIL images (transforms.ToTensor() makes tensors)")
    return _as_pixels(image[None], f"{what}: image {row}")[0][0], int(label)


def _as_pixels(images: Any, what: str) -> tuple[np.ndarray, list[str]]:
    """(N, H, W, 3) uint8, and what is to be told of the rounding."""
    if isinstance(images, Tensor):
        images = images.detach().cpu()
        images = (images.float() if images.is_floating_point() else images).numpy()
    images = np.asarray(images)
    if images.ndim != 4 or not images.size:
        raise UserError(f"{what}: images of shape {images.shape}; give (N, 3, H, W) or (N, H, W, 3), at least one")
    if (images.shape[1] == 3) == (images.shape[3] == 3):
        is_grey = 1 in (images.shape[1], images.shape[3])
        remedy = "repeat grey images to three channels" if is_grey else "give (N, 3, H, W) or (N, H, W, 3)"
        raise UserError(f"{what}: images of shape {images.shape} have no axis of 3 channels to tell: {remedy}")
    if images.shape[1] == 3:
        images = images.transpose(0, 2, 3, 1)
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images), []
    if not np.issubdtype(images.dtype, np.floating):
        raise UserError(f"{what}: images are {images.dtype}; give uint8 (0 to 255) or float in [0, 1]")
    low, high = float(images.min()), float(images.max())
    if not (low >= -_SLACK and high <= 1 + _SLACK):  # nan too
        remedy = "divide by 255" if low >= 0 and 1 < high <= 255 else "leave their normalisation to the model (wrap)"
        raise UserError(f"{what}: images run from {low:g} to {high:g}; float images are in [0, 1]: {remedy}")
    levels = images.clip(0, 1) * 255.0
    whole = np.rint(levels)
    apart = float(np.abs(levels - whole).max())
    notes = [f"rounded to whole grey levels, by up to {apart:.2f} of one"] if apart > _LOSSLESS else []
    return np.ascontiguousarray(whole.astype(np.uint8)), notes


def _as_labels(labels: Any, count: int, what: str) -> np.ndarray:
    numbers = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    if numbers.dtype.kind not in "iu" or numbers.shape not in ((count,), (count, 1)):
        raise UserError(
            f"{what}: labels are {numbers.dtype} of shape {numbers.shape}; give {count} whole numbers, one per image"
        )
    numbers = numbers.reshape(-1).astype(np.int64)
    if numbers.min() < -1:
        raise UserError(f"{what}: label {numbers.min()} is none; labels start at 0, and -1 means unlabelled")
    return numbers
