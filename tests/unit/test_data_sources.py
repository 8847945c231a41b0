"""What can be prepared, from files laid out as their publishers do."""

import gzip
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image

from dist_defend.data import published
from dist_defend.data.sources import KINDS, open_source, source_splits
from dist_defend.errors import UserError

RANDOM = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def refused(told: str, kind: str, path: Path | None, split: str = "train") -> None:
    with pytest.raises(UserError, match=told) as caught:
        open_source(kind, None if path is None else str(path), split)
    assert "\n" not in str(caught.value)


def test_npz_in_badencoders_layout(tmp_path: Path) -> None:
    x = noise(6, 8, 8, 3)
    np.savez(tmp_path / "train.npz", x=x, y=np.array([[0], [3], [1], [1], [0], [2]]))
    np.savez(tmp_path / "test_224.npz", x=x[:2], y=np.array([1, 2]))
    np.savez(tmp_path / "train_unlabeled.npz", x=x, y=np.zeros((6, 1), int))
    assert source_splits("npz", str(tmp_path)) == ["train", "test", "unlabeled"]
    train = open_source("npz", str(tmp_path), "train")
    assert len(train) == 6 and train.classes == ("0", "1", "2", "3")
    assert all(np.array_equal(train[i][0], x[i]) for i in range(6)) and [train[i][1] for i in range(6)] == [
        0,
        3,
        1,
        1,
        0,
        2,
    ]
    assert open_source("npz", str(tmp_path), "test")[1][1] == 2
    assert open_source("npz", str(tmp_path), "unlabeled")[0][1] == -1
    assert source_splits("npz", str(tmp_path / "test_224.npz")) == ["test"]
    assert len(open_source("npz", str(tmp_path / "test_224.npz"), "test")) == 2


def test_npz_files_that_are_something_else(tmp_path: Path) -> None:
    x, y = noise(3, 8, 8, 3), np.arange(3)
    objects = np.array([{"a": 1}, None, "text"], dtype=object)
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "objects": ({"x": objects, "y": y}, "it holds Python objects, which are not read"),
        "labels": ({"x": x, "y": objects}, "it holds Python objects, which are not read"),
        "float": ({"x": x / 64, "y": y}, r"x is float64 of shape \(3, 8, 8, 3\) with levels from 0.* to 3"),
        "nan": ({"x": x / np.nan, "y": y}, "x is float64 of shape .* with levels from nan to nan"),
        "four": ({"x": noise(3, 8, 8, 4), "y": y}, r"x is uint8 of shape \(3, 8, 8, 4\); expected uint8"),
        "short": ({"x": x, "y": y[:2]}, r"y is int64 of shape \(2,\); expected 3 integer labels"),
        "one-hot": ({"x": x, "y": np.eye(3, dtype=int)}, r"y is int64 of shape \(3, 3\)"),
        "fraction": ({"x": x, "y": y / 2}, "y is float64"),
        "negative": ({"x": x, "y": y - 5}, "y has the label -5; classes count from 0"),
        "names": ({"mine": x, "y": y}, "no array 'x'.*--images and --labels: mine, y"),
        "alone": ({"x": x}, "no array 'y' beside 'x'"),
    }
    for name, (arrays, told) in wrong.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        refused(f"{name}.npz: {told}", "npz", tmp_path / f"{name}.npz")
    whole = (tmp_path / "float.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps({"x": x, "y": y}))
    (tmp_path / "empty.npz").touch()
    np.save(tmp_path / "array.npy", x)
    for name in ("cut.npz", "pickle.npz", "empty.npz", "array.npy"):
        refused(f"{name}: .*; expected arrays x", "npz", tmp_path / name)
    refused("nowhere: no such file or folder that may be read; check --path", "npz", tmp_path / "nowhere")
    refused("no train.npz, test.npz or train_unlabeled.npz", "npz", tmp_path)
    refused("npz needs --path", "npz", None)


def test_two_sizes_of_one_split_must_be_told_apart(tmp_path: Path) -> None:
    for name in ("train", "train_224"):
        np.savez(tmp_path / f"{name}.npz", x=noise(2, 8, 8, 3), y=np.arange(2))
    refused("holds both train.npz and train_224.npz; give one file", "npz", tmp_path)
    assert len(open_source("npz", str(tmp_path / "train_224.npz"), "train")) == 2


def test_image_folders(tmp_path: Path) -> None:
    for split, name, count in (("train", "cat", 2), ("train", "dog", 1), ("val", "dog", 3)):
        (tmp_path / split / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(noise(5, 7, 3)).save(tmp_path / split / name / f"{number}.png")
    assert source_splits("imagefolder", str(tmp_path)) == ["train", "val"]
    train = open_source("imagefolder", str(tmp_path), "train")
    assert train.classes == ("cat", "dog") and [train[row][1] for row in range(3)] == [0, 0, 1]
    assert np.asarray(train[0][0]).shape == (5, 7, 3)
    flat = open_source("imagefolder", str(tmp_path / "val"), "train")  # class folders right below
    assert len(flat) == 3 and flat.classes == ("dog",)
    (tmp_path / "void").mkdir()
    refused("void: no images in folders named after their classes", "imagefolder", tmp_path / "void")


def test_digits_are_split_once_and_evenly() -> None:
    train, test = open_source("digits", None, "train"), open_source("digits", None, "test")
    assert len(train) == 1437 and len(test) == 360
    counts = np.bincount([test[row][1] for row in range(360)])
    assert counts.min() >= 35 and counts.max() <= 37
    images = {split: {s[row][0].tobytes() for row in range(len(s))} for split, s in (("train", train), ("test", test))}
    assert not images["train"] & images["test"]
    everything = np.stack([test[row][0] for row in range(360)])
    assert everything.shape == (360, 8, 8) and everything.min() == 0 and everything.max() == 255
    refused("digits come with scikit-learn; leave out --path", "digits", Path("x"))
    refused("digits has no split 'val' here; it has train, test", "digits", None, "val")


def write_idx(folder: Path, stem: str, images: np.ndarray, labels: np.ndarray, zipped: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in ((f"{stem}-images-idx3-ubyte", images), (f"{stem}-labels-idx1-ubyte", labels)):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        data = header + array.astype(np.uint8).tobytes()
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(data) if zipped else data)


@pytest.mark.parametrize("place", [".", "FashionMNIST/raw", "usr/share/datasets/fashion-mnist"])
def test_fashion_mnist_from_a_folder(tmp_path: Path, place: str) -> None:
    train, test = noise(4, 28, 28), noise(3, 28, 28)
    write_idx(tmp_path / place, "train", train, np.array([9, 0, 1, 1]), zipped=True)
    write_idx(tmp_path / place, "t10k", test, np.array([2, 3, 4]), zipped=False)
    source = open_source("fashion_mnist", str(tmp_path), "train")
    assert len(source) == 4 and np.array_equal(source[2][0], train[2]) and source[0][1] == 9
    assert source.classes[9] == "ankle boot" and len(source.classes) == 10
    assert np.array_equal(open_source("fashion_mnist", str(tmp_path), "test")[1][0], test[1])


def test_damaged_fashion_mnist(tmp_path: Path) -> None:
    refused("no train-images-idx3-ubyte.* in it; check --path", "fashion_mnist", tmp_path)
    write_idx(tmp_path, "train", noise(4, 28, 28), np.zeros(3), zipped=True)
    refused("4 train images but 3 labels", "fashion_mnist", tmp_path)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-100])
    refused("train-images-idx3-ubyte.gz: not a whole idx file", "fashion_mnist", tmp_path)
    refused("t10k-images-idx3-ubyte: missing", "fashion_mnist", tmp_path, "test")


def test_fashion_mnist_without_path_is_unpacked_from_debians_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """apt-get is played by a script that makes a package with the right file in it."""
    content = tmp_path / "content"
    write_idx(content / "usr/share/datasets/fashion-mnist", "train", noise(2, 28, 28), np.array([5, 6]), zipped=True)
    (content / "DEBIAN").mkdir()
    fields = {"Package": "dataset-fashion-mnist", "Version": "1", "Architecture": "all", "Maintainer": "t <t@t>"}
    control = "".join(f"{key}: {value}\n" for key, value in fields.items()) + "Description: test\n"
    (content / "DEBIAN" / "control").write_text(control)
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "apt-get"
    fake.write_text(f"#!/bin/sh\nexec dpkg-deb --build {content} dataset-fashion-mnist_1_all.deb\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(published, "_SYSTEM_FASHION", tmp_path / "not-installed")
    assert [open_source("fashion_mnist", None, "train")[row][1] for row in range(2)] == [5, 6]
    fake.write_text("#!/bin/sh\nexit 1\n")  # the second time it comes from the cache
    assert len(open_source("fashion_mnist", None, "train")) == 2


def test_fashion_mnist_that_cannot_be_had_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(published, "_SYSTEM_FASHION", tmp_path / "not-installed")
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.download", unreachable)
    refused("FashionMNIST is not there and cannot be downloaded .no route to host.", "fashion_mnist", None)


def unreachable(*_: object) -> None:
    raise OSError("no route to host")


def make_cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        batch = {"data": noise(2, 3072), "labels": [3, 7]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {n}" for n in range(10)]}))


def make_cifar100(root: Path) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir()
    for name, count in (("train", 10), ("test", 2)):
        labels = [3, 7] * (count // 2)
        (folder / name).write_bytes(pickle.dumps({"data": noise(count, 3072), "fine_labels": labels}))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"class {n}" for n in range(100)]}))


def make_stl10(root: Path) -> None:
    folder = root / "stl10_binary"
    folder.mkdir()
    for name, count in (("train", 10), ("test", 2), ("unlabeled", 4)):
        noise(count, 3, 96, 96).tofile(folder / f"{name}_X.bin")
        (np.array([3, 7] * (count // 2), np.uint8) + 1).tofile(
            folder / f"{name}_y.bin"
        )  # published labels count from 1
    (folder / "class_names.txt").write_text("\n".join(f"class {n}" for n in range(10)))


def make_svhn(root: Path) -> None:
    for name, count in (("train", 10), ("test", 2)):
        arrays = {"X": noise(32, 32, 3, count), "y": np.array([[3], [7]] * (count // 2))}
        scipy.io.savemat(root / f"{name}_32x32.mat", arrays)


def make_gtsrb(root: Path) -> None:
    training, test = root / "gtsrb" / "GTSRB" / "Training", root / "gtsrb" / "GTSRB" / "Final_Test" / "Images"
    for label in range(43):
        (training / f"{label:05d}").mkdir(parents=True)
        Image.fromarray(noise(30 + label, 40, 3)).save(training / f"{label:05d}" / "00000.ppm")
    test.mkdir(parents=True)
    for number in range(2):
        Image.fromarray(noise(30, 40, 3)).save(test / f"{number:05d}.ppm")
    (root / "gtsrb" / "GT-final_test.csv").write_text("Filename;ClassId\n00000.ppm;3\n00001.ppm;7\n")


@pytest.mark.parametrize(
    ("kind", "make", "num_classes", "train_labels"),
    [
        ("cifar10", make_cifar10, 10, [3, 7] * 5),
        ("cifar100", make_cifar100, 100, [3, 7] * 5),
        ("stl10", make_stl10, 10, [3, 7] * 5),
        ("svhn", make_svhn, 10, [3, 7] * 5),
        ("gtsrb_torchvision", make_gtsrb, 43, list(range(43))),
    ],
)
def test_torchvisions_data_sets_on_disk(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    make: Callable[[Path], None],
    num_classes: int,
    train_labels: list[int],
) -> None:
    for module in ("cifar", "stl10", "svhn"):  # our tiny files have other checksums than the published ones
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, *_: Path(path).exists())
    make(tmp_path)
    train, test = (open_source(kind, str(tmp_path), split) for split in ("train", "test"))
    assert [train[row][1] for row in range(len(train))] == train_labels
    assert test[0][1] == 3 and test[1][1] == 7 and len(test.classes) == num_classes
    assert np.asarray(train[0][0]).shape[2] == 3
    if kind == "stl10":
        unlabeled = open_source(kind, str(tmp_path), "unlabeled")
        assert len(unlabeled) == 4


@pytest.mark.parametrize("kind", ["cifar10", "cifar100", "stl10", "svhn", "gtsrb", "gtsrb_torchvision"])
def test_torchvisions_data_sets_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", unreachable)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    refused("is not there and cannot be downloaded", kind, tmp_path)
    refused("needs --path", kind, None)


def test_every_kind_has_a_split_and_others_are_refused() -> None:
    assert set(KINDS) >= {
        "npz",
        "imagefolder",
        "cifar10",
        "cifar100",
        "stl10",
        "svhn",
        "gtsrb",
        "fashion_mnist",
        "digits",
    }
    refused("unknown kind of data 'mnist'; known: npz, imagefolder", "mnist", None)
