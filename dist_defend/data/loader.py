"""Loaders: three back ends, the same batches."""

import contextlib
import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import psutil
import torch
from torch import Tensor

from dist_defend.batch import Batch
from dist_defend.data.augment import View, apply_augment
from dist_defend.data.draws import draw
from dist_defend.data.ffcv_backend import ffcv_installed
from dist_defend.data.order import epoch_order, rank_batches
from dist_defend.data.prefetch import prefetch
from dist_defend.data.store import PreparedDataset
from dist_defend.errors import UserError

_SUBSET_STREAM = 0x5B5E7  # keeps the draw of a random subset apart from the epochs' orders
_RESIDENT_SHARE = 0.5  # of the free memory that `auto` lets the images take
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoaderConfig:
    """backend: auto takes resident on a GPU and ffcv on a CPU where it can, else resident, else torch.

    workers: threads of this rank that make batches.
    """

    backend: Literal["auto", "ffcv", "resident", "torch"] = "auto"
    workers: int = 2

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"key 'workers' is {self.workers}; it must be at least 1")


@dataclass(frozen=True)
class DatasetConfig:
    """A prepared data set, or part of it: int(N * fraction) rows, at most max_samples, the first ones or random ones."""

    path: str
    fraction: float = 1.0
    max_samples: int | None = None
    subset: Literal["first", "random"] = "first"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"key 'fraction' is {self.fraction}; it must be in (0, 1]")
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"key 'max_samples' is {self.max_samples}; it must be at least 1")


def select_rows(dataset: PreparedDataset, config: DatasetConfig, seed: int) -> np.ndarray:
    """The rows (M,) int64, ascending, that ``config`` asks for. UserError if there are none."""
    count = int(len(dataset) * config.fraction)
    if config.max_samples is not None:
        count = min(count, config.max_samples)
    if count < 1:
        raise UserError(f"{config.path}: fraction {config.fraction} of {len(dataset)} samples is none; raise it")
    if config.subset == "first":
        return np.arange(count, dtype=np.int64)
    return np.sort(np.random.default_rng([seed, _SUBSET_STREAM]).permutation(len(dataset))[:count]).astype(np.int64)


class Backend(Protocol):
    """Makes the views of given rows, batch by batch, in order."""

    def batches(self, shares: Sequence[np.ndarray], epoch: int) -> Generator[tuple[Tensor, ...], None, None]: ...


class Loader:
    """Batches of one split for one rank. batch_size is global; num_batches counts global batches of an epoch."""

    def __init__(
        self,
        dataset: PreparedDataset,
        rows: np.ndarray,
        backend: Backend,
        name: str,
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.batch_size, self.backend, self.num_samples = batch_size, name, len(rows)
        self.num_batches = len(rows) // batch_size if drop_last else -(-len(rows) // batch_size)
        self._labels, self._rows, self._make, self._device = dataset.labels, rows, backend, device
        self._shuffle, self._drop_last, self._seed, self._rank, self._world_size = (
            shuffle,
            drop_last,
            seed,
            rank,
            world_size,
        )

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """This rank's shares of the global batches from ``start_batch`` on. Leaving the loop early is fine."""
        order = self._rows[epoch_order(len(self._rows), self._seed, epoch, self._shuffle)]
        shares = rank_batches(order, self.batch_size, start_batch, self._drop_last, self._rank, self._world_size)
        with contextlib.closing(self._make.batches(shares, epoch)) as batches:
            for rows, views in zip(shares, batches, strict=True):
                labels = torch.from_numpy(self._labels[rows])
                yield Batch(
                    tuple(view.to(self._device) for view in views),
                    labels.to(self._device),
                    torch.from_numpy(rows).to(self._device),
                )

    def close(self) -> None:
        """Drop the images and buffers; the loader cannot be used any more."""
        self._make = _Closed()


class _Closed:
    def batches(self, shares: Sequence[np.ndarray], epoch: int) -> Generator[tuple[Tensor, ...], None, None]:
        raise RuntimeError("this loader was closed")


def make_loader(
    dataset: PreparedDataset,
    *,
    config: LoaderConfig,
    batch_size: int,
    rows: np.ndarray | None = None,
    views: Sequence[View] = (View(),),
    shuffle: bool = False,
    drop_last: bool = False,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: str | torch.device = "cpu",
    raw: bool = False,
) -> Loader:
    """A loader of ``rows`` (all by default) of a data set, one tensor per view.

    batch_size is global. drop_last is for training: whole batches, equal shares. Without it every row comes exactly
    once over all ranks, and a rank whose share of the last batch is empty does not get that batch. ``raw`` gives the
    images as uint8 (B, H, W, 3) instead of views. UserError for what cannot be: see the messages.
    """
    device = torch.device(device)
    rows = np.arange(len(dataset), dtype=np.int64) if rows is None else np.asarray(rows, np.int64)
    if drop_last and len(rows) < batch_size:
        raise UserError(f"{dataset.path}: {len(rows)} samples are fewer than batch_size {batch_size}; lower batch_size")
    if drop_last and batch_size % world_size:
        raise UserError(f"batch_size {batch_size} is not divisible by {world_size} ranks; choose a multiple")
    _check_views(dataset, views, raw)
    name = _choose(dataset, config, rows, device)
    _log.info("%s: %s back end, %d workers", dataset.path, name, config.workers)
    backend: Backend
    if name == "ffcv":
        from dist_defend.data.ffcv_backend import FfcvBackend

        backend = FfcvBackend(dataset, views, seed, config.workers, raw)
    elif name == "resident":
        backend = ResidentBackend(dataset, rows, views, seed, config.workers, device, raw)
    else:
        backend = TorchBackend(dataset, views, seed, config.workers, device, raw)
    return Loader(dataset, rows, backend, name, batch_size, shuffle, drop_last, seed, rank, world_size, device)


def _check_views(dataset: PreparedDataset, views: Sequence[View], raw: bool) -> None:
    for view in views:
        shape = dataset.image_shape if view.image is None else view.image.shape
        if shape is None:
            if raw or view.augment.crop == "pad" or view.augment.size is None:
                raise UserError(
                    f"{dataset.path}: images differ in size; set the augmentation's crop: random_resized and "
                    "size, or prepare the data set with --image-size"
                )
        elif view.augment.crop == "pad" and (view.augment.size or 0) > min(shape[:2]) + 2 * view.augment.pad:
            raise UserError(
                f"{dataset.path}: a crop of {view.augment.size} pixels does not fit into images of {shape[0]}x"
                f"{shape[1]} with {view.augment.pad} around; lower size or raise pad"
            )


def _choose(dataset: PreparedDataset, config: LoaderConfig, rows: np.ndarray, device: torch.device) -> str:
    if config.backend == "ffcv":
        if not ffcv_installed():
            raise UserError(
                "key 'loader.backend' is ffcv, which is not installed; pip install 'dist-defend[ffcv]' or say auto"
            )
        if dataset.beton is None:
            raise UserError(
                f"{dataset.path}: key 'loader.backend' is ffcv, but the images are not stored as .beton; "
                "prepare the data set with --storage beton or say auto"
            )
    if config.backend == "resident" and dataset.image_shape is None:
        raise UserError(f"{dataset.path}: images differ in size, so they cannot be resident; say loader.backend: auto")
    if config.backend != "auto":
        return config.backend
    if dataset.image_shape is not None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        if len(rows) * int(np.prod(dataset.image_shape)) < _RESIDENT_SHARE * free:
            return "resident"
    return "torch"


def augment_batch(images: Tensor, rows: np.ndarray, views: Sequence[View], seed: int, epoch: int) -> tuple[Tensor, ...]:
    """All views of a batch of uint8 images (B, H, W, 3), by torch operations on their device."""
    made = []
    for number, view in enumerate(views):
        source = images
        if view.image is not None:
            source = torch.from_numpy(view.image).to(images.device).expand(len(rows), -1, -1, -1)
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
            if self._dataset.image_shape is None:
                singles = [
                    self._augment(self._dataset.image(row)[None], rows[i : i + 1], epoch) for i, row in enumerate(rows)
                ]
                return tuple(torch.cat(view) for view in zip(*singles, strict=True))
            return self._augment(self._dataset.images(rows), rows, epoch)

        return prefetch(make, shares, self._workers)

    def _augment(self, images: np.ndarray, rows: np.ndarray, epoch: int) -> tuple[Tensor, ...]:
        pixels = torch.tensor(images, device=self._device)
        return (
            (pixels,) * len(self._views) if self._raw else augment_batch(pixels, rows, self._views, self._seed, epoch)
        )


class ResidentBackend:
    """Keeps the uint8 images of its rows in the device's memory and augments there."""

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
        self._images = torch.from_numpy(dataset.images(self._rows)).to(device)

    def batches(self, shares: Sequence[np.ndarray], epoch: int) -> Generator[tuple[Tensor, ...], None, None]:
        for rows in shares:
            images = self._images[torch.from_numpy(np.searchsorted(self._rows, rows)).to(self._images.device)]
            yield (
                (images,) * len(self._views)
                if self._raw
                else augment_batch(images, rows, self._views, self._seed, epoch)
            )
