"""The back ends that need nothing but this package; FFCV's is in ffcv_backend.py."""

import contextlib
from collections.abc import Generator, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dist_defend.data.augment import View, apply_augment, apply_colours
from dist_defend.data.draws import draw
from dist_defend.data.fused import crops, empty_views, fill_views
from dist_defend.data.lane import Deliver, Delivery, Views
from dist_defend.data.pixels import Pixels
from dist_defend.data.prefetch import prefetch
from dist_defend.data.store import PreparedDataset
from dist_defend.ops.transfer import is_apart, to_device

_CHUNK = 256  # images that a thread reads at once


class Backend(Protocol):
    """Makes batches in order: for each share of data set rows (B,) a tuple of views (B, 3, S, S), or, for raw loaders,
    the one tensor of images (B, H, W, 3) uint8. The tensors are the caller's to keep. It hands each to ``deliver``, in
    the thread that made it, and yields what that gives back."""

    def batches(
        self, shares: Sequence[np.ndarray], epoch: int, deliver: Deliver
    ) -> Generator[Delivery, None, None]: ...


class Augmenter:
    """All views of a batch, by torch operations on the device."""

    def __init__(self, views: Sequence[View], seed: int, device: torch.device) -> None:
        self.views, self.seed, self.device = tuple(views), seed, device
        self.constants = [None if v.image is None else torch.tensor(v.image, device=device) for v in views]

    def __call__(self, images: Tensor | Pixels, rows: np.ndarray, epoch: int) -> Views:
        """images: (B, H, W, 3) uint8 on the device; or on the host, of any sizes: those are cropped there."""
        made = []
        for number, (view, constant) in enumerate(zip(self.views, self.constants, strict=True)):
            source = images if constant is None else constant.expand(len(rows), -1, -1, -1)
            is_cropped = isinstance(source, Pixels)
            shape = (source.heights, source.widths) if isinstance(source, Pixels) else source.shape[1:3]
            params = self._send(draw(self.seed, epoch, rows, number, view.augment, *shape))
            if isinstance(source, Pixels):
                source = self._send(crops(view, source, rows, self.seed, epoch, number))
            made.append((apply_colours if is_cropped else apply_augment)(source, params, view.augment))
        return tuple(made)

    def _send(self, array: np.ndarray) -> Tensor:
        return to_device(torch.from_numpy(array), self.device)


class TorchBackend:
    """Reads with numpy, augments with batched torch operations on the device, several batches at a time in threads."""

    def __init__(
        self, dataset: PreparedDataset, views: Sequence[View], seed: int, workers: int, device: torch.device, raw: bool
    ) -> None:
        self._dataset, self._workers, self._device, self._raw = dataset, workers, device, raw
        self._augment = Augmenter(views, seed, device)

    def batches(self, shares: Sequence[np.ndarray], epoch: int, deliver: Deliver) -> Generator[Delivery, None, None]:
        def make(rows: np.ndarray) -> Views:
            if self._dataset.image_shape is None:
                return self._augment(self._dataset.pixels(rows), rows, epoch)
            images = to_device(torch.tensor(self._dataset.images(rows)), self._device)
            return (images,) if self._raw else self._augment(images, rows, epoch)

        return prefetch(lambda rows: deliver(rows, partial(make, rows)), shares, self._workers)


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
        self._augment = Augmenter(views, seed, device)

    def batches(self, shares: Sequence[np.ndarray], epoch: int, deliver: Deliver) -> Generator[Delivery, None, None]:
        def make(rows: np.ndarray) -> Views:
            slots = np.searchsorted(self._rows, rows)
            if not self._raw and not is_apart(self._images.device):
                outs = empty_views(self._views, len(rows), *self._images.shape[1:3])
                fill_views(outs, self._views, self._pixels[slots], rows, self._seed, epoch)
                return tuple(torch.from_numpy(out).permute(0, 3, 1, 2) for out in outs)
            images = self._images[to_device(torch.from_numpy(slots), self._images.device)]
            return (images,) if self._raw else self._augment(images, rows, epoch)

        return prefetch(lambda rows: deliver(rows, partial(make, rows)), shares, self._workers)


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
