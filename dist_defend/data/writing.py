"""Bring a source's images into shape, and write them through FFCV."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from dist_defend.data.ffcv_presence import quiet_ffcv
from dist_defend.data.prefetch import prefetch
from dist_defend.data.sources import Source
from dist_defend.errors import UserError

_READERS = 4  # threads that decode and resize ahead of the writer
_PAGE_BYTES = 1 << 23  # an image must fit into a page


class PreparedImages:
    """Iterates over uint8 (H, W, 3) images of a source, in order, resized; fills ``labels`` and ``shapes`` on its way.

    UserError for an empty source, a label that has no class, an image of another type, or a reader that fails.
    """

    def __init__(
        self, source: Source, image_size: int | None, max_resolution: int | None, max_samples: int | None
    ) -> None:
        self._source, self._image_size, self._max_resolution = source, image_size, max_resolution
        self._num = len(source) if max_samples is None else min(max_samples, len(source))
        if self._num < 1:
            raise UserError("the source has no images; check --path, --split and --max-samples")
        self.labels = np.empty(self._num, np.int64)
        self.shapes = np.empty((self._num, 2), np.int64)

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[np.ndarray]:
        with contextlib.closing(prefetch(self._read, range(self._num), _READERS)) as images:
            yield from tqdm(images, total=self._num, unit="image", leave=False, disable=None)

    def _read(self, row: int) -> np.ndarray:
        try:
            image, label = self._source[row]
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"image {row} of the source cannot be read: {type(error).__name__}: {error}") from error
        if not -1 <= label < len(self._source.classes):
            raise UserError(
                f"image {row} of the source has label {label}, but there are {len(self._source.classes)} classes"
            )
        pixels = (
            _to_rgb(image, row)
            if self._max_resolution is None and self._image_size is None
            else self._resize(image, row)
        )
        self.labels[row], self.shapes[row] = label, pixels.shape[:2]
        return pixels

    def _resize(self, image: Any, row: int) -> np.ndarray:
        picture = Image.fromarray(_to_rgb(image, row))
        size = picture.size
        if self._max_resolution is not None and max(size) > self._max_resolution:
            share = self._max_resolution / max(size)
            size = (max(1, round(size[0] * share)), max(1, round(size[1] * share)))
        if self._image_size is not None:
            size = (self._image_size, self._image_size)
        return np.asarray(picture.resize(size, Image.Resampling.BILINEAR))


def _to_rgb(image: Any, row: int) -> np.ndarray:
    if isinstance(image, Image.Image):
        image = image.convert("RGB")
    pixels = np.ascontiguousarray(image)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise UserError(
            f"image {row} of the source is {pixels.dtype} of shape {pixels.shape}; expected uint8 (H, W, 3)"
        )
    return pixels


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
    writer = DatasetWriter(str(path), fields, page_size=_PAGE_BYTES)
    writer.num_samples = len(images)
    writer.prepare()
    writer.metadata_sm.close()
    writer.metadata_sm.unlink()  # shared memory is for workers in other processes
    metadata = np.zeros(len(images), writer.metadata_type)
    allocator = MemoryAllocator(str(path), writer.data_region_start, _PAGE_BYTES)
    with allocator:
        for row, image in enumerate(images):
            if image.nbytes > _PAGE_BYTES:
                raise UserError(
                    f"image {row} of the source has {image.nbytes} bytes, more than a page of {_PAGE_BYTES}; "
                    "give --max-resolution"
                )
            handle_sample((image, images.labels[row]), row, metadata.dtype.names, metadata, allocator, fields)
    writer.metadata_sm = SimpleNamespace(buf=metadata.tobytes())
    writer.finalize(allocator.allocations)
