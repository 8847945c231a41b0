"""An epoch of CMI: the iterations that synthesise a batch, then the steps that distil on all images so far."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_defend.batch import Batch
from dist_defend.data.augment import apply_augment
from dist_defend.data.draws import draw
from dist_defend.data.order import rank_slice
from dist_defend.engine.dist import Ranks
from dist_defend.engine.objective import Objective, at_least_float32
from dist_defend.engine.step import Position, Step
from dist_defend.methods.defend.abd.pair import Pair
from dist_defend.methods.defend.cmi.options import Config
from dist_defend.methods.defend.cmi.synthesis import Synthesis
from dist_defend.ops.losses import distillation
from dist_defend.ops.streams import Stream, draws
from dist_defend.ops.transfer import to_device

_CLASSES, _ORDER = range(2)  # what is drawn: classes to synthesise, order of the pool
_POOL_VIEW = 2  # number of the view in its draws; 0 and 1 are those of the synthesis
NO_LABEL = -1


class CmiBatches:
    """Batches without images: the classes to synthesise, then rows of the pool, which grows in each epoch.

    The pool's rows come in whole passes, each in a new random order; a batch may span two passes.
    """

    def __init__(self, config: Config, num_classes: int, seed: int, ranks: Ranks) -> None:
        self.config, self.num_classes, self.seed, self.ranks = config, num_classes, seed, ranks
        self.num_batches = config.synthesis.iterations + config.distillation_steps
        self._latest: tuple[int, np.ndarray] | None = None  # an epoch, and its rows of the pool

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """This rank's shares, from the start_batch-th on."""
        size, iterations = self.config.synthesis.batch_size, self.config.synthesis.iterations
        classes = np.sort(draws(self.seed, Stream.CMI_BATCHES, _CLASSES, epoch).integers(self.num_classes, size=size))
        for _ in range(start_batch, iterations):
            yield self._share(classes, np.arange(size))
        for number in range(max(0, start_batch - iterations), self.config.distillation_steps):
            rows = self.pool_rows(epoch)[number]
            yield self._share(np.full(len(rows), NO_LABEL), rows)

    def own_pool_rows(self, epoch: int, number: int) -> np.ndarray:
        """This rank's rows of the pool for the number-th step of an epoch on it, (b,) int64; on the host."""
        rows: np.ndarray = self.pool_rows(epoch)[number]
        return rows[rank_slice(len(rows), self.ranks.rank, self.ranks.world_size)]

    def pool_rows(self, epoch: int) -> np.ndarray:
        """Rows of the pool for each step of an epoch, (distillation_steps, batch_size)."""
        if self._latest is None or self._latest[0] != epoch:
            self._latest = epoch, self._drawn_pool_rows(epoch)
        return self._latest[1]

    def _drawn_pool_rows(self, epoch: int) -> np.ndarray:
        held, batch = (epoch + 1) * self.config.synthesis.batch_size, self.config.update.batch_size
        wanted = self.config.distillation_steps * batch
        count = -(-wanted // held)
        passes = [draws(self.seed, Stream.CMI_BATCHES, _ORDER, epoch, n).permutation(held) for n in range(count)]
        return np.concatenate(passes)[:wanted].reshape(-1, batch)

    def _share(self, labels: np.ndarray, rows: np.ndarray) -> Batch:
        own = rank_slice(len(rows), self.ranks.rank, self.ranks.world_size)
        return Batch((), torch.from_numpy(labels[own]), torch.from_numpy(rows[own]))


class PoolObjective(Objective):
    """T^2 KL(teacher || student) at temperature T, mean over the batch."""

    def __init__(self, pair: Pair, temperature: float) -> None:
        super().__init__()
        self.student = pair.student
        self.taught, self.temperature = pair.taught, temperature

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        wanted, logits = (at_least_float32(f(batch.images)) for f in (self.taught, self.student))
        return {"loss": distillation(logits, wanted, self.temperature, "batchmean")}


class CmiStep:
    """An iteration of the synthesis or an update of the student, by the batch's place in the epoch.

    update: the student's step, given batches of images. first: the epoch of the run at which this stage starts.
    """

    def __init__(self, batches: CmiBatches, synthesis: Synthesis, update: Step, pair: Pair, first: int) -> None:
        self.batches, self.synthesis, self.update, self.pair = batches, synthesis, update, pair
        self.config, self.first = batches.config, first

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        iterations, of_run = self.config.synthesis.iterations, replace(at, epoch=self.first + at.epoch)
        is_synthesis = at.batch < iterations
        self.pair.student.train(not is_synthesis)
        if is_synthesis:
            return self.synthesis(batch, of_run)
        rows = self.batches.own_pool_rows(of_run.epoch, at.batch - iterations)
        images = self._with_images(batch, rows, of_run.done(self.batches.num_batches))
        return self.update(images, replace(at, batch=at.batch - iterations))

    def _with_images(self, batch: Batch, rows: np.ndarray, calls: int) -> Batch:
        """The pool's images at batch.index (b,), which are ``rows`` on the host, augmented by (seed, call, row)."""
        size, pool, augment = self.pair.image_size, self.synthesis.pool, self.config.augment
        params = torch.from_numpy(draw(self.pair.context.seed, calls, rows, _POOL_VIEW, augment, size, size))
        images = apply_augment(pool.images[batch.index], to_device(params, batch.index.device), augment)
        return batch._replace(views=(images.to(self.pair.context.ranks.dtype),))

    def state_dict(self) -> dict[str, Any]:
        return {"synthesis": self.synthesis.state_dict(), "update": self.update.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.synthesis.load_state_dict(state["synthesis"])
        self.update.load_state_dict(state["update"])
