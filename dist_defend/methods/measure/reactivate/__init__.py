"""Re-activation (Min et al., NeurIPS 2024): does tuning on a few poisoned images bring a backdoor back?

    L = CE(f(x), y) over N clean images, of which q are stamped and get the attacker's label, for a few epochs

The ASR after it says nothing alone: q images can also teach a new backdoor. So it is compared with that of the same
tuning at q = 0 and that of a clean network, the control, which never saw the trigger; ACC must hold too. An encoder is
tuned together with its downstream head. This is an oracle's measure, since it needs the trigger.
"""

import copy
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_defend.attacks.attack import AttackConfig, attack_from, check_classes
from dist_defend.attacks.poison import STAMPED, image_size_of
from dist_defend.counts import Count, percents, told, warn_near_chance
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.trainer import Stage
from dist_defend.errors import UserError
from dist_defend.methods.measure.reactivate.images import FixedImages, few_poisoned, half_triggered
from dist_defend.methods.measure.reactivate.networks import ReactivationStep, normalization_of, opened, with_heads
from dist_defend.methods.measure.reactivate.options import PRESETS as PRESETS
from dist_defend.methods.measure.reactivate.options import Config
from dist_defend.methods.measure.reactivate.query import Perturbation, QueryConfig, QueryObjective
from dist_defend.trial import Examination

log = logging.getLogger(__name__)
_ASR = {  # columns of a row, and the network whose ASR each one is
    "asr_retuned": "poisoned",
    "asr_retuned_clean": "clean",
    "asr_retuned_control": "control",
    "asr_queried": "model, queried",
    "asr_queried_control": "control, queried",
}
MOST_LOST = 3.0  # points of ACC that re-tuning may cost; beyond, its ASR says little


def build(config: Config, context: Context) -> Plan:
    """Stages: heads of encoders; tuning with q poisoned images, with none, and of the control; the query, if any."""
    made = Reactivation(config, context)
    return Plan(made.stages, made.result)


class Reactivation:
    """A model and its control, the images that they are tuned on, and the counts before and after."""

    def __init__(self, config: Config, context: Context) -> None:
        self.config, self.context = config, context
        folders = {"model": config.model, **({"control": config.control} if config.control else {})}
        found = {role: opened(folder, config, context) for role, folder in folders.items()}
        self.models, self.card = {role: model for role, (model, _) in found.items()}, found["model"][1]
        self.train, rows = context.dataset("train", config.data, is_labelled=True)
        test, test_rows = context.dataset("test", config.test, is_labelled=True)
        context.check_classes(self.train.classes, config.data.path, test.classes, config.test.path)
        attack = config.attack or (attack_from(self.card.attack) if self.card.attack else None)
        if attack is None:
            raise UserError(f"key 'reactivate.attack' is missing, and {config.model} names none: say what is stamped")
        check_classes(attack, self.train.num_classes, "reactivate.attack.")
        self.examination = Examination(test, test_rows, attack, self.train.num_classes, context)
        self.networks, self.start, first, self.head = with_heads(self.models, config, context, (self.train, rows))
        self.poisoned, self.rows = few_poisoned(self.train, rows, attack, config, context)
        self.steps: dict[str, ReactivationStep] = {}
        self.stages = [*first, *self.tuning()]
        self.woken: dict[str, nn.Module] = {}
        if config.query is not None:
            self.stages.append(self.querying(config.query, attack))

    def tuning(self) -> Iterator[Stage]:
        """A stage for each copy that is tuned."""
        config, context = self.config, self.context
        stamped, clean = (
            FixedImages(data, self.rows, context, config.batch_size, config.augment)
            for data in (self.poisoned, self.train)
        )
        roles = {"poisoned": ("model", stamped), "clean": ("model", clean), "control": ("control", stamped)}
        for name, (role, images) in roles.items():
            if role in self.networks:
                network = copy.deepcopy(self.networks[role])
                context.synchronise(network)
                options = {"ranks": context.ranks, "steps_per_epoch": images.num_batches}
                step = ReactivationStep(config, network, partial(self.start, role, network), **options)
                self.steps[name] = step
                yield Stage(f"reactivate/{name}", images, step, config.epochs, is_kept=True)

    def querying(self, config: QueryConfig, attack: AttackConfig) -> Stage:
        """The stage that trains the perturbation of images, by the original networks and the re-tuned one."""
        context, networks = self.context, self.networks
        asked = half_triggered(self.train, self.rows, attack, context)
        images = FixedImages(asked, self.rows, context, config.update.batch_size)
        torch.manual_seed(context.seed)
        perturbation = Perturbation(normalization_of(self.models["model"]), image_size_of(self.train), config)
        trio = networks["model"], self.steps["poisoned"].model, networks["control"]
        objective = QueryObjective(perturbation, trio, config.weight, context.ranks, self.start_all)
        self.woken = {role: nn.Sequential(perturbation, network) for role, network in networks.items()}
        step = context.gradient_step(objective, config.update, images.num_batches)
        return Stage("reactivate/query", images, step, config.update.epochs)

    def start_all(self) -> None:
        """Give the original networks their trained heads."""
        for role, network in self.networks.items():
            self.start(role, network)

    def result(self) -> dict[str, Any]:
        """Counts of all networks on all test images, and one row."""
        self.start_all()
        measure, card = self.examination.measure, self.card
        found = {f"{role}, before": measure(network) for role, network in self.networks.items()}
        found |= {name: measure(step.model) for name, step in self.steps.items()}
        found |= {f"{role}, queried": measure(network) for role, network in self.woken.items()}
        kind = card.defended_by or ("backdoored" if card.backdoored else "clean")
        warn_near_chance(kind, self.examination.task, found["model, before"]["acc"], self.train.num_classes)
        if self.context.ranks.is_main:
            _tell(self.config, found)
        self.examination.save_examples()
        row = {**self.examination.row(kind, found["model, before"]), **self.head}
        row["acc_retuned"] = found["poisoned"]["acc"].plain()
        row |= {key: found[name]["asr"].plain() for key, name in _ASR.items() if name in found}
        metrics = {
            "poisoned_rows": np.flatnonzero(self.poisoned.flags == STAMPED).tolist(),
            "counts": {name: {key: n.plain() for key, n in counts.items()} for name, counts in found.items()},
        }
        return {"rows": [row], **self.examination.names(), **self.head, "metrics": metrics}


def _tell(config: Config, found: dict[str, dict[str, Count]]) -> None:
    """Log the counts of all networks; warn where the ASR after re-tuning says little: no control, or much ACC lost."""
    before, q = found["model, before"], config.num_poisoned
    for name, counts in found.items():
        log.info(
            "re-activation, %s: %s", name, told(counts, percents(before) if name in ("poisoned", "clean") else None)
        )
    if config.control is None:
        log.warning("key 'reactivate.control' names no clean model: what %d images teach anew cannot be told", q)
    if before["acc"].percent - found["poisoned"]["acc"].percent > MOST_LOST:
        log.warning("re-tuning costs more than %g points of ACC: its ASR says little", MOST_LOST)
