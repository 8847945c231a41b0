"""What the ledger's calls are made of: batches and networks without content, and what the trainer does with them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dist_defend.batch import Batch
from dist_defend.data.augment import View
from dist_defend.data.loader import DatasetConfig, LoaderConfig
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context
from dist_defend.engine.dist import Ranks
from dist_defend.engine.objective import Objective
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.step import GradientStep, Position, Step
from dist_defend.engine.trainer import Stage, Trainer, TrainerConfig
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.models.encoder import SimCLR, build_simclr
from tests.capture.ledger import DEVICE, Accelerator

SIZE, CLASSES, ROWS = 32, 10, 1000
RANKS = Ranks(cast(Any, Accelerator()), torch.float32)
Call = Callable[[], object]
DATA = DatasetConfig("data")


def images(count: int, size: int = SIZE) -> Tensor:
    """As a loader gives them on a GPU."""
    return torch.empty(count, 3, size, size, device=DEVICE).contiguous(memory_format=torch.channels_last)


def batch_of(count: int, views: int = 1, size: int = SIZE) -> Batch:
    labels, index = torch.zeros(2, count, dtype=torch.int64, device=DEVICE).unbind()
    return Batch(tuple(images(count, size) for _ in range(views)), labels, index)


class Batches:
    """As data.loader.Loader, on a GPU."""

    def __init__(self, num_samples: int, batch_size: int, views: int = 1, size: int = SIZE) -> None:
        self.num_samples, self.batch_size, self.views, self.size = num_samples, batch_size, views, size
        self.num_batches = -(-num_samples // batch_size)

    def shuffled(self) -> "Batches":
        return self

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        for number in range(start_batch, self.num_batches):
            count = min(self.batch_size, self.num_samples - number * self.batch_size)
            yield batch_of(count, self.views, self.size)


@dataclass
class Surroundings(Context):
    """What a method's build() is given: models with fresh weights, and data sets without content."""

    arch: str = "resnet18_cifar"
    size: int = SIZE
    has_content = False

    def dataset(self, role: str, config: DatasetConfig, is_labelled: bool = False) -> tuple[Any, np.ndarray]:
        labels, shape = np.arange(ROWS) % CLASSES, (self.size, self.size, 3)
        names = tuple(map(str, range(CLASSES)))
        data = SimpleNamespace(image_shape=shape, labels=labels, num_classes=CLASSES, classes=names, path=Path("data"))
        return data, np.arange(ROWS)

    def check_order(self, dataset: PreparedDataset, rows: np.ndarray, batch_size: int) -> None:
        """Nothing to tell."""

    def load_encoder(self, folder: str) -> tuple[SimCLR, Any, str]:
        card = SimpleNamespace(backdoored=False, attack=None, guessed=())
        return encoder(self.arch, self.size), card, ""

    def _loader(
        self, dataset: PreparedDataset, rows: np.ndarray | None, batch_size: int, views: Sequence[View], **how: Any
    ) -> Any:
        return Batches(ROWS if rows is None else len(rows), batch_size, len(views), self.size)


def surroundings(**options: Any) -> Surroundings:
    return Surroundings(RANKS, 0, LoaderConfig(), Path("run"), **options)


def stepped(step: Step, batches: Iterator[Batch], at: Iterator[Position] | None = None) -> Call:
    """What Trainer.fit does with every batch."""
    trainer = Trainer(RANKS, cast(Any, None), TrainerConfig())
    places = at or cycle([Position()])

    def call() -> None:
        batch = next(batches)
        trainer._add(step(trainer._move(batch), next(places)), len(batch.labels))

    return call


def staged(stage: Stage) -> Call:
    """The step of a stage, with its own batches."""
    return stepped(stage.step, (batch for epoch in range(9) for batch in stage.loader.epoch(epoch)))


def gradient(objective: Objective, batch: Batch, **options: Any) -> Call:
    update = UpdateConfig(epochs=10, optimizer=OptimizerConfig("adam"), **options)
    step = GradientStep(objective, update, RANKS, steps_per_epoch=10)
    return stepped(step, cycle([batch]))


def encoder(arch: str = "resnet18_cifar", size: int = SIZE) -> SimCLR:
    return build_simclr(arch, "cifar10", size)


def classifier(arch: str, normalization: str = "cifar10") -> Classifier:
    model = build_classifier(arch, CLASSES, normalization, SIZE)
    moved: Classifier = model.to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def teacher(arch: str = "wrn_16_2") -> Classifier:
    return classifier(arch).eval().requires_grad_(False)
