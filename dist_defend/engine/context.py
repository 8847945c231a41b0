"""What a method's build() gets, and what it gives back."""

import logging
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn

from dist_defend.data.augment import View
from dist_defend.data.classes import check_same_classes, tell_missing_classes, tell_uniform_batches
from dist_defend.data.loader import DatasetConfig, Loader, LoaderConfig, make_loader, select_rows
from dist_defend.data.store import PreparedDataset, open_dataset
from dist_defend.engine.clock import WorkClock
from dist_defend.engine.dist import Ranks
from dist_defend.engine.objective import Objective
from dist_defend.engine.optim import UpdateConfig as UpdateConfig  # methods may take it from here
from dist_defend.engine.step import GradientStep
from dist_defend.engine.trainer import Stage
from dist_defend.errors import UserError
from dist_defend.files import sha256_file
from dist_defend.models.artifact import ModelCard, card_of, load_classifier, load_simclr, save_artifact
from dist_defend.models.classifier import Classifier
from dist_defend.models.encoder import SimCLR
from dist_defend.ops.collectives import convert_sync_batchnorm

Place = Literal["memory", "disk"]  # where a cache lies
log = logging.getLogger(__name__)


@dataclass
class Plan:
    """A method, built: what to train, and how to finish (save the model, return entries for result.json)."""

    stages: list[Stage]
    result: Callable[[], dict[str, Any]]


@dataclass
class Context:
    """The run's surroundings, handed to every method."""

    ranks: Ranks
    seed: int
    loader_config: LoaderConfig
    folder: Path
    method: str = ""  # its name: the section of its keys, and the kind of its rows
    digests: dict[str, str] = field(default_factory=dict)  # role -> sha256 of each data set used
    notes: list[str] = field(default_factory=list)  # told to the user, and in result.json
    at_start: list[Callable[[], None]] = field(default_factory=list)  # what is measured before the first step
    clock: WorkClock = field(default_factory=WorkClock)
    has_content: ClassVar[bool] = True  # of weights and images; `dist-defend plan` only pretends to have some

    def dataset(
        self, role: str, config: DatasetConfig, is_labelled: bool = False
    ) -> tuple[PreparedDataset, np.ndarray]:
        """Open a data set and choose its rows; remembers the digest for result.json. UserError if labels lack.

        Tells of classes that the data set has and the chosen rows lack.
        """
        dataset = open_dataset(config.path, config.resize)
        rows = select_rows(dataset, config, self.seed)
        missing = tell_missing_classes(dataset.labels, rows, dataset.classes)
        if missing is not None:
            is_sorted = config.subset == "first" and dataset.manifest.order_seed is None
            remedy = "say subset: random, or prepare it again without --keep-order" if is_sorted else "take more"
            self.tell(f"{role} data {config.path}: {missing}; {remedy}")
        if is_labelled and dataset.labels[rows].min() < 0:
            raise UserError(f"{config.path}: has images without a label; it cannot be {role} data")
        self.digests[role] = dataset.digest
        return dataset, rows

    def tell(self, note: str) -> None:
        """Warn the user once, and keep the note for result.json."""
        if note not in self.notes:
            self.notes.append(note)
            if self.ranks.is_main:
                log.warning("%s", note)

    def check_classes(
        self, first: Sequence[str] | None, first_path: str, second: Sequence[str] | None, second_path: str
    ) -> None:
        """check_same_classes, whose note is told."""
        note = check_same_classes(first, first_path, second, second_path)
        if note is not None:
            self.tell(note)

    def check_order(self, dataset: PreparedDataset, rows: np.ndarray, batch_size: int) -> None:
        """Tell where batches of these rows in order, which train, are no fair samples, as of a set sorted by class."""
        note = tell_uniform_batches(dataset.labels[rows], batch_size)
        if note is not None:
            self.tell(f"{dataset.path}: {note}; prepare it again without --keep-order")

    def train_loader(
        self,
        dataset: PreparedDataset,
        rows: np.ndarray,
        batch_size: int,
        views: Sequence[View],
        accumulation: int = 1,
        drop_last: bool = True,
    ) -> Loader:
        """Shuffled. UserError unless every rank and micro-batch gets an equal share of a whole batch.

        Without drop_last an incomplete last batch counts; the ranks' shares of it may differ by one.
        """
        parts = self.ranks.world_size * accumulation
        if batch_size % parts:
            raise UserError(
                f"key 'batch_size' is {batch_size}, not divisible by {self.ranks.world_size} ranks x {accumulation} "
                "micro-batches; choose a multiple"
            )
        return self._loader(dataset, rows, batch_size, views, shuffle=True, drop_last=drop_last)

    def eval_loader(self, dataset: PreparedDataset, rows: np.ndarray | None = None, batch_size: int = 512) -> Loader:
        """In order, every row once, no augmentation."""
        return self._loader(dataset, rows, batch_size, (View(),))

    def whole_loader(
        self, dataset: PreparedDataset, rows: np.ndarray, batch_size: int = 512, views: Sequence[View] = (View(),)
    ) -> Loader:
        """As eval_loader, but every rank reads everything, in these views."""
        return self._loader(dataset, rows, batch_size, views, rank=0, world_size=1)

    def _loader(
        self, dataset: PreparedDataset, rows: np.ndarray | None, batch_size: int, views: Sequence[View], **how: Any
    ) -> Loader:
        """how: of make_loader's other arguments, those that are not the run's."""
        ranks, config = self.ranks, self.loader_config
        own: dict[str, Any] = {"seed": self.seed, "rank": ranks.rank, "world_size": ranks.world_size}
        how = {"device": ranks.device, **own, **how}
        return make_loader(dataset, config=config, batch_size=batch_size, rows=rows, views=views, **how)

    def room(self, shape: Sequence[int], place: Place) -> Tensor:
        """Space for numbers of the run's dtype: on the device, or in a file of the run folder, mapped into memory.

        The file loses its name at once and so ends with the process. OSError where the disk has no room for it.
        """
        if place == "memory":
            return torch.empty(*shape, dtype=self.ranks.dtype, device=self.ranks.device)
        count = math.prod(shape)
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".cache_") as file:
            os.posix_fallocate(file.fileno(), 0, count * self.ranks.dtype.itemsize)  # now, not as SIGBUS later
            return torch.from_file(file.name, shared=True, size=count, dtype=self.ranks.dtype).view(*shape)

    def synchronise(self, model: nn.Module, second_order: bool = False) -> None:
        """Batch normalisation over the global batch, in place, where there are several ranks.

        The model goes to the device first, as what becomes of its norms depends on that. second_order: it will be
        differentiated twice.
        """
        if self.ranks.world_size > 1:
            convert_sync_batchnorm(model.to(self.ranks.device), second_order)

    def load_model(self, folder: str) -> tuple[SimCLR, str]:
        """An encoder's model folder -> the model and the sha256 of its weights. Tells what its card only guesses."""
        model, _, sha256 = self.load_encoder(folder)
        return model, sha256

    def load_encoder(self, folder: str) -> tuple[SimCLR, ModelCard, str]:
        """As load_model, with the card."""
        model, card = load_simclr(folder)
        self._tell_guesses(folder, card)
        return model, card, sha256_file(Path(folder) / "model.safetensors")

    def load_classifier(self, folder: str) -> tuple[Classifier, ModelCard, str]:
        """A classifier's model folder -> the model, its card and the sha256 of its weights. Tells as load_model."""
        model, card = load_classifier(folder)
        self._tell_guesses(folder, card)
        return model, card, sha256_file(Path(folder) / "model.safetensors")

    def _tell_guesses(self, folder: str, card: ModelCard) -> None:
        if not card.guessed:
            return
        guesses = ", ".join(f"{what} {getattr(card, what)}" for what in card.guessed)
        options = " and ".join(f"--{what.replace('_', '-')}" for what in card.guessed)
        self.tell(
            f"{folder}: its source did not tell {guesses}, so import guessed, and the numbers of this run rest on "
            f"that: measure with `dist-defend import ... --check DATA`, and import again with {options}"
        )

    def card(self, model: SimCLR | Classifier, provenance: dict[str, Any], **told: Any) -> ModelCard:
        """The card of a model that this run made: what the model says of itself, and ``told``."""
        own = {"method": self.method, "data": self.digests}
        return card_of(model, provenance={**own, **provenance}, **told)

    def save_model(self, model: SimCLR | Classifier, card: ModelCard) -> str:
        """Write the run's model/ folder; returns the sha256 of its weights, on every rank."""
        digest = [save_artifact(self.folder / "model", model, card) if self.ranks.is_main else ""]
        if self.ranks.world_size > 1:
            torch.distributed.broadcast_object_list(digest)
        return digest[0]

    def gradient_step(self, objective: Objective, update: UpdateConfig, num_batches: int) -> GradientStep:
        """The first-order step of a stage with so many batches per epoch."""
        return GradientStep(objective, update, self.ranks, num_batches)
