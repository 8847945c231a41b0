"""Loaders: three back ends, the same batches."""

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from dist_defend.batch import Batch
from dist_defend.bounds import at_least_one
from dist_defend.data.augment import View
from dist_defend.data.backends import Backend, ResidentBackend, TorchBackend
from dist_defend.data.ffcv_presence import ffcv_installed, quiet_ffcv
from dist_defend.data.lane import Lane
from dist_defend.data.memory import free_memory
from dist_defend.data.order import Sampling
from dist_defend.data.store import PreparedDataset
from dist_defend.errors import UserError
from dist_defend.ops.streams import Stream, draws

BackendName = Literal["auto", "ffcv", "resident", "torch"]
_RESIDENT_SHARE = 0.5  # of the free memory that `auto` lets the images of all ranks take
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoaderConfig:
    """How batches are made; every back end gives the same ones.

    Keys:
        backend: who makes the batches; auto: resident where the images fit into memory, else ffcv on a CPU where it
            can, else torch; ffcv means auto for images that no file holds, such as those with a trigger
        workers: threads of each rank that make batches
    """

    backend: BackendName = "auto"
    workers: int = 2

    def __post_init__(self) -> None:
        at_least_one(self, "workers")


@dataclass(frozen=True)
class DatasetConfig:
    """A prepared data set or part of it.

    Keys:
        path: folder of a prepared split (`dist-defend data prepare`)
        fraction: share of the rows, rounded down
        max_samples: rows at most; null: no limit
        subset: the first rows of the prepared order, which is a shuffled one unless the data set was prepared with
            --keep-order; or random ones, by the run's seed; or balanced: random, as many of each class
        resize: side in pixels of the square to which images are resized when they are read; null: as they are
    """

    path: str
    fraction: float = 1.0
    max_samples: int | None = None
    subset: Literal["first", "random", "balanced"] = "first"
    resize: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"key 'fraction' is {self.fraction}; it must be in (0, 1]")
        at_least_one(self, "max_samples")
        if self.resize is not None and self.resize < 1:
            raise ValueError(f"key 'resize' is {self.resize}; it must be at least 1 pixel")


def select_rows(dataset: PreparedDataset, config: DatasetConfig, seed: int) -> np.ndarray:
    """The rows (M,) int64, ascending, that ``config`` asks for. UserError if there are none."""
    count = int(len(dataset) * config.fraction)
    if config.max_samples is not None:
        count = min(count, config.max_samples)
    if count < 1:
        raise UserError(f"{config.path}: fraction {config.fraction} of {len(dataset)} samples is none; raise it")
    if config.subset == "first":
        return np.arange(count, dtype=np.int64)
    order = draws(seed, Stream.SUBSET).permutation(len(dataset))
    if config.subset == "balanced":
        each = count // dataset.num_classes
        if each < 1:
            raise UserError(
                f"{config.path}: {count} samples are not one of each of {dataset.num_classes} classes; take more"
            )
        order = np.concatenate([order[dataset.labels[order] == k][:each] for k in range(dataset.num_classes)])
    return np.sort(order[:count]).astype(np.int64)


class Loader:
    """Batches of one split for one rank. batch_size is global; num_batches counts global batches of an epoch."""

    def __init__(
        self, labels: np.ndarray, sampling: Sampling, backend: Backend, name: str, device: torch.device
    ) -> None:
        self.batch_size, self.num_batches, self.num_samples = (
            sampling.batch_size,
            sampling.num_batches,
            len(sampling.rows),
        )
        self.backend = name
        self._sampling, self._lane = sampling, Lane(device, labels)
        self._images: Backend | None = backend

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """This rank's shares of the global batches from ``start_batch`` on. Leaving the loop early is fine."""
        if self._images is None:
            raise RuntimeError("this loader is closed")
        shares = self._sampling.shares(epoch, start_batch)
        with contextlib.closing(self._images.batches(shares, epoch, self._lane.deliver)) as deliveries:
            for delivery in deliveries:
                yield self._lane.receive(delivery)

    def shuffled(self) -> "Loader":
        """The same images by the same back end, each epoch in an order of its own."""
        other = copy.copy(self)
        other._sampling = replace(self._sampling, shuffle=True)
        return other

    def close(self) -> None:
        """Let go of the images; a closed loader gives no more batches."""
        self._images = None


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
    name = _choose(dataset, config, len(rows) * (1 if device.type == "cuda" else world_size), device)
    _log.info("%s: %s back end, %d workers", dataset.path, name, config.workers)
    backend: Backend
    if name == "ffcv":
        with quiet_ffcv():
            from dist_defend.data.ffcv_backend import FfcvBackend

        backend = FfcvBackend(dataset, views, seed, config.workers, raw)
    elif name == "resident":
        backend = ResidentBackend(dataset, rows, views, seed, config.workers, device, raw)
    else:
        backend = TorchBackend(dataset, views, seed, config.workers, device, raw)
    sampling = Sampling(rows, batch_size, shuffle, drop_last, seed, rank, world_size)
    return Loader(dataset.labels, sampling, backend, name, device)


def _check_views(dataset: PreparedDataset, views: Sequence[View], raw: bool) -> None:
    for view in views:
        shape = dataset.image_shape if view.image is None else view.image.shape
        if shape is None:
            if raw or view.augment.crop == "pad" or view.augment.size is None:
                raise UserError(
                    f"{dataset.path}: images differ in size; set the augmentation's crop: random_resized and "
                    "size, prepare the data set with --image-size, or say resize in its section"
                )
        elif view.augment.crop == "pad" and (view.augment.size or 0) > min(shape[:2]) + 2 * view.augment.pad:
            raise UserError(
                f"{dataset.path}: a crop of {view.augment.size} pixels does not fit into images of {shape[0]}x"
                f"{shape[1]} with {view.augment.pad} around; lower size or raise pad"
            )
        size = view.augment.size or 0
        height, width = view.augment.output_shape(*(shape or (size, size))[:2])
        if view.augment.blur is not None and not 0 < view.augment.blur.radius(height) < min(height, width):
            raise UserError(
                f"{dataset.path}: key 'blur.kernel' is {view.augment.blur.kernel}, which for views of {height}x{width} "
                f"pixels is {2 * view.augment.blur.radius(height) + 1} wide: raise it, or leave blur out"
            )


def _why_not_ffcv(dataset: PreparedDataset) -> str:
    if dataset.resize:
        return f"its images are resized to {dataset.resize} px when they are read; prepare them with --image-size"
    return "the images are not stored as .beton; prepare the data set with --storage beton"


def _choose(dataset: PreparedDataset, config: LoaderConfig, count: int, device: torch.device) -> str:
    """A back end's name. count: images that resident ones would be, over all ranks that may share the memory."""
    backend = "auto" if config.backend == "ffcv" and dataset.is_made else config.backend
    if backend == "ffcv":
        if not ffcv_installed():
            raise UserError(
                "key 'loader.backend' is ffcv, which is not installed; pip install 'dist-defend[ffcv]' or say auto"
            )
        if dataset.beton is None:
            raise UserError(f"{dataset.path}: key 'loader.backend' is ffcv, but {_why_not_ffcv(dataset)} or say auto")
    if backend == "resident" and dataset.image_shape is None:
        raise UserError(f"{dataset.path}: images differ in size, so they cannot be resident; say loader.backend: auto")
    if backend != "auto":
        return backend
    if dataset.image_shape is not None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
        if count * int(np.prod(dataset.image_shape)) < _RESIDENT_SHARE * free:
            return "resident"
    return "ffcv" if device.type != "cuda" and dataset.beton is not None and ffcv_installed() else "torch"
