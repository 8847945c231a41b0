"""Where images come from: what `dist-defend data prepare KIND` can read.

A source has a length, items (image, label) with an (H, W, 3) or (H, W) uint8 array or a PIL image, and class names.
Label -1 means that the source gives none.
"""

import gzip
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dist_defend.data.patches import PatchSource, open_photographs
from dist_defend.errors import UserError

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
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DEBIAN_FASHION = "usr/share/datasets/fashion-mnist"
_SYSTEM_FASHION = Path("/") / _DEBIAN_FASHION
_NPZ_FILES = {"train": ("train", "train_224"), "test": ("test", "test_224"), "unlabeled": ("train_unlabeled",)}


class Source(Protocol):
    """What write_dataset reads.

    It may also have ``name(row) -> str``, what messages call an image (the path of its file), and ``notes``, a list
    of what was noticed on the way; it is read after the last image.
    """

    @property
    def classes(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> tuple[Any, int]: ...


class ArraySource:
    """Images (N, H, W[, 3]) uint8 and labels (N,) in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> None:
        self._images, self._labels, self.classes = images, labels, tuple(classes)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        return self._images[row], int(self._labels[row])


class TorchvisionSource:
    """A torchvision data set; target None becomes -1."""

    def __init__(self, dataset: Any, classes: Sequence[str]) -> None:
        self._dataset, self.classes = dataset, tuple(classes)
        self._samples = getattr(dataset, "samples", None)  # (path, label) of a folder's

    def name(self, row: int) -> str:
        """The path of its file; for a data set without files its row."""
        return str(self._samples[row][0]) if self._samples else f"image {row} of the source"

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        image, label = self._dataset[row]
        return image, -1 if label is None else int(label)


def open_source(kind: str, path: str | None, split: str) -> Source:
    """One split of a source. UserError for an unknown kind or split, or files that cannot be had."""
    if kind not in _KINDS:
        raise UserError(f"unknown kind of data {kind!r}; known: {', '.join(_KINDS)}")
    if split not in source_splits(kind, path):
        raise UserError(f"{kind} has no split {split!r} here; it has {', '.join(source_splits(kind, path))}")
    return _KINDS[kind](path, split)


def source_splits(kind: str, path: str | None) -> list[str]:
    """The splits that this source has; for npz and imagefolder those that lie in ``path``."""
    if kind == "npz":
        return list(_npz_files(_needed(kind, path)))
    if kind == "imagefolder":
        root = _needed(kind, path)
        found = [name for name in ("train", "val", "test", "unlabeled") if (root / name).is_dir()]
        return found or ["train"]
    if kind == "one_image":
        return ["train"]
    return ["train", "test", "unlabeled"] if kind == "stl10" else ["train", "test"]


def _needed(kind: str, path: str | None) -> Path:
    if path is None:
        raise UserError(f"{kind} needs --path")
    if not Path(path).exists():
        raise UserError(f"{path}: no such file or folder; check --path")
    return Path(path)


def _npz_files(path: Path) -> dict[str, Path]:
    """Split -> file, in BadEncoder's names; a single file is its own stem's split, or train."""
    names = {stem: split for split, stems in _NPZ_FILES.items() for stem in stems}
    if path.is_file():
        return {names.get(path.stem, "train"): path}
    found = {
        split: [path / f"{stem}.npz" for stem in stems if (path / f"{stem}.npz").is_file()]
        for split, stems in _NPZ_FILES.items()
    }
    several = [files for files in found.values() if len(files) > 1]
    if several:
        raise UserError(f"{path}: holds both {several[0][0].name} and {several[0][1].name}; give one file as --path")
    if not any(found.values()):
        raise UserError(f"{path}: no train.npz, test.npz or train_unlabeled.npz in this folder; check --path")
    return {split: files[0] for split, files in found.items() if files}


def load_image_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images x (N, H, W, 3) uint8 and labels y (N,) int64 of a file in BadEncoder's layout. UserError if it is not."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("x", "y") if name in file.files}
    except Exception as error:  # zipfile, zlib and numpy each raise their own
        reason = (
            "it holds Python objects, which are not read" if "allow_pickle" in str(error) else "not a whole npz file"
        )
        raise UserError(f"{path}: {reason}; expected arrays x (N, H, W, 3) uint8 and y (N,) or (N, 1)") from error
    for name in ("x", "y"):
        if name not in arrays:
            raise UserError(f"{path}: no array {name!r}; expected x (N, H, W, 3) uint8 and y (N,) or (N, 1)")
    x, y = arrays["x"], arrays["y"]
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] != 3 or not x.size:
        raise UserError(f"{path}: x is {x.dtype} of shape {x.shape}; expected uint8 (N, H, W, 3)")
    if not np.issubdtype(y.dtype, np.integer) or y.shape not in ((len(x),), (len(x), 1)):
        raise UserError(f"{path}: y is {y.dtype} of shape {y.shape}; expected {len(x)} integer labels, (N,) or (N, 1)")
    return x, y.reshape(-1).astype(np.int64)


def _npz(path: str | None, split: str) -> Source:
    file = _npz_files(_needed("npz", path))[split]
    x, y = load_image_npz(file)
    if split == "unlabeled":
        y = np.full(len(y), -1)
    if y.min() < -1:
        raise UserError(f"{file}: y has the label {y.min()}; classes count from 0")
    return ArraySource(x, y, [str(label) for label in range(int(y.max()) + 1)])


def _imagefolder(path: str | None, split: str) -> Source:
    from torchvision.datasets import ImageFolder

    root = _needed("imagefolder", path)
    folder = root / split if (root / split).is_dir() else root
    try:
        dataset = ImageFolder(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no images in folders named after their classes; check --path") from error
    return TorchvisionSource(dataset, dataset.classes)


def _digits(path: str | None, split: str) -> Source:
    """scikit-learn's 1,797 8x8 digits: 360 stratified test images, the rest for training."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if path is not None:
        raise UserError("digits come with scikit-learn; leave out --path")
    images, labels = load_digits(return_X_y=True)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    rows = np.sort(train if split == "train" else test)
    grey = np.rint(images[rows].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return ArraySource(grey, labels[rows], _DIGITS)


def _fashion_mnist(path: str | None, split: str) -> Source:
    stem = "train" if split == "train" else "t10k"
    folder = _fashion_folder(path)
    images = _read_idx(folder, f"{stem}-images-idx3-ubyte", 3)
    labels = _read_idx(folder, f"{stem}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise UserError(f"{folder}: {len(images)} {stem} images but {len(labels)} labels; fetch the files again")
    return ArraySource(images, labels, _FASHION_CLASSES)


def _read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """An idx file of unsigned bytes (LeCun's MNIST format), gzipped or not."""
    file = next((folder / n for n in (name, f"{name}.gz") if (folder / n).is_file()), None)
    if file is None:
        raise UserError(f"{folder / name}: missing; check --path")
    try:
        data = file.read_bytes()
        data = gzip.decompress(data) if file.suffix == ".gz" else data
        shape = np.frombuffer(data, ">i4", count=dimensions, offset=4)
        if data[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError("magic number")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{file}: not a whole idx file; fetch it again") from error


def _fashion_folder(path: str | None) -> Path:
    """Where the four idx files are: --path, Debian's package (installed, or unpacked without root), torchvision."""

    def holds(folder: Path) -> bool:
        return any(folder.glob("train-images-idx3-ubyte*"))

    if path is not None:
        root = _needed("fashion_mnist", path)
        for folder in (root, root / "raw", root / "FashionMNIST" / "raw", root / _DEBIAN_FASHION):
            if holds(folder):
                return folder
        raise UserError(f"{path}: no train-images-idx3-ubyte(.gz) in it; check --path")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist_defend"
    for folder in (_SYSTEM_FASHION, cache / _DEBIAN_FASHION, cache / "FashionMNIST" / "raw"):
        if holds(folder):
            return folder
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
    try:
        return make(path, **options)
    except (OSError, RuntimeError):  # not found, or damaged
        pass
    try:
        return make(path, **options, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{path}: {name} is not there and cannot be downloaded ({error}); put torchvision's files there"
        ) from error


def _with_train(name: str) -> Callable[[str | None, str], Source]:
    def make(path: str | None, split: str) -> Source:
        dataset = _torchvision(name, path, train=split == "train")
        return TorchvisionSource(dataset, dataset.classes)

    return make


def _with_split(name: str, classes: Sequence[str]) -> Callable[[str | None, str], Source]:
    def make(path: str | None, split: str) -> Source:
        return TorchvisionSource(_torchvision(name, path, split=split), classes)

    return make


_STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
_KINDS: dict[str, Callable[[str | None, str], Source]] = {
    "npz": _npz,
    "imagefolder": _imagefolder,
    "cifar10": _with_train("CIFAR10"),
    "cifar100": _with_train("CIFAR100"),
    "stl10": _with_split("STL10", _STL10_CLASSES),
    "svhn": _with_split("SVHN", _DIGITS),
    "gtsrb": _with_split("GTSRB", [str(sign) for sign in range(43)]),
    "fashion_mnist": _fashion_mnist,
    "digits": _digits,
    "one_image": lambda path, split: PatchSource(open_photographs(path)),
}
KINDS = tuple(_KINDS)
