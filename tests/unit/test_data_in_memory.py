"""Tensors, arrays and Datasets of a program become the images and labels that they are, or one line says why not."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from dist_defend.data.in_memory import is_in_memory, read_data
from dist_defend.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 1, 0])
NCHW = PIXELS.transpose(0, 3, 1, 2)


class Items(Dataset[Any]):
    """A Dataset of items that are made when they are read."""

    def __init__(self, item: Callable[[int], Any], count: int = 5, classes: Any = None) -> None:
        self.item, self.count = item, count
        if classes is not None:
            self.classes = classes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Any:
        return self.item(row)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield torch.zeros(3, 6, 7), 0


KINDS: dict[str, Any] = {
    "float tensors": (torch.tensor(NCHW / 255, dtype=torch.float32), torch.tensor(LABELS)),
    "double arrays, channels last": (PIXELS / 255, LABELS),
    "uint8 tensors": (torch.tensor(NCHW), torch.tensor(LABELS, dtype=torch.uint8)),
    "uint8 arrays, channels last": (PIXELS, LABELS.reshape(5, 1)),
    "a list, labels a list": [PIXELS, LABELS.tolist()],
    "a gradient": (torch.tensor(NCHW / 255, dtype=torch.float32, requires_grad=True), LABELS),
    "a TensorDataset": TensorDataset(torch.tensor(NCHW / 255, dtype=torch.float32), torch.tensor(LABELS)),
    "PIL images": Items(lambda row: (Image.fromarray(PIXELS[row]), int(LABELS[row]))),
    "arrays of a Dataset": Items(lambda row: (PIXELS[row], LABELS[row])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_gives_the_same_images(kind: str) -> None:
    assert is_in_memory(KINDS[kind])
    read = read_data(KINDS[kind], "data")
    assert read.images.dtype == np.uint8 and read.labels.dtype == np.int64
    assert np.array_equal(read.images, PIXELS) and np.array_equal(read.labels, LABELS)
    assert read.notes == []


def test_images_alone_have_no_labels_and_classes_of_a_dataset_are_its_own() -> None:
    assert read_data(torch.tensor(NCHW), "data").labels.tolist() == 5 * [-1]
    assert read_data(Items(KINDS["PIL images"].item, classes=["a", "b", "c"]), "data").classes == ("a", "b", "c")
    assert read_data(Items(KINDS["PIL images"].item, classes=[1, 2]), "data").classes is None


def test_grey_pil_images_have_three_equal_channels() -> None:
    grey = Items(lambda row: (Image.fromarray(PIXELS[row, :, :, 0]), 0))
    assert np.array_equal(read_data(grey, "data").images, PIXELS[..., :1].repeat(3, axis=3))


def test_rounding_is_told() -> None:
    images = np.full((1, 3, 4, 4), 100.3 / 255)
    images[0, :, 0] = 100.8 / 255
    read = read_data((images, [0]), "data")
    assert np.array_equal(np.unique(read.images), [100, 101]) and (read.images[0, 0] == 101).all()
    assert read.notes == ["rounded to whole grey levels, by up to 0.30 of one"]


@pytest.mark.parametrize("value", ["path", {"path": "x"}, 3, (0.2, 1.0), None, [1, 2]])
def test_other_values_are_no_data(value: Any) -> None:
    assert not is_in_memory(value)


RANDOM = np.random.default_rng(1)
X = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ((255 * X + 9, [0, 1]), "images run from 9 to 9; float images are in .*: divide by 255"),
        ((X - 2, [0, 1]), "images run from -2 to -2; .* leave their normalisation to the model"),
        ((X * torch.nan, [0, 1]), "images run from nan to nan"),
        ((X.long(), [0, 1]), "images are int64; give uint8"),
        ((X[:, :1], [0, 1]), "no axis of 3 channels to tell: repeat grey images"),
        ((X[:, :2], [0, 1]), "no axis of 3 channels to tell: give"),
        ((torch.zeros(2, 3, 4, 3), [0, 1]), "no axis of 3 channels to tell"),
        ((X[0], [0, 1]), r"images of shape \(3, 4, 4\)"),
        ((X[:0], []), r"images of shape \(0, 3, 4, 4\)"),
        ((X, [0]), r"labels are int64 of shape \(1,\); give 2 whole numbers"),
        ((X, [0.0, 1.0]), "labels are float64"),
        ((X, torch.eye(2)), "labels are float32"),
        ((X, [0, -2]), "label -2 is none"),
        (Items(lambda row: X[0], 2), "item 0 of the Dataset is a Tensor, not a pair"),
        (Items(lambda row: ("a.png", 0), 2), "image 0 is a str; give tensors, arrays or PIL"),
        (Items(lambda row: (X[0] + 7, 0), 2), "image 0: images run from 7 to 7"),
        (Items(lambda row: (np.zeros((4, 4 + row, 3), np.uint8), 0), 2), "images differ in size"),
        (Items(lambda row: (RANDOM.random((4, 4, 3)), 0), 2), "take random transforms out"),
        (Items(lambda row: (X[0], 0), 0), "there are no images"),
        (Endless(), "a Dataset without a length is not read"),
    ],
)
def test_what_is_no_data_set_is_one_line(data: Any, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        read_data(data, "test")
    assert str(error.value).startswith("test") and "\n" not in str(error.value)


def test_a_label_without_a_class_is_one_line() -> None:
    with pytest.raises(UserError, match="test: label 2 is none of 2 classes, 0 to 1"):
        read_data((PIXELS, LABELS), "test").source(["a", "b"])
