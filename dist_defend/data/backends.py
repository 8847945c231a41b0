"""The back ends that need nothing but this package; FFCV's is in ffcv_backend.py."""

import contextlib
from collections.abc import Generator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dist_defend.data.augment import View, apply_augment
from dist_defend.data.draws import draw
from dist_defend.data.fused import empty_views, fill_views
from dist_defend.data.pixels import Pixels
from dist_defend.data.prefetch import prefetch
from dist_defend.data.store import PreparedDataset

_CHUNK = 256  # images that a thread reads at once


class Backend(Protocol):
    """Makes batches in order: for each share of data set rows (B,) a tuple of views (B, 3, S, S), or, for raw loaders,
    the one tensor of images (B, H, W, 3) uint8. The tensors are the caller's to keep."""

    def batches(self, shares: Sequence[np.ndarray], epoch: int) -> Generator[tuple[Tensor, ...], None, None]: ...


def augment_batch(images: Tensor, rows: np.ndarray, views: Sequence[View], seed: int, epoch: int) -> tuple[Tensor, ...]:
    """All views of a batch of uint8 images (B, H, W, 3), by torch operations on their device."""
    made = []
    for number, view in enumerate(views):
        source = images
        if view.image is not None:
            source = torch.tensor(view.image, device=images.device).expand(len(rows), -1, -1, -1)
        params = torch.from_numpy(draw(seed, epoch, rows, number, view.augment, *source.shape[1:3]))
        made.append(apply_augment(source, params.to(images.device), view.augment))
    return tuple(made)


class TorchBackend:
    """Reads with numpy, augments with batched torch operations on the device, several batches at a time in threads."""

    def __init__(
        self, dataset: PreparedDataset, views: Sequence[View], seed: int, workers: int, device: torch.device, raw: bool
    ) -> None:
        self._dataset, self._views, self._seed, self._workers = dataset, tuple(views), seed, workers
        self._device, self._raw = device, raw

    def batches(self, shares: Sequence[np.ndarray], epoch: int) -> Generator[tuple[Tensor, ...], None, None]:
        def make(rows: np.ndarray) -> tuple[Tensor, ...]:
            if self._dataset.image_shape is not None:
                return self._augment(self._dataset.images(rows), rows, epoch)
            singles = [self._augment(self._dataset.image(row)[None], np.array([row]), epoch) for row in rows]
            return tuple(torch.cat(view) for view in zip(*singles, strict=True))

        return prefetch(make, shares, self._workers)

    def _augment(self, images: np.ndarray, rows: np.ndarray, epoch: int) -> tuple[Tensor, ...]:
        pixels = torch.tensor(images, device=self._device)
        return (pixels,) if self._raw else augment_batch(pixels, rows, self._views, self._seed, epoch)


class ResidentBackend:
    """Keeps the uint8 images of its rows in memory: the GPU's, augmented there, or the host's, by the fused kernel."""

    def __init__(
        self,
        dataset: PreparedDataset,
        rows: np.ndarray,
        views: Sequence[View],
        seed: int,
        workers: int,
        device: torch.device,
        raw: bool,
    ) -> None:
        self._views, self._seed, self._workers, self._raw = tuple(views), seed, workers, raw
        self._rows = np.unique(rows)
        images = _read(dataset, self._rows, workers)
        self._pixels = Pixels.of(images)
        self._images = torch.from_numpy(images).to(device)

    def batches(self, shares: Sequence[np.ndarray], epoch: int) -> Generator[tuple[Tensor, ...], None, None]:
        def make(rows: np.ndarray) -> tuple[Tensor, ...]:
            slots = np.searchsorted(self._rows, rows)
            if not self._raw and self._images.device.type == "cpu":
                outs = empty_views(self._views, len(rows), *self._images.shape[1:3])
                fill_views(outs, self._views, self._pixels[slots], rows, self._seed, epoch)
                return tuple(torch.from_numpy(out).permute(0, 3, 1, 2) for out in outs)
            images = self._images[torch.from_numpy(slots).to(self._images.device)]
            return (images,) if self._raw else augment_batch(images, rows, self._views, self._seed, epoch)

        return prefetch(make, shares, self._workers)


def _read(dataset: PreparedDataset, rows: np.ndarray, workers: int) -> np.ndarray:
    """Images (B, H, W, 3) uint8 of one shape, read by several threads, as JPEGs take their time."""
    assert dataset.image_shape is not None
    images = np.empty((len(rows), *dataset.image_shape), np.uint8)
    starts = range(0, len(rows), _CHUNK)
    parts = prefetch(lambda start: dataset.images(rows[start : start + _CHUNK]), starts, workers)
    with contextlib.closing(parts):
        for start, part in zip(starts, parts, strict=True):
            images[start : start + len(part)] = part
    return images
