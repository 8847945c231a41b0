"""A prepared data set: a folder with images in one file, labels, and a manifest that can vouch for both.

Images lie in data.beton (FFCV's format, raw or JPEG; readable here without FFCV) or in images.npy (raw, one shape).
Where their order is not the source's, order.npy says which row of the source each one is.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import dacite
import numpy as np

from dist_defend.data.beton import read_beton
from dist_defend.data.ffcv_presence import ffcv_installed
from dist_defend.data.pixels import Pixels, StoredImages
from dist_defend.data.sources import Source
from dist_defend.data.writing import (
    MOST_BROKEN,
    BrokenImage,
    BrokenImagesError,
    PreparedImages,
    broken_images_error,
    resized,
    write_beton,
    write_npy,
)
from dist_defend.errors import UserError
from dist_defend.files import sha256_file

FORMAT = 1
_ORDER_STREAM = 0x0DE5  # keeps the order of the rows apart from the epochs' orders
_CHUNK = 64  # images decoded at once where each is resized


@dataclass(frozen=True)
class StoredFile:
    """What a file must be to be the one that was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """manifest.json. image_shape: (H, W, 3), or None where images differ in size. Label -1 means unlabelled.

    order_seed: of the shuffled order of the rows, None for the source's. source_samples: rows that the source has.
    skipped: images that could not be read and were left out. notes: what the source wanted said.
    """

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
    order_seed: int | None = None
    source_samples: int | None = None
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class PreparedDataset:
    """An opened data set. labels: (N,) int64; classes: their names; image_shape: (H, W, 3), None if images differ.

    resize: every image is resized to a square of so many pixels when it is read. There is no .beton then: back ends
    read through images().
    """

    def __init__(self, path: Path, manifest: Manifest, resize: int | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self.classes = manifest.classes
        self.num_classes = len(manifest.classes)
        self.resize = None if manifest.image_shape == (resize, resize, 3) else resize
        self.image_shape = (self.resize, self.resize, 3) if self.resize else manifest.image_shape
        self._is_beton = "data.beton" in manifest.files
        self.beton = path / "data.beton" if self._is_beton and not self.resize else None
        self.labels: np.ndarray = np.load(path / "labels.npy", allow_pickle=False)

    def __len__(self) -> int:
        return self.manifest.num_samples

    @property
    def digest(self) -> str:
        """sha256 over the names and sha256s of the files, and over ``resize`` where there is one."""
        lines = "".join(f"{name} {file.sha256}\n" for name, file in sorted(self.manifest.files.items()))
        lines += f"resize {self.resize}\n" if self.resize else ""
        return hashlib.sha256(lines.encode()).hexdigest()

    @cached_property
    def _array(self) -> np.ndarray:
        return np.load(self.path / "images.npy", mmap_mode="r", allow_pickle=False)

    @cached_property
    def _stored(self) -> StoredImages:
        return read_beton(self.path / "data.beton")

    @cached_property
    def source_rows(self) -> np.ndarray:
        """The source's row of each of ours, (N,) int64. UserError for an order.npy that is none."""
        if "order.npy" not in self.manifest.files:
            return np.arange(len(self), dtype=np.int64)
        rows = np.load(self.path / "order.npy", allow_pickle=False)
        is_order = rows.dtype == np.int64 and rows.shape == (len(self),) and len(np.unique(rows)) == len(rows)
        if not is_order or rows.min() < 0 or rows.max() >= self.num_source_rows:
            raise UserError(
                f"{self.path / 'order.npy'}: does not name a row for each image; prepare the data set again"
            )
        return rows

    @property
    def num_source_rows(self) -> int:
        """Rows that the source has, also those that were left out here."""
        return self.manifest.source_samples or len(self)

    def rows_of(self, source_rows: np.ndarray) -> np.ndarray:
        """Our rows, ascending, of these different rows of the source. UserError if one of them is not here."""
        found = np.flatnonzero(np.isin(self.source_rows, source_rows))
        if len(found) != len(source_rows):
            missing = source_rows[~np.isin(source_rows, self.source_rows)][0]
            raise UserError(
                f"{self.path} has no row {missing} of its source: it has {len(self)} of {self.num_source_rows} rows"
            )
        return found

    def rows_of_class(self, label: int) -> np.ndarray:
        """The rows with this label, in the source's order: the same images however the rows were shuffled."""
        rows = np.flatnonzero(self.labels == label)
        return rows[np.argsort(self.source_rows[rows])]

    def image(self, row: int) -> np.ndarray:
        """One image, (H, W, 3) uint8."""
        image = self._stored[row : row + 1].decode().image(0) if self._is_beton else self._array[row]
        return resized(image, (self.resize, self.resize)) if self.resize else image

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Images (B, H, W, 3) uint8 in the order of ``rows``, decoded but not augmented; they must have one shape."""
        if self.image_shape is None:
            raise UserError(
                f"{self.path}: images differ in size; prepare the data set with --image-size, or say resize in its "
                "section of the configuration"
            )
        if self.resize:
            return self._resized(rows)
        if not self._is_beton:
            return np.asarray(self._array[rows])
        return self._stored[rows].decode().stack() if len(rows) else np.empty((0, *self.image_shape), np.uint8)

    def _resized(self, rows: np.ndarray) -> np.ndarray:
        assert self.resize is not None
        out = np.empty((len(rows), self.resize, self.resize, 3), np.uint8)
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            pixels = self._stored[part].decode() if self._is_beton else Pixels.of(self._array[part])
            for i in range(len(part)):
                out[start + i] = resized(pixels.image(i), (self.resize, self.resize))
        return out

    def verify(self) -> None:
        """Hash every file. UserError names the first that is not what was written."""
        for name, file in self.manifest.files.items():
            if sha256_file(self.path / name) != file.sha256:
                raise UserError(
                    f"{self.path / name}: content differs from manifest.json (sha256); prepare the data set again"
                )


def open_dataset(path: str | Path, resize: int | None = None) -> PreparedDataset:
    """Open a folder that `dist-defend data prepare` wrote, images resized to a square of ``resize`` pixels if wanted.

    UserError if it is missing, cut short or something else.
    """
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
    return PreparedDataset(path, manifest, resize)


@dataclass(frozen=True)
class WriteOptions:
    """How images are stored.

    image_size: resize to a square of this many pixels. max_resolution: shrink so that the longer side has at most so
    many pixels, keeping the aspect ratio. Both with Pillow's bilinear filter. write_mode: raw or jpg (``quality``
    0..100). storage: beton, npy, or auto (beton where ffcv is installed). order_seed: of the shuffled order in which
    rows are written; None keeps the source's. max_samples: so many rows, the first in this order. skip_broken: so many
    images that cannot be read are left out, in all splits together.
    """

    write_mode: str = "raw"
    image_size: int | None = None
    max_resolution: int | None = None
    quality: int = 90
    storage: str = "auto"
    max_samples: int | None = None
    order_seed: int | None = None
    skip_broken: int = 0


def write_dataset(source: Source, out: str | Path, *, name: str, split: str, **options: Any) -> PreparedDataset:
    """Write the images and labels of ``source`` to the folder ``out``, which appears whole or not at all.

    options: those of WriteOptions. UserError for what cannot be, or replaced.
    """
    return write_splits({split: source}, {split: Path(out)}, name=name, options=WriteOptions(**options))[0]


def write_splits(
    sources: Mapping[str, Source], places: Mapping[str, Path], *, name: str, options: WriteOptions
) -> list[PreparedDataset]:
    """Write each split to its folder; they appear together, when all are whole, or none does.

    UserError as write_dataset's; it tells of every image in every split that cannot be read.
    """
    storage = _choose_storage(options.storage, options.write_mode)
    for out in places.values():
        if out.exists() and not (out / "manifest.json").is_file() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out}: exists and is not a prepared data set; choose another --out")
    most_broken = max(MOST_BROKEN, options.skip_broken)
    images = {
        split: PreparedImages(
            source, _rows(len(source), options), options.image_size, options.max_resolution, most_broken
        )
        for split, source in sources.items()
    }
    broken: list[BrokenImage] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(_writable(list(places.values())))
        folders = {split: stack.enter_context(_whole_folder(places[split])) for split in sources}
        for split, folder in folders.items():
            kept, skipped = _write_images(images[split], folder, storage, options, options.skip_broken - len(broken))
            broken += skipped
            if len(broken) > most_broken:
                break
            if len(broken) <= options.skip_broken:
                _write_labels(kept, skipped, sources[split], folder, name, split, options)
        if len(broken) > options.skip_broken:
            raise broken_images_error(broken, options.skip_broken)
    return [open_dataset(places[split]) for split in sources]


@contextlib.contextmanager
def _writable(places: Sequence[Path]) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # those of readers are broken images
        where = ", ".join(map(str, places))
        raise UserError(f"{where}: cannot be written ({error.strerror or error}); choose another --out") from error


def _rows(count: int, options: WriteOptions) -> np.ndarray:
    """The source's rows in the order in which they are written."""
    rows = np.arange(count, dtype=np.int64)
    if options.order_seed is not None:
        rows = np.random.default_rng([options.order_seed, _ORDER_STREAM]).permutation(rows)
    return rows[: options.max_samples]


def _write_images(
    images: PreparedImages, folder: Path, storage: str, options: WriteOptions, most: int
) -> tuple[PreparedImages, list[BrokenImage]]:
    """Write the images' file, without those that cannot be read if they are at most so many; what was written, and
    those."""
    broken: list[BrokenImage] = []
    while True:
        try:
            if storage == "beton":
                write_beton(images, folder / "data.beton", options.write_mode, options.quality)
            else:
                write_npy(images, folder / "images.npy")
            return images, broken
        except BrokenImagesError as error:
            broken += error.images
            if len(broken) > most:
                return images, broken
            images = images.without(error.images)
            for file in folder.iterdir():
                file.unlink()


def _write_labels(
    images: PreparedImages,
    skipped: Sequence[BrokenImage],
    source: Source,
    folder: Path,
    name: str,
    split: str,
    options: WriteOptions,
) -> None:
    """Write what belongs to the images: labels, order, manifest."""
    np.save(folder / "labels.npy", images.labels)
    if not np.array_equal(images.rows, np.arange(len(images))):
        np.save(folder / "order.npy", images.rows)
    shapes = {(int(height), int(width)) for height, width in images.shapes}
    manifest = Manifest(
        format=FORMAT,
        name=name,
        split=split,
        num_samples=len(images),
        classes=tuple(source.classes),
        class_counts=tuple(int((images.labels == c).sum()) for c in range(len(source.classes))),
        image_shape=(*shapes.pop(), 3) if len(shapes) == 1 else None,
        write_mode=options.write_mode,
        max_resolution=options.max_resolution,
        quality=options.quality if options.write_mode == "jpg" else None,
        files={p.name: StoredFile(p.stat().st_size, sha256_file(p)) for p in sorted(folder.iterdir())},
        order_seed=options.order_seed,
        source_samples=len(source),
        skipped=tuple(image.name for image in skipped),
        notes=tuple(getattr(source, "notes", ())),
    )
    text = json.dumps(dataclasses.asdict(manifest), indent=1) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


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
    before = out.parent / f"{aside.name}.before"
    try:
        yield aside
        if out.exists():
            out.replace(before)
        aside.replace(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)
