"""A prepared data set: a folder with images in one file, labels, and a manifest that can vouch for both.

Images lie in data.beton (FFCV's format, raw or JPEG; readable here without FFCV) or in images.npy (raw, one shape).
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import dacite
import numpy as np

from dist_defend.data.beton import read_beton
from dist_defend.data.ffcv_presence import ffcv_installed
from dist_defend.data.pixels import StoredImages
from dist_defend.data.sources import Source
from dist_defend.data.writing import PreparedImages, write_beton
from dist_defend.errors import UserError
from dist_defend.files import sha256_file

FORMAT = 1


@dataclass(frozen=True)
class StoredFile:
    """What a file must be to be the one that was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """manifest.json. image_shape: (H, W, 3), or None where images differ in size. Label -1 means unlabelled."""

    format: int
    name: str
    split: str
    num_samples: int
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    image_shape: tuple[int, int, int] | None
    write_mode: str
    max_resolution: int | None
    quality: int | None
    files: dict[str, StoredFile]


class PreparedDataset:
    """An opened data set. labels: (N,) int64; classes: their names; image_shape: (H, W, 3), None if images differ."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.classes = manifest.classes
        self.num_classes = len(manifest.classes)
        self.image_shape = manifest.image_shape
        self.beton = path / "data.beton" if "data.beton" in manifest.files else None
        self.labels: np.ndarray = np.load(path / "labels.npy", allow_pickle=False)

    def __len__(self) -> int:
        return self.manifest.num_samples

    @property
    def digest(self) -> str:
        """sha256 over the names and sha256s of the files."""
        lines = "".join(f"{name} {file.sha256}\n" for name, file in sorted(self.manifest.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    @cached_property
    def _array(self) -> np.ndarray:
        return np.load(self.path / "images.npy", mmap_mode="r", allow_pickle=False)

    @cached_property
    def _stored(self) -> StoredImages:
        return read_beton(self.path / "data.beton")

    def image(self, row: int) -> np.ndarray:
        """One image, (H, W, 3) uint8."""
        return self._stored[row : row + 1].decode().image(0) if self.beton else self._array[row]

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Images (B, H, W, 3) uint8 in the order of ``rows``, decoded but not augmented; they must have one shape."""
        if self.image_shape is None:
            raise UserError(f"{self.path}: images differ in size; prepare the data set with --image-size")
        if self.beton is None:
            return np.asarray(self._array[rows])
        return self._stored[rows].decode().stack() if len(rows) else np.empty((0, *self.image_shape), np.uint8)

    def verify(self) -> None:
        """Hash every file. UserError names the first that is not what was written."""
        for name, file in self.manifest.files.items():
            if sha256_file(self.path / name) != file.sha256:
                raise UserError(
                    f"{self.path / name}: content differs from manifest.json (sha256); prepare the data set again"
                )


def open_dataset(path: str | Path) -> PreparedDataset:
    """Open a folder that `dist-defend data prepare` wrote. UserError if it is missing, cut short or something else."""
    path = Path(path)
    place = path / "manifest.json"
    try:
        text = place.read_text(encoding="utf-8")
    except OSError as error:
        splits = sorted(str(p.parent) for p in path.glob("*/manifest.json")) if path.is_dir() else []
        hint = f"name one of its splits: {', '.join(splits)}" if splits else "make it with 'dist-defend data prepare'"
        raise UserError(f"{path}: not a prepared data set (no manifest.json); {hint}") from error
    try:
        raw = json.loads(text)
        manifest = dacite.from_dict(Manifest, raw, dacite.Config(cast=[tuple], strict=True))
        if manifest.format != FORMAT:
            raise ValueError(f"format {manifest.format}")
    except (ValueError, TypeError, dacite.DaciteError) as error:
        raise UserError(f"{place}: not a manifest of this version; prepare the data set again") from error
    for name, file in manifest.files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != file.bytes:
            what = "is missing" if found is None else f"has {found} bytes instead of {file.bytes}"
            raise UserError(f"{path / name}: {what}; prepare the data set again")
    return PreparedDataset(path, manifest)


def write_dataset(
    source: Source,
    out: str | Path,
    *,
    name: str,
    split: str,
    write_mode: str = "raw",
    image_size: int | None = None,
    max_resolution: int | None = None,
    quality: int = 90,
    storage: str = "auto",
    max_samples: int | None = None,
) -> PreparedDataset:
    """Write every image and label of ``source`` to the folder ``out``, which appears whole or not at all.

    image_size: resize to a square of this many pixels. max_resolution: shrink so that the longer side has at most so
    many pixels, keeping the aspect ratio. Both with Pillow's bilinear filter. write_mode: raw or jpg (``quality``
    0..100). storage: beton, npy, or auto (beton where ffcv is installed). UserError for what cannot be, or replaced.
    """
    out = Path(out)
    images = PreparedImages(source, image_size, max_resolution, max_samples)
    storage = _choose_storage(storage, write_mode)
    if out.exists() and not (out / "manifest.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not a prepared data set; choose another --out")
    with _whole_folder(out) as folder:
        if storage == "beton":
            write_beton(images, folder / "data.beton", write_mode, quality)
        else:
            _write_npy(images, folder / "images.npy")
        np.save(folder / "labels.npy", images.labels)
        shapes = {(int(height), int(width)) for height, width in images.shapes}
        manifest = Manifest(
            format=FORMAT,
            name=name,
            split=split,
            num_samples=len(images),
            classes=tuple(source.classes),
            class_counts=tuple(int((images.labels == c).sum()) for c in range(len(source.classes))),
            image_shape=(*shapes.pop(), 3) if len(shapes) == 1 else None,
            write_mode=write_mode,
            max_resolution=max_resolution,
            quality=quality if write_mode == "jpg" else None,
            files={p.name: StoredFile(p.stat().st_size, sha256_file(p)) for p in sorted(folder.iterdir())},
        )
        (folder / "manifest.json").write_text(
            json.dumps(dataclasses.asdict(manifest), indent=1) + "\n", encoding="utf-8"
        )
    return open_dataset(out)


def _choose_storage(storage: str, write_mode: str) -> str:
    if storage == "auto":
        storage = "beton" if ffcv_installed() else "npy"
    if storage == "beton" and not ffcv_installed():
        raise UserError(
            "--storage beton needs ffcv, which is not installed; pip install 'dist-defend[ffcv]' or --storage npy"
        )
    if storage == "npy" and write_mode != "raw":
        raise UserError(
            "--write-mode jpg needs .beton storage, so ffcv; pip install 'dist-defend[ffcv]' or --write-mode raw"
        )
    return storage


@contextlib.contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place on success and vanishes on failure."""
    aside = out.parent / f".{out.name}.{os.getpid()}"
    aside.mkdir(parents=True)
    try:
        yield aside
        shutil.rmtree(out, ignore_errors=True)
        aside.replace(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_npy(images: PreparedImages, path: Path) -> None:
    array: np.memmap | None = None
    for row, image in enumerate(images):
        if array is None:
            array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(images), *image.shape))
        if image.shape != array.shape[1:]:
            raise UserError("--storage npy needs images of one size; give --image-size")
        array[row] = image
    assert array is not None
    array.flush()
