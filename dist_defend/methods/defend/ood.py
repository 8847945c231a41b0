"""Distillation on out-of-distribution images (Asano and Saeed 2023), with ABD's defences (Hong et al., ICML 2023).

The student sees unlabelled images from outside the teacher's task, for instance patches of a single photograph, with
CutMix; the teacher labels the mixed images.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dist_defend.attacks.attack import AttackConfig
from dist_defend.batch import Batch
from dist_defend.bounds import at_least_one, positive
from dist_defend.data.augment import AugmentConfig, View
from dist_defend.data.cutmix import CutMixConfig, CutMixLoader
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.graphed import GraphMode
from dist_defend.engine.objective import Objective, at_least_float32
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.step import GradientStep, Position
from dist_defend.engine.trainer import Stage
from dist_defend.methods.defend.abd.epochs import FIRST_KEPT, Later, check_defence, check_selection
from dist_defend.methods.defend.abd.options import RetrospectionConfig, VaccineConfig
from dist_defend.methods.defend.abd.pair import Pair
from dist_defend.methods.defend.abd.retrospective_step import RetrospectiveStep
from dist_defend.methods.defend.abd.vaccine import Vaccine, agreement
from dist_defend.ops.collectives import all_reduce_sum, world_size
from dist_defend.ops.losses import Convention, distillation, divergence_rows


@dataclass(frozen=True)
class Config:
    """Defaults are those of illidanlab/ABD's cmi/vanilla_kd_ood.py. The presets have its sweeps' schedule.

    Keys:
        teacher: model folder of the suspected classifier, which teaches
        data: out-of-distribution images of the teacher's image size; labels are not read
        test: labelled test images, used for measurement only
        student: architecture of the network that is trained (`dist-defend models`)
        attack: attack whose success is measured; null: the attack in the model's card, if there is one
        temperature: softmax temperature of both networks in the distillation loss
        cutmix: how images of a batch are mixed (CutMix)
        augment: augmentation of the training images
        update: batch size, epochs, optimizer and the like
        vaccine: ABD's shuffling vaccine; null: no vaccine
        retrospection: ABD's self-retrospection, from an epoch on; null: no retrospection
        retrospection_convention: reduction of the retrospection's KL: mean: as in the distillation loss; batchmean, as
            published: times the number of classes and temperature^2 (640 at 10 classes and temperature 8)
        graph: capture the retrospection's updates as CUDA graphs: auto: on a GPU; on: an error without a GPU; off:
            never
        evaluate_every: epochs between two measurements; there is one after the last epoch too
    """

    teacher: str
    data: DatasetConfig
    test: DatasetConfig
    student: str = "wrn_16_1"
    attack: AttackConfig | None = None
    temperature: float = 8.0
    cutmix: CutMixConfig = field(default_factory=CutMixConfig)
    augment: AugmentConfig = AugmentConfig(crop="pad", pad=4, flip=0.5)
    update: UpdateConfig = UpdateConfig(batch_size=512, epochs=300, optimizer=OptimizerConfig("adam", lr=1e-3))
    vaccine: VaccineConfig | None = None
    retrospection: RetrospectionConfig | None = None
    retrospection_convention: Convention = "mean"
    graph: GraphMode = "auto"
    evaluate_every: int = 10

    def __post_init__(self) -> None:
        positive(self, "temperature")
        at_least_one(self, "evaluate_every")
        if self.update.accumulation != 1 or self.update.max_grad_norm is not None:
            raise ValueError("key 'update' has accumulation or max_grad_norm, which this method does not use")
        check_defence(self.vaccine, self.retrospection, self.update.epochs)


_RETROSPECTION = {
    "start": 297, "restart_lr": 5e-4, "synthesis_penalty": 0.0, "detach_reference": False,
}  # fmt: skip
_UPDATE = {"optimizer": {"schedule": "multistep", "milestones": [150, 300, 600], "gamma": 0.5}}  # of the sweeps
PRESETS: dict[str, dict[str, Any]] = {
    "plain": {"update": _UPDATE},
    "vaccine": {"update": _UPDATE, "vaccine": {}},
    "retrospection": {"update": _UPDATE, "retrospection": _RETROSPECTION},
    "both": {"update": _UPDATE, "vaccine": {}, "retrospection": _RETROSPECTION},
    "published": {  # both, with the published retrospection: its gradient is scaled 640 times the distillation's
        "update": _UPDATE,
        "vaccine": {},
        "retrospection": {**_RETROSPECTION, "delta_init": "zero", "min_patched": 0, "statistics": "published"},
        "retrospection_convention": "batchmean",
    },
}


class OodObjective(Objective):
    """Mean KL(teacher || student) over images and classes at temperature T, without the factor T^2.

    With a vaccine in use, images on which teacher and shuffled copies agree are suspects: the loss is the mean over the
    others minus ``vaccine.weight`` times the mean over the suspects, both over the global batch.
    """

    def __init__(self, pair: Pair, temperature: float, vaccine: Vaccine | None) -> None:
        super().__init__()
        self.student = pair.student
        self.pair, self.temperature, self.vaccine = pair, temperature, vaccine

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits = at_least_float32(self.student(batch.images))
        if self.vaccine is None or not self.vaccine.is_used:
            wanted = at_least_float32(self.pair.taught(batch.images))
            return {"loss": distillation(logits, wanted, self.temperature)}
        with torch.no_grad():
            wanted, shuffled = self.vaccine.ensemble(self.pair.teacher.normalize(batch.images))
            suspect = agreement(wanted, shuffled).to(logits.dtype)
            suspects, others = all_reduce_sum(torch.stack([suspect.sum(), (1 - suspect).sum()])).unbind()
        rows = divergence_rows(logits / self.temperature, wanted / self.temperature) / logits.shape[1]
        on_others = ((1 - suspect) * rows).sum() / others.clamp(min=1)
        on_suspects = (suspect * rows).sum() / suspects.clamp(min=1)
        loss = on_others - self.vaccine.config.weight * on_suspects
        share = suspects / (suspects + others)
        return {"loss": loss * world_size(), "suspects": share}


class SelectingStep:
    """A gradient step that keeps the images of its first batches and lets the vaccine be chosen by them."""

    def __init__(self, update: GradientStep, vaccine: Vaccine, pair: Pair) -> None:
        self.update, self.vaccine, self.pair = update, vaccine, pair

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        if self.vaccine.is_selecting:
            number = at.done(self.update.steps_per_epoch)
            if number == self.vaccine.config.selection_batches:
                self.vaccine.select()
            elif number >= FIRST_KEPT:
                self.vaccine.keep(self.pair.teacher.normalize(batch.images))
        return self.update(batch, at)

    def state_dict(self) -> dict[str, Any]:
        return {"update": self.update.state_dict(), "vaccine": self.vaccine.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.update.load_state_dict(state["update"])
        self.vaccine.load_state_dict(state["vaccine"])


def build(config: Config, context: Context) -> Plan:
    """One stage, and a second one if there is retrospection."""
    pair = Pair(config.teacher, config.student, config.test, config.attack, context, config.retrospection is not None)
    data, rows = pair.trial.dataset("defence", config.data, is_labelled=False)
    pair.check_augment(config.augment)
    batch_size, epochs = config.update.batch_size, config.update.epochs
    plain = context.train_loader(data, rows, batch_size, (View(config.augment),))
    loader = CutMixLoader(plain, config.cutmix, context.seed)
    vaccine = None
    if config.vaccine is not None:
        vaccine = Vaccine(pair.teacher.net, config.vaccine, context.seed)
    objective = OodObjective(pair, config.temperature, vaccine)
    update = context.gradient_step(objective, config.update, loader.num_batches)
    step = update if vaccine is None else SelectingStep(update, vaccine, pair)
    first = epochs if config.retrospection is None else config.retrospection.start
    check_selection(config.vaccine, first * loader.num_batches)
    every = config.evaluate_every
    stages = [Stage("ood", loader, step, first, pair.evaluate, every, is_kept=vaccine is not None)]
    late: RetrospectiveStep | None = None
    if config.retrospection is not None:
        share = partial(distillation, temperature=config.temperature, batch_size=batch_size)
        late = RetrospectiveStep(
            pair,
            config.retrospection,
            config.update.optimizer,
            share,
            partial(share, convention=config.retrospection_convention),
            batch_size=batch_size,
            steps_per_epoch=loader.num_batches,
            epochs=epochs - first,
            graph=config.graph,
        )
        stages.append(Stage("retrospection", Later(loader, first), late, epochs - first, pair.evaluate, every))

    pair.trial.look()

    def result() -> dict[str, Any]:
        return pair.result({"images": len(rows)}, vaccine, late)

    return Plan(stages, result)
