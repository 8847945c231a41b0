"""SimCLR and its two-view loading against lightly, a library of the same kind, where that is installed (extra peers).

``-documented`` rows have lightly as the examples in its documentation have it: PIL transforms in worker processes that
start anew in each epoch, one pass per view, Adam, a loss read at every step. ``-tuned`` rows have what a user may do by
hand about that: lasting workers, one pass over both views, channels_last, fused Adam, the loss read once per epoch.
"""

import importlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dist_defend.batch import Batch
from dist_defend.bench import runner
from dist_defend.bench.runner import Case, Settings
from dist_defend.bench.simclr import OPTIMIZER, TEMPERATURE, train_epoch
from dist_defend.data.augment import SIMCLR, View
from dist_defend.data.loader import LoaderConfig
from dist_defend.engine.dist import Ranks
from dist_defend.engine.optim import UpdateConfig
from dist_defend.engine.step import GradientStep, Position
from dist_defend.errors import UserError
from dist_defend.methods.pretrain.simclr import SimCLRObjective

_WORKERS = 2  # processes of lightly's loader, threads of ours


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """peers-views: loading alone; peers-simclr: an epoch with loading. Each against lightly as documented and tuned.

    UserError without lightly.
    """
    if find_spec("lightly") is None:
        raise UserError("bench peers needs lightly, which is not installed: pip install 'dist-defend[peers]'")
    ranks = runner.start()
    wanted = runner.cases(settings, "peers", ("", "small_cifar", 256, 2048), ("-resnet18", "resnet18_cifar", 64, 192))
    for number, case in enumerate(wanted):
        with tempfile.TemporaryDirectory() as folder:
            pair = Pair(case, ranks, Path(folder))
            for is_tuned in (False, True):
                if number == 0:
                    yield pair.compare_views(settings, is_tuned)
                yield pair.compare_epochs(settings, is_tuned)


class Pair:
    """Both sides on the same images: theirs through lightly's transform and loss, ours as a run has it."""

    def __init__(self, case: Case, ranks: Ranks, folder: Path) -> None:
        self.case, self.ranks = case, ranks
        self.images = runner.random_images(case.num_images)
        views, config = (View(SIMCLR), View(SIMCLR)), LoaderConfig(workers=_WORKERS)
        self.loader = runner.train_loader(
            runner.prepare(self.images, folder), views, case.batch_size, config, ranks.device
        )
        self.epochs = count()
        self.criterion = importlib.import_module("lightly.loss").NTXentLoss(temperature=TEMPERATURE)

    def their_loader(self, is_tuned: bool) -> DataLoader[Any]:
        """lightly's transform on a data set as torchvision has them: SimCLR's views as ours are, so without blur."""
        transform = importlib.import_module("lightly.transforms").SimCLRTransform(
            input_size=runner.IMAGE_SIZE,
            cj_bright=0.4,
            cj_contrast=0.4,
            cj_sat=0.4,
            cj_hue=0.1,
            gaussian_blur=0.0,
            normalize={"mean": list(runner.MEAN), "std": list(runner.STD)},
        )
        return DataLoader(
            _Pictures(self.images, transform),
            self.case.batch_size,
            shuffle=True,
            num_workers=_WORKERS,
            drop_last=True,
            persistent_workers=is_tuned,
            pin_memory=is_tuned and torch.cuda.is_available(),
        )

    def compare_views(self, settings: Settings, is_tuned: bool) -> dict[str, Any]:
        """The row of loading alone."""
        theirs, images = self.their_loader(is_tuned), self.loader.num_batches * self.case.batch_size
        return runner.compare(
            replace(self.case, name=_named("peers-views", is_tuned)),
            lambda: sum(len(batch[0][0]) for batch in theirs),
            lambda: sum(len(batch.views[0]) for batch in self.loader.epoch(next(self.epochs))),
            settings,
            images=images,
            note=f"two views of {images} images ({self.loader.backend}, two threads, against two worker processes)",
        )

    def compare_epochs(self, settings: Settings, is_tuned: bool) -> dict[str, Any]:
        """The row of training, after showing that both sides give the same loss from the same weights."""
        name = _named(self.case.name.replace("peers", "peers-simclr"), is_tuned)
        theirs, ours = runner.twin_models(self.case.encoder, seed=0, device=self.ranks.device)
        if is_tuned:
            theirs.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        rate, decay = OPTIMIZER.lr, OPTIMIZER.weight_decay
        optimizer = torch.optim.Adam(theirs.parameters(), lr=rate, weight_decay=decay, fused=is_tuned or None)
        step = GradientStep(
            SimCLRObjective(ours, TEMPERATURE), UpdateConfig(optimizer=OPTIMIZER), self.ranks, steps_per_epoch=1
        )

        def loss_of(first: Tensor, second: Tensor) -> Tensor:
            if is_tuned:
                both = torch.cat([first, second]).contiguous(memory_format=torch.channels_last)
                z1, z2 = theirs(both)[1].chunk(2)
            else:
                z1, z2 = theirs(first)[1], theirs(second)[1]
            loss: Tensor = self.criterion(z1, z2)
            return loss

        def their_step(first: Tensor, second: Tensor) -> Tensor:
            loss = loss_of(first, second)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        if not is_tuned:  # a pass over both views has other batch statistics
            self._show_equal(name, their_step, step)
        loader, device = self.their_loader(is_tuned), self.ranks.device

        def their_epoch() -> float:
            theirs.train()
            total = torch.zeros((), device=device)
            for views, *_ in loader:
                loss = their_step(*(view.to(device, non_blocking=is_tuned) for view in views))
                total += loss if is_tuned else loss.item()
            return total.item()

        return runner.compare(
            replace(self.case, name=name),
            their_epoch,
            lambda: train_epoch(step, self.loader.epoch(next(self.epochs))),
            settings,
            images=self.loader.num_batches * self.case.batch_size,
            note=f"an epoch of {self.case.num_images} images with loading; lightly as "
            + ("tuned by hand" if is_tuned else "documented"),
        )

    def _show_equal(self, name: str, their_step: Any, step: GradientStep) -> None:
        halves = np.array_split(self.images[: 2 * self.case.batch_size], 2)
        first, second = (runner.to_pixels(half, self.ranks.device) for half in halves)
        batch = Batch((first, second), torch.zeros(len(first)).long(), torch.arange(len(first)))
        runner.show_equal(
            name,
            lambda: float(their_step(runner.normalised(first), runner.normalised(second))),
            lambda: step(batch, Position())["loss"].item(),
        )


class _Pictures(Dataset[tuple[Any, int]]):
    """Images (N, H, W, 3) uint8 as PIL images, which lightly's transforms take, and what these make of them."""

    def __init__(self, images: np.ndarray, transform: Callable[[Image.Image], Any]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[row])), 0


def _named(name: str, is_tuned: bool) -> str:
    return f"{name}-{'tuned' if is_tuned else 'documented'}"
