"""Published data sets: torchvision's, scikit-learn's digits, and Fashion-MNIST as Debian has it."""

import contextlib
import gzip
import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_defend.data.reading import ArraySource, NotedSource, TorchvisionSource
from dist_defend.errors import UserError
from dist_defend.files import open_regular, read_regular

_FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DEBIAN_FASHION = "usr/share/datasets/fashion-mnist"
_SYSTEM_FASHION = Path("/") / _DEBIAN_FASHION
_MOST_BYTES = 1 << 30  # of an idx file
_FREE_BYTES = 64 << 20  # that a packed one may have beyond four times its size
STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def open_digits(path: str | None, split: str) -> NotedSource:
    """scikit-learn's 1,797 8x8 digits: 360 stratified test images, the rest for training."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if path is not None:
        raise UserError("digits come with scikit-learn; leave out --path")
    images, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    rows = np.sort(train if split == "train" else test)
    grey = np.rint(images[rows].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return ArraySource(grey, labels[rows], DIGITS, origin="digits")


def open_fashion_mnist(path: str | None, split: str) -> NotedSource:
    stem = "train" if split == "train" else "t10k"
    folder = _fashion_folder(path)
    images = _read_idx(folder, f"{stem}-images-idx3-ubyte", 3)
    labels = _read_idx(folder, f"{stem}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise UserError(f"{folder}: {len(images)} {stem} images but {len(labels)} labels; fetch the files again")
    return ArraySource(images, labels, _FASHION_CLASSES, origin=str(folder))


def _read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """An idx file of unsigned bytes (LeCun's MNIST format), gzipped or not."""
    file = next((folder / n for n in (name, f"{name}.gz") if (folder / n).is_file()), None)
    if file is None:
        raise UserError(f"{folder / name}: missing; check --path")
    try:
        data = _unpacked(file) if file.suffix == ".gz" else read_regular(file, _MOST_BYTES)
        shape = np.frombuffer(data, ">i4", count=dimensions, offset=4)
        if data[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError("magic number")
        if min(shape) < 1:  # -1 would mean whatever fits
            raise ValueError("no shape")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{file}: not a whole idx file; fetch it again") from error


def _unpacked(file: Path) -> bytes:
    with open_regular(file) as packed, gzip.open(packed) as stream:
        most = 4 * os.fstat(packed.fileno()).st_size + _FREE_BYTES
        data: bytes = stream.read(most + 1)
    if len(data) > most:
        raise UserError(f"{file}: unpacks to more than {most:,} bytes, which no such file does; fetch it again")
    return data


def _fashion_folder(path: str | None) -> Path:
    """Where the four idx files are: --path, Debian's package (installed, or unpacked without root), torchvision."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist_defend"
    places = [_SYSTEM_FASHION, cache / _DEBIAN_FASHION, cache / "FashionMNIST" / "raw"]
    if path is not None:
        root = Path(path)
        if not root.exists():
            raise UserError(f"{path}: no such file or folder; check --path")
        places = [root, root / "raw", root / "FashionMNIST" / "raw", root / _DEBIAN_FASHION]
    for folder in places:
        if any(folder.glob("train-images-idx3-ubyte*")):
            return folder
    if path is not None:
        raise UserError(f"{path}: no train-images-idx3-ubyte(.gz) in it; check --path")
    if _unpack_debian_fashion(cache):
        return cache / _DEBIAN_FASHION
    _torchvision("FashionMNIST", str(cache), train=True)
    return cache / "FashionMNIST" / "raw"


def _unpack_debian_fashion(cache: Path) -> bool:
    """Fetch dataset-fashion-mnist with apt and unpack it into the cache; needs no root. False where that fails."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return False
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        fetched = subprocess.run(["apt-get", "download", "dataset-fashion-mnist"], cwd=scratch, capture_output=True)
        packages = list(Path(scratch).glob("*.deb"))
        if fetched.returncode or not packages:
            return False
        unpacked = subprocess.run(["dpkg-deb", "-x", str(packages[0]), f"{scratch}/tree"], capture_output=True)
        if unpacked.returncode:
            return False
        (cache / _DEBIAN_FASHION).parent.mkdir(parents=True, exist_ok=True)
        Path(scratch, "tree", _DEBIAN_FASHION).replace(cache / _DEBIAN_FASHION)
    return True


def _torchvision(name: str, path: str | None, **options: Any) -> Any:
    """A torchvision data set as it lies in ``path``, else downloaded there."""
    import torchvision.datasets

    if path is None:
        raise UserError(f"{name} needs --path: a folder that has it, or that it may be downloaded to")
    make = getattr(torchvision.datasets, name)
    with contextlib.suppress(OSError, RuntimeError):  # not found, or damaged
        return make(path, **options)
    try:
        return make(path, **options, download=True)
    except (OSError, RuntimeError) as error:
        told = f"{path}: {name} is not there and cannot be downloaded ({error})"
        raise UserError(f"{told}; put torchvision's files there") from error


def with_train(name: str) -> Callable[[str | None, str], NotedSource]:
    """A torchvision data set that takes ``train``."""

    def make(path: str | None, split: str) -> NotedSource:
        dataset = _torchvision(name, path, train=split == "train")
        return TorchvisionSource(dataset, dataset.classes, f"{name} {split}")

    return make


def with_split(name: str, classes: Sequence[str]) -> Callable[[str | None, str], NotedSource]:
    """A torchvision data set that takes ``split``."""

    def make(path: str | None, split: str) -> NotedSource:
        return TorchvisionSource(_torchvision(name, path, split=split), classes, f"{name} {split}")

    return make
