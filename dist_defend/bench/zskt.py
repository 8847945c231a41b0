"""ZSKT: a pseudo-batch, plain, with the shuffling vaccine, and with self-retrospection too."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import torch

from dist_defend.batch import Batch
from dist_defend.bench import runner
from dist_defend.bench.published import zskt as reference
from dist_defend.bench.runner import Case, Settings
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine.dist import Ranks
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.engine.step import Position
from dist_defend.methods.defend.abd.options import RetrospectionConfig, VaccineConfig
from dist_defend.methods.defend.zskt.batches import LatentBatches
from dist_defend.methods.defend.zskt.options import Config
from dist_defend.methods.defend.zskt.step import TransferStep
from dist_defend.models.generator import ZSKTGenerator

CLASSES = 10
TEACHER = "wrn_16_2"
STUDENT_STEPS = 10  # per pseudo-batch, as published
DEFENCES: dict[str, dict[str, Any]] = {
    "zskt": {},
    "zskt-sv": {"vaccine": VaccineConfig()},
    "zskt-sv-sr": {"vaccine": VaccineConfig(), "retrospection": RetrospectionConfig()},
}


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """One for each of DEFENCES; the encoder is the student."""
    ranks = runner.start()
    (case,) = runner.cases(settings, "zskt", ("", "wrn_16_1", 128, 128))
    for name, defence in DEFENCES.items():
        yield Pair(replace(case, name=name), ranks, defence).compare(settings)


class Pair:
    """Both sides from the same weights, with the same z, shuffles, starts of delta and perturbed images."""

    def __init__(self, case: Case, ranks: Ranks, defence: dict[str, Any]) -> None:
        self.case, self.ranks = case, ranks
        self.config = Config(
            "",
            DatasetConfig(""),
            batch_size=case.batch_size,
            student_steps=STUDENT_STEPS,
            generator_optimizer=OptimizerConfig("adam", lr=1e-3),
            student_optimizer=OptimizerConfig("adam", lr=2e-3),
            **defence,
        )
        teacher, student = (
            runner.seasoned(arch, CLASSES, "none").net.eval().to(ranks.device, ranks.dtype)
            for arch in (TEACHER, case.encoder)
        )
        torch.manual_seed(1)
        generator = ZSKTGenerator(self.config.z_dim, runner.IMAGE_SIZE).to(ranks.device, ranks.dtype)
        made = copy.deepcopy(generator)
        learner: Any = copy.deepcopy(student).train()
        taught: Any = copy.deepcopy(teacher)
        optimizers = torch.optim.Adam(made.parameters(), 1e-3), torch.optim.Adam(learner.parameters(), 2e-3)
        frozen = teacher.to(memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]
        self.step = TransferStep(frozen, student, generator, self.config, ranks, seed=0)
        members = [] if self.step.vaccine is None else copy.deepcopy(self.step.vaccine.ensemble.members)
        shuffled = [m.to(memory_format=torch.contiguous_format).requires_grad_(True) for m in members]  # type: ignore[call-overload]
        self.players = reference.Players(made, learner, taught, *optimizers, shuffled)
        self.latents = LatentBatches(case.batch_size, self.config.z_dim, 0, ranks)

    def compare(self, settings: Settings) -> dict[str, Any]:
        """The row, after showing that both sides give the same losses in a first pseudo-batch."""
        runner.show_equal(self.case.name, lambda: self.theirs(0), lambda: self.ours(0), limit=1e-2)
        theirs, ours = count(1), count(1)
        note = f"one pseudo-batch, {STUDENT_STEPS} student steps, {TEACHER} to {self.case.encoder}"
        both = (lambda: self.theirs(next(theirs)), lambda: self.ours(next(ours)))
        return runner.compare(self.case, *both, settings, images=self.case.batch_size, note=note)

    def theirs(self, number: int) -> float:
        """The published pseudo-batch -> the generator's loss and the mean of the student's, added."""
        z = self.latents.draw(number).to(self.ranks.device, self.ranks.dtype)
        made, learned = reference.pseudo_batch(self.players, z, STUDENT_STEPS, self._plan(number))
        return float(made + sum(learned) / STUDENT_STEPS)

    def ours(self, number: int) -> float:
        """Our pseudo-batch -> the same."""
        batch = next(self.latents.epoch(number))
        z = batch.images.to(self.ranks.device, self.ranks.dtype)
        scalars = self.step(Batch((z,), batch.labels, batch.index), Position(epoch=number))
        return (scalars["generator_loss"] + scalars["student_loss"]).item()

    def _plan(self, number: int) -> Any:
        """What self-retrospection draws, for the published side."""
        found = self.step.retrospection
        if found is None:
            return None
        start = found.start(runner.IMAGE_SIZE, number).to(self.ranks.device, self.ranks.dtype)
        masks = [found.patched(self.step.own, number, step) for step in range(STUDENT_STEPS)]
        patched = [mask.flatten().nonzero().flatten().tolist() for mask in masks]
        return reference.Retrospection(start, patched, patched, found.config.inner_rounds)
