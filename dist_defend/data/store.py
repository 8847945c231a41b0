"""A prepared data set: a folder with images in one file, labels, and a manifest that can vouch for both.

Images lie in data.beton (FFCV's format, raw or JPEG; readable here without FFCV) or in images.npy (raw, one shape).
Where their order is not the source's, order.npy says which row of the source each one is.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dist_defend.data.beton import read_beton
from dist_defend.data.checks import check_contents, check_files, check_hashes, read_numbers
from dist_defend.data.ffcv_presence import ffcv_installed
from dist_defend.data.manifest import FORMAT, Manifest, StoredFile, known_manifest, manifest_bytes, parse_manifest
from dist_defend.data.pixels import Pixels, StoredImages
from dist_defend.data.replacing import new_folders, settle
from dist_defend.data.sources import Source
from dist_defend.data.verified import Mark
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
from dist_defend.ops.streams import Stream, draws

_CHUNK = 64  # images decoded at once where each is resized


class PreparedDataset:
    """An opened data set. labels: (N,) int64; classes: their names; image_shape: (H, W, 3), None if images differ.

    resize: every image is resized to a square of so many pixels when it is read. There is no .beton then: back ends
    read through images(). is_made: images are no file's, they are made when they are read.
    """

    is_made = False

    def __init__(self, path: Path, manifest: Manifest, resize: int | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self.classes = manifest.classes
        self.num_classes = len(manifest.classes)
        self.resize = None if manifest.image_shape == (resize, resize, 3) else resize
        self.image_shape = (self.resize, self.resize, 3) if self.resize else manifest.image_shape
        self._is_beton = "data.beton" in manifest.files
        self.beton = path / "data.beton" if self._is_beton and not self.resize else None
        self.labels: np.ndarray = read_numbers(path / "labels.npy", manifest.num_samples)

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
        images: np.ndarray = np.load(self.path / "images.npy", mmap_mode="r", allow_pickle=False)
        return images

    @cached_property
    def _stored(self) -> StoredImages:
        return read_beton(self.path / "data.beton")

    @cached_property
    def source_rows(self) -> np.ndarray:
        """The source's row of each of ours, (N,) int64."""
        has_order = "order.npy" in self.manifest.files
        return read_numbers(self.path / "order.npy", len(self)) if has_order else np.arange(len(self), dtype=np.int64)

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

    def pixels(self, rows: np.ndarray) -> Pixels:
        """Images of any sizes, decoded, in the order of ``rows``; of a data set whose images differ in size."""
        return self._stored[rows].decode()

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
        check_hashes(self.path, self.manifest)


def open_dataset(path: str | Path, resize: int | None = None) -> PreparedDataset:
    """Open a folder that `dist-defend data prepare` wrote, images resized to a square of ``resize`` pixels if wanted.

    All its files are checked and hashed, unless they were on this machine and have not changed since.
    UserError if it is missing, or anything in it is not what was written.
    """
    path = Path(path)
    settle(path)
    content = manifest_bytes(path)
    mark = Mark(path, content)
    if mark.exists():
        return PreparedDataset(path, known_manifest(content), resize)
    manifest = parse_manifest(content, path)
    check_files(path, manifest)
    check_contents(path, manifest)
    check_hashes(path, manifest)
    mark.leave()
    return PreparedDataset(path, manifest, resize)


@dataclass(frozen=True)
class WriteOptions:
    """How images are stored.

    image_size: resize to a square of this many pixels. max_resolution: shrink so that the longer side has at most so
    many pixels, keeping the aspect ratio. Both with Pillow's bilinear filter. write_mode: raw or jpg, which keeps the
    bytes of JPEGs that need no change and encodes the others (``quality`` 0..100). storage: beton, npy, or auto (beton
    where ffcv is installed). order_seed: of the shuffled order in which rows are written; None keeps the source's.
    max_samples: so many rows, the first in this order. skip_broken: so many images that cannot be read are left out,
    in all splits together.
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
            source,
            _rows(len(source), options),
            options.image_size,
            options.max_resolution,
            most_broken,
            options.write_mode == "jpg",
        )
        for split, source in sources.items()
    }
    broken: list[BrokenImage] = []
    manifests: dict[str, Manifest] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_writable(list(places.values())))
        made = stack.enter_context(new_folders([places[split] for split in sources]))
        folders = dict(zip(sources, made, strict=True))
        for split, folder in folders.items():
            kept, skipped = _write_images(images[split], folder, storage, options, options.skip_broken - len(broken))
            broken += skipped
            if len(broken) > most_broken:
                break
            if len(broken) <= options.skip_broken:
                manifests[split] = _write_labels(kept, skipped, sources[split], folder, name, split, options)
        if len(broken) > options.skip_broken:
            raise broken_images_error(broken, options.skip_broken)
    return [PreparedDataset(places[split], manifests[split]) for split in sources]


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
        rows = draws(options.order_seed, Stream.ORDER_OF_ROWS).permutation(rows)
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
) -> Manifest:
    """Write what belongs to the images: labels, order, and the manifest, which is returned."""
    np.save(folder / "labels.npy", images.labels)
    if not np.array_equal(images.rows, np.arange(len(images))):
        np.save(folder / "order.npy", images.rows)
    shapes = {(int(height), int(width)) for height, width in images.shapes}
    notes = list(getattr(source, "notes", ()))
    if options.write_mode == "jpg":
        notes.append(f"JPEGs kept as the source has them: {images.is_kept.sum()} of {len(images)}")
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
        notes=tuple(notes),
    )
    text = json.dumps(dataclasses.asdict(manifest), indent=1) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    return manifest


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
