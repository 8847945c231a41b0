"""I-BAU: the update of the weights alone, and whole rounds with their evaluations."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_defend.attacks.attack import AttackConfig
from dist_defend.attacks.patterns import BadNets
from dist_defend.attacks.poison import triggered
from dist_defend.bench import runner
from dist_defend.bench.published import ibau as reference
from dist_defend.bench.runner import Case, Settings
from dist_defend.counts import evaluate_classifier
from dist_defend.data.loader import DatasetConfig, Loader, LoaderConfig, make_loader
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.dist import Ranks
from dist_defend.engine.graphed import GraphMode
from dist_defend.engine.step import Position
from dist_defend.methods.defend.ibau.options import Config
from dist_defend.methods.defend.ibau.rounds import Rounds
from dist_defend.methods.defend.ibau.step import UnlearningStep

CLASSES = 10
EVALUATION_BATCH = 200  # images, as published
POISON = AttackConfig(BadNets(size=4, margin=1), target_class=8)


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """ibau-outer-step; ibau-round: inner and outer pass, ACC and ASR on as many clean and triggered images each."""
    ranks = runner.start()
    (case,) = runner.cases(settings, "ibau", ("", "ibau_vgg", 100, 300))
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(case, ranks, Path(folder))
        yield pair.compare_steps(settings)
        yield pair.compare_rounds(settings)


class Pair:
    """Both sides from the same weights, images and perturbation; no image is normalised, as published."""

    def __init__(self, case: Case, ranks: Ranks, folder: Path) -> None:
        self.case, self.ranks = case, ranks
        self.config = config_of(case)
        self.data, self.test = (
            runner.prepare(runner.random_images(case.num_images, seed), folder, split, CLASSES, storage="npy")
            for seed, split in ((5, "train"), (4, "test"))
        )
        self.attacked = triggered(self.test, POISON)
        self.theirs, ours = (runner.seasoned(case.encoder, CLASSES, "none").eval().to(ranks.device) for _ in range(2))
        self.optimizer = torch.optim.Adam(self.theirs.parameters(), lr=self.config.optimizer.lr)
        self.rounds = Rounds(self._loader(self.data, case.batch_size), runner.IMAGE_SIZE, ranks)
        self.step = UnlearningStep(ours, self.config, self.rounds, seed=0)
        self.batches = _host_batches(self.data, self.data.labels, case.batch_size)

    def compare_steps(self, settings: Settings) -> dict[str, Any]:
        """The row of an outer step, after showing that both give the same loss before and after an update."""
        case, size = replace(self.case, name="ibau-outer-step"), self.case.batch_size
        patched = list(range(max(1, self.config.num_patched(size))))
        delta = torch.randn(self.step.delta.shape, generator=torch.Generator().manual_seed(0))
        delta = (delta * 10 / delta.norm()).to(self.ranks.device)  # the radius of the published projection
        with torch.no_grad():
            self.step.delta.copy_(delta)
        images, labels, weights = self.step.first
        mask = torch.zeros(size, 1, 1, 1, device=self.ranks.device)
        mask[patched] = 1

        def baseline() -> float:
            first = self.batches[0]
            step = reference.outer_step
            return float(step(self.theirs, self.optimizer, delta, first, first, patched, steps=self.config.K))

        def ours() -> float:
            return self.step.outer(images, labels, mask, weights)["outer_loss"].item()

        for _ in range(2):
            runner.show_equal(case.name, baseline, ours, limit=1e-3)
        note = f"one update, {len(patched)} of {size} images perturbed, K = {self.config.K}"
        return runner.compare(case, baseline, ours, settings, images=size, note=note)

    def compare_rounds(self, settings: Settings) -> dict[str, Any]:
        """The row of a round with ACC and ASR; the published loop evaluates each round twice."""
        case, ranks = replace(self.case, name="ibau-round"), self.ranks
        clean, attacked = (self._loader(dataset, EVALUATION_BATCH) for dataset in (self.test, self.attacked))
        their_clean = _host_batches(self.test, self.test.labels, EVALUATION_BATCH)
        targets = np.full(len(self.test), POISON.target_class)
        their_triggered = _host_batches(self.attacked, targets, EVALUATION_BATCH)
        numbers = count()

        def ours() -> None:
            round_ = next(numbers)
            for number, batch in enumerate(self.rounds.epoch(round_)):
                self.step(runner.on_device(batch, ranks), Position(epoch=round_, batch=number))
            evaluate_classifier(self.step.model, clean, attacked, ranks, POISON)

        def baseline() -> Any:
            arguments = (self.batches, their_clean, their_triggered, ranks.device)
            return reference.unlearn_round(self.theirs, self.optimizer, *arguments)

        images = case.num_images
        note = f"{images} images to unlearn on, {images} clean and {images} triggered ones to test on"
        return runner.compare(case, baseline, ours, settings, images=images, note=note)

    def _loader(self, dataset: PreparedDataset, batch_size: int) -> Loader:
        config = LoaderConfig("resident", 1)
        return make_loader(dataset, config=config, batch_size=batch_size, device=self.ranks.device)


def config_of(case: Case, graph: GraphMode = "auto") -> Config:
    """The method's defaults; images come from memory."""
    return Config("", DatasetConfig(""), DatasetConfig(""), batch_size=case.batch_size, graph=graph)


def _host_batches(dataset: PreparedDataset, labels: np.ndarray, size: int) -> list[Any]:
    """(images, labels) in order, contiguous, in host memory."""
    pixels = runner.to_pixels(dataset.images(np.arange(len(dataset))), torch.device("cpu")).contiguous()
    return list(zip(pixels.split(size), torch.from_numpy(labels).split(size), strict=True))
