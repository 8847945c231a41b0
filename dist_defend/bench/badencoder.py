"""BadEncoder: one step on images in memory, and one epoch with loading, for one reference (K = 1)."""

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dist_defend.attacks.stamping import stamp_images
from dist_defend.attacks.trigger import white_square
from dist_defend.batch import Batch
from dist_defend.bench import runner
from dist_defend.bench.published import badencoder as published
from dist_defend.bench.runner import Case, Settings
from dist_defend.bench.simclr import train_epoch
from dist_defend.data.augment import REFERENCE, View
from dist_defend.data.loader import LoaderConfig
from dist_defend.engine.dist import Ranks
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.step import GradientStep, Position
from dist_defend.methods.attack.badencoder import BadEncoderObjective, freeze_norms
from dist_defend.models.folding import fold_frozen_norms

OPTIMIZER = OptimizerConfig("sgd", lr=1e-3, momentum=0.9, weight_decay=5e-4)
TRIGGER_SIZE = 10  # pixels


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """badencoder: a step, on images that are there already; badencoder-epoch: with the loaders of both sides."""
    ranks = runner.start()
    wanted = runner.cases(
        settings, "badencoder", ("", "small_cifar", 256, 2048), ("-resnet18", "resnet18_cifar", 32, 128)
    )
    for case in wanted:
        pair = Pair(case, ranks)
        yield pair.compare_steps(settings)
        if case is wanted[0]:
            with tempfile.TemporaryDirectory() as folder:
                yield pair.compare_epochs(settings, Path(folder))


class Pair:
    """Both sides from the same clean encoder, reference and trigger."""

    def __init__(self, case: Case, ranks: Ranks) -> None:
        self.case, self.ranks = case, ranks
        self.images = runner.random_images(case.num_images)
        self.reference = runner.random_images(1, seed=1)
        self.pixels = runner.to_pixels(self.images, ranks.device)
        self.reference_pixels = runner.to_pixels(self.reference, ranks.device)
        self.trigger = white_square(runner.IMAGE_SIZE, TRIGGER_SIZE).to(ranks.device)
        theirs, ours = runner.twin_models(case.encoder, seed=0, device=ranks.device)
        self.clean, self.backdoored, encoder = theirs.f.eval(), copy.deepcopy(theirs.f), ours.f
        published.freeze_batch_norm(self.backdoored)
        self.optimizer = torch.optim.SGD(
            self.backdoored.parameters(),
            lr=OPTIMIZER.lr,
            momentum=OPTIMIZER.momentum,
            weight_decay=OPTIMIZER.weight_decay,
        )
        with torch.no_grad():
            features = torch.cat([self.clean(runner.normalised(part)) for part in self.pixels.split(256)])
            reference_features = self.clean(runner.normalised(self.reference_pixels))
        freeze_norms(encoder, "bn")
        fold_frozen_norms(encoder, self.reference_pixels)
        objective = BadEncoderObjective(
            encoder,
            [self.trigger],
            self.reference_pixels,
            reference_features,
            functional.normalize(features, dim=1).__getitem__,
        )
        self.step = GradientStep(objective, UpdateConfig(optimizer=OPTIMIZER), ranks, steps_per_epoch=1)

    def compare_steps(self, settings: Settings) -> dict[str, Any]:
        """The row of a step, after showing that both give the same loss."""
        size = self.case.batch_size
        index = torch.arange(size)
        images, augmented = self.pixels[index], self.pixels.flip(3)[index]  # any images do for A(r)
        batch = Batch((images, augmented), torch.zeros(size).long(), index.to(self.ranks.device))
        repeated = self.reference_pixels.expand(size, -1, -1, -1)
        theirs: list[Tensor] = [
            runner.normalised(x) for x in (images, stamp_images(images, self.trigger), repeated, augmented)
        ]

        def baseline() -> float:
            clean, triggered, reference, changed = theirs
            arguments = (self.backdoored, self.clean, self.optimizer, clean, [triggered], [reference], [changed])
            return float(published.badencoder_step(*arguments)[0])

        def ours() -> float:
            return self.step(batch, Position())["loss"].item()

        runner.show_equal(self.case.name, baseline, ours)
        note = "a step, without loading; the features of the clean encoder are computed once per run"
        return runner.compare(self.case, baseline, ours, settings, images=size, note=note)

    def compare_epochs(self, settings: Settings, folder: Path) -> dict[str, Any]:
        """The row of an epoch with loading."""
        case, keep = replace(self.case, name="badencoder-epoch"), (1 - self.trigger.mask).cpu()
        mask = keep.permute(0, 2, 3, 1).expand(1, -1, -1, 3).numpy().astype("int64")
        dataset = published.ShadowDataset(
            self.images, 255.0 * (1 - mask), mask, self.reference, runner.MEAN, runner.STD
        )
        baseline = published.shadow_loader(dataset, case.batch_size)
        config, views = LoaderConfig(workers=baseline.num_workers), (View(), View(REFERENCE, image=self.reference[0]))
        prepared = runner.prepare(self.images, folder)
        loader = runner.train_loader(prepared, views, case.batch_size, config, self.ranks.device)
        models, epochs = (self.backdoored, self.clean), count()
        return runner.compare(
            case,
            lambda: published.badencoder_epoch(*models, self.optimizer, baseline, self.ranks.device),
            lambda: train_epoch(self.step, loader.epoch(next(epochs))),
            settings,
            images=loader.num_batches * case.batch_size,
            note=f"an epoch of {case.num_images} images with loading ({loader.backend} against PIL in two workers)",
        )
