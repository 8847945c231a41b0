"""Bring a source's images into shape, and write them through FFCV or as one array."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dist_defend.data.beton import JPEG, PAGE_BYTES
from dist_defend.data.ffcv_presence import quiet_ffcv
from dist_defend.data.jpeg import decode_jpeg, jpeg_sizes
from dist_defend.data.prefetch import prefetch
from dist_defend.data.sources import Source
from dist_defend.errors import UserError
from dist_defend.terminal import unguarded

_READERS = 4  # threads that decode and resize ahead of the writer
MOST_BROKEN = 1000  # images that cannot be read, after which nobody wants to see more
_LISTED = 10  # of them in a message
_START_OF_JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True)
class BrokenImage:
    """An image that cannot be read: its row in the source, its name there, and why, as one sentence."""

    row: int
    name: str
    told: str


@dataclass(frozen=True)
class PreparedImage:
    """Pixels (H, W, 3) uint8; jpeg: the source's own bytes (n,) uint8, where they are a JPEG of exactly these."""

    pixels: np.ndarray
    jpeg: np.ndarray | None = None


class BrokenImagesError(Exception):
    """Raised after the last image: those of the source that cannot be read, in its order."""

    def __init__(self, images: Sequence[BrokenImage]) -> None:
        super().__init__(f"{len(images)} images cannot be read")
        self.images = tuple(images)


def broken_images_error(images: Sequence[BrokenImage], skip_broken: int) -> UserError:
    """One line: the first ten, how many there are, and what can be done."""
    count = len(images)
    if count == 1 and not skip_broken:
        return UserError(f"{images[0].told}; mend or remove it, or leave it out with --skip-broken 1")
    least = "at least " if count > max(MOST_BROKEN, skip_broken) else ""
    listed = "; ".join(image.told for image in images[:_LISTED]) + (" ..." if count > _LISTED else "")
    allowed = f", more than --skip-broken {skip_broken}" if skip_broken else ""
    remedy = f"mend or remove them, or leave them out with --skip-broken {count}"
    return UserError(f"{least}{count} broken images{allowed}: {listed}; {remedy}")


class PreparedImages:
    """Iterates over the images of a source, resized, in the order of ``rows`` (N,), its rows; fills ``labels``,
    ``shapes`` (N, 2) and ``is_kept`` (N,) on its way. keeps_jpegs: look for JPEGs that need no change.

    An image that cannot be read ends the output, but reading goes on: BrokenImagesError tells of all of them.
    UserError for no rows or a label that has no class.
    """

    def __init__(
        self,
        source: Source,
        rows: np.ndarray,
        image_size: int | None,
        max_resolution: int | None,
        most_broken: int,
        keeps_jpegs: bool,
    ) -> None:
        self._source, self.rows, self._most_broken = source, rows, most_broken
        self._image_size, self._max_resolution, self._keeps_jpegs = image_size, max_resolution, keeps_jpegs
        if not len(rows):
            raise UserError("the source has no images; check --path, --split and --max-samples")
        self.labels = np.empty(len(rows), np.int64)
        self.shapes = np.empty((len(rows), 2), np.int64)
        self.is_kept = np.zeros(len(rows), np.bool_)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[PreparedImage]:
        broken: list[BrokenImage] = []
        with contextlib.closing(prefetch(self._read, range(len(self)), _READERS)) as images:
            bar = {"unit": "image", "leave": False, "disable": None, "file": unguarded(sys.stderr)}
            for image in tqdm(images, total=len(self), **bar):
                if isinstance(image, BrokenImage):
                    broken.append(image)
                    if len(broken) > self._most_broken:
                        break
                elif not broken:
                    yield image
        if broken:
            raise BrokenImagesError(sorted(broken, key=lambda image: image.row))

    def name(self, position: int) -> str:
        """What messages call an image."""
        row = int(self.rows[position])
        return self._source.name(row) if hasattr(self._source, "name") else f"image {row} of the source"

    def without(self, broken: Sequence[BrokenImage]) -> "PreparedImages":
        """The same, but for these."""
        kept = self.rows[~np.isin(self.rows, [image.row for image in broken])]
        sizes = self._image_size, self._max_resolution
        return PreparedImages(self._source, kept, *sizes, self._most_broken, self._keeps_jpegs)

    def _read(self, position: int) -> PreparedImage | BrokenImage:
        row, classes = int(self.rows[position]), self._source.classes
        try:
            image, label = self._source[row]
            pixels = self._shape(_to_rgb(image))
            jpeg = self._jpeg(row, pixels)
        except Exception as error:  # of any reader of any source
            return BrokenImage(row, self.name(position), self._why(position, error))
        if not -1 <= label < len(classes):
            raise UserError(f"{self.name(position)} has label {label}, but there are {len(classes)} classes")
        self.labels[position], self.shapes[position] = label, pixels.shape[:2]
        self.is_kept[position] = jpeg is not None
        return PreparedImage(pixels, jpeg)

    def _jpeg(self, row: int, pixels: np.ndarray) -> np.ndarray | None:
        """The source's bytes, where our readers find these pixels in them, and no more bytes than pixels have."""
        content = self._source.encoded(row) if self._keeps_jpegs and hasattr(self._source, "encoded") else None
        if content is None or not content.startswith(_START_OF_JPEG) or len(content) > pixels.nbytes:
            return None
        data, decoded = np.frombuffer(content, np.uint8), np.empty(pixels.shape, np.uint8)
        heights, widths = jpeg_sizes(data, np.array([0]), np.array([data.size]))
        if (heights[0], widths[0]) != pixels.shape[:2]:
            return None
        try:
            decode_jpeg(data, decoded, row)
        except UserError:
            return None  # some readers go on where others do not
        return data if np.array_equal(decoded, pixels) else None

    def _why(self, position: int, error: Exception) -> str:
        name, lines = self.name(position), " ".join(str(error).split())
        if not isinstance(error, UserError):
            return f"{name} cannot be read: {type(error).__name__}: {lines}"
        return lines if name in lines else f"{name} {lines}"

    def _shape(self, pixels: np.ndarray) -> np.ndarray:
        if self._max_resolution is None and self._image_size is None:
            return pixels
        size = (pixels.shape[1], pixels.shape[0])
        if self._max_resolution is not None and max(size) > self._max_resolution:
            share = self._max_resolution / max(size)
            size = (max(1, round(size[0] * share)), max(1, round(size[1] * share)))
        if self._image_size is not None:
            size = (self._image_size, self._image_size)
        return resized(pixels, size)


def resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image (H, W, 3) uint8 at this width and height, by Pillow's bilinear filter."""
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))


def _to_rgb(image: Any) -> np.ndarray:
    if isinstance(image, Image.Image):
        image = image.convert("RGB")
    pixels = np.ascontiguousarray(image)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise UserError(f"is {pixels.dtype} of shape {pixels.shape}; expected uint8 (H, W, 3)")
    return pixels


def write_npy(images: PreparedImages, path: Path) -> None:
    """Write ``path``, one array (N, H, W, 3). UserError unless all images have one size."""
    array: np.memmap | None = None
    for row, prepared in enumerate(images):
        image = prepared.pixels
        if array is None:
            array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(images), *image.shape))
        if image.shape != array.shape[1:]:
            raise UserError("--storage npy needs images of one size; give --image-size")
        array[row] = image
    assert array is not None
    array.flush()


class _ImageField:
    """FFCV's field, which encodes, for images of which some are JPEGs already."""

    def __init__(self, field: Any) -> None:
        self._field = field

    def encode(self, destination: np.ndarray, image: PreparedImage, malloc: Callable[[int], Any]) -> None:
        if image.jpeg is None:
            self._field.encode(destination, image.pixels, malloc)
            return
        destination["mode"] = JPEG
        destination["height"], destination["width"] = image.pixels.shape[:2]
        destination["data_ptr"], storage = malloc(image.jpeg.nbytes)
        storage[:] = image.jpeg


def write_beton(images: PreparedImages, path: Path, write_mode: str, quality: int) -> None:
    """Write ``path`` through FFCV, fields image and label; whatever a reader raises comes out of here at once.

    FFCV's DatasetWriter hands the samples to worker processes and waits for ever for one that died, so its parts are
    called here in this process; reading and resizing, the slow half, run ahead in threads. The file is reproducible.
    """
    with quiet_ffcv():
        from ffcv.fields import IntField, RGBImageField
        from ffcv.memory_allocator import MemoryAllocator
        from ffcv.writer import DatasetWriter, handle_sample

    fields = {"image": RGBImageField(write_mode=write_mode, jpeg_quality=quality), "label": IntField()}
    writer = DatasetWriter(str(path), fields, page_size=PAGE_BYTES)
    writer.num_samples = len(images)
    writer.prepare()
    writer.metadata_sm.close()
    writer.metadata_sm.unlink()  # shared memory is for workers in other processes
    metadata = np.zeros(len(images), writer.metadata_type)
    allocator = MemoryAllocator(str(path), writer.data_region_start, PAGE_BYTES)
    encoders = {"image": _ImageField(fields["image"]), "label": fields["label"]}
    with allocator:
        for row, image in enumerate(images):
            if image.pixels.nbytes > PAGE_BYTES:
                raise UserError(
                    f"{images.name(row)} has {image.pixels.nbytes} bytes, more than a page of {PAGE_BYTES}; "
                    "give --max-resolution"
                )
            handle_sample((image, images.labels[row]), row, metadata.dtype.names, metadata, allocator, encoders)
    writer.metadata_sm = SimpleNamespace(buf=metadata.tobytes())
    writer.finalize(allocator.allocations)
