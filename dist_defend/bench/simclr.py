"""SimCLR pretraining, a whole epoch: PIL views in two workers and plain steps against our loader and step."""

import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_defend.batch import Batch
from dist_defend.bench import runner
from dist_defend.bench.published import simclr as published
from dist_defend.bench.runner import Case, Settings
from dist_defend.data.augment import SIMCLR, View
from dist_defend.data.loader import LoaderConfig
from dist_defend.engine.dist import Ranks
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.step import GradientStep, Position
from dist_defend.methods.pretrain.simclr import SimCLRObjective

TEMPERATURE = 0.5
OPTIMIZER = OptimizerConfig("adam", lr=1e-3, weight_decay=1e-6)


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """simclr: one epoch, loading included, with as many worker threads as the baseline has worker processes."""
    ranks = runner.start()
    wanted = runner.cases(settings, "simclr", ("", "small_cifar", 256, 2048), ("-resnet18", "resnet18_cifar", 64, 192))
    for case in wanted:
        with tempfile.TemporaryDirectory() as folder:
            yield _epoch(case, settings, ranks, Path(folder))


def _epoch(case: Case, settings: Settings, ranks: Ranks, folder: Path) -> dict[str, Any]:
    images = runner.random_images(case.num_images)
    theirs, ours = runner.twin_models(case.encoder, seed=0, device=ranks.device)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=OPTIMIZER.lr, weight_decay=OPTIMIZER.weight_decay)
    step = GradientStep(SimCLRObjective(ours, TEMPERATURE), UpdateConfig(optimizer=OPTIMIZER), ranks, steps_per_epoch=1)
    first, second = (runner.to_pixels(half, ranks.device) for half in np.array_split(images[: 2 * case.batch_size], 2))
    batch = Batch((first, second), torch.zeros(len(first)).long(), torch.arange(len(first)))
    one, other = (runner.normalised(view) for view in (first, second))
    runner.show_equal(
        case.name,
        lambda: published.simclr_step(theirs, optimizer, one, other, TEMPERATURE),
        lambda: step(batch, Position())["loss"].item(),
    )
    baseline = published.pair_loader(images, runner.MEAN, runner.STD, case.batch_size)
    config = LoaderConfig(workers=baseline.num_workers)
    loader = runner.train_loader(
        runner.prepare(images, folder), (View(SIMCLR), View(SIMCLR)), case.batch_size, config, ranks.device
    )
    epochs = count()
    return runner.compare(
        case,
        lambda: published.simclr_epoch(theirs, optimizer, baseline, TEMPERATURE, ranks.device),
        lambda: train_epoch(step, loader.epoch(next(epochs))),
        settings,
        images=loader.num_batches * case.batch_size,
        note=f"an epoch of {case.num_images} images with loading ({loader.backend} against PIL in two workers)",
    )


def train_epoch(step: GradientStep, batches: Iterator[Batch]) -> float:
    """What the trainer does between two log lines: sum the losses on the device, read them once."""
    return sum((step(batch, Position())["loss"] for batch in batches), torch.zeros(())).item()
