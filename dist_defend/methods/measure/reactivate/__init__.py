"""Re-activation (Min et al., NeurIPS 2024): how little brings a backdoor back. It needs the trigger: an oracle.

    L = CE(f(x), y) over N clean images, of which q are stamped and get the attacker's label, for a few epochs

ASR then says nothing alone. Beside it stand the same with q = 0, the same from a clean network that never saw the
trigger (what q images teach anew is no memory), and ACC. An encoder is tuned together with its downstream head.
"""

import copy
import logging
from functools import partial
from typing import Any

import numpy as np

from dist_defend.attacks.attack import attack_from, check_classes
from dist_defend.attacks.poison import STAMPED
from dist_defend.counts import Count, percents, told, warn_near_chance
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.trainer import Stage
from dist_defend.errors import UserError
from dist_defend.methods.measure.reactivate.images import FixedImages, few_poisoned
from dist_defend.methods.measure.reactivate.networks import ReactivationStep, opened, with_heads
from dist_defend.methods.measure.reactivate.options import PRESETS as PRESETS
from dist_defend.methods.measure.reactivate.options import Config
from dist_defend.trial import Examination

log = logging.getLogger(__name__)
MOST_LOST = 3.0  # points of ACC that re-tuning may cost, for its ASR to say anything


def build(config: Config, context: Context) -> Plan:
    """The encoders' heads, where there are encoders; then q images, none, and q on the control, a stage each."""
    folders = {"model": config.model, **({"control": config.control} if config.control else {})}
    found = {role: opened(folder, config, context) for role, folder in folders.items()}
    card = found["model"][1]
    train, rows = context.dataset("train", config.data, is_labelled=True)
    test, test_rows = context.dataset("test", config.test, is_labelled=True)
    context.check_classes(train.classes, config.data.path, test.classes, config.test.path)
    attack = config.attack or (attack_from(card.attack) if card.attack else None)
    if attack is None:
        raise UserError(f"key 'reactivate.attack' is missing, and {config.model} names none: say what is stamped")
    check_classes(attack, train.num_classes, "reactivate.attack.")
    examination = Examination(test, test_rows, attack, train.num_classes, context)
    models = {role: model for role, (model, _) in found.items()}
    networks, start, first, head = with_heads(models, config, context, (train, rows))
    made, chosen = few_poisoned(train, rows, attack, config, context)
    stamped, clean = FixedImages(made, chosen, config, context), FixedImages(train, chosen, config, context)
    stages: list[Stage] = [*first]
    steps: dict[str, ReactivationStep] = {}
    for name, role, source in (
        ("poisoned", "model", stamped),
        ("clean", "model", clean),
        ("control", "control", stamped),
    ):
        if role in networks:
            network = copy.deepcopy(networks[role])
            context.synchronise(network)
            options = {"ranks": context.ranks, "steps_per_epoch": source.num_batches}
            steps[name] = ReactivationStep(config, network, partial(start, role, network), **options)
            stages.append(Stage(f"reactivate/{name}", source, steps[name], config.epochs, is_kept=True))

    def result() -> dict[str, Any]:
        for role, network in networks.items():
            start(role, network)
        before = {role: examination.measure(network) for role, network in networks.items()}
        after = {name: examination.measure(step.model) for name, step in steps.items()}
        kind = card.defended_by or ("backdoored" if card.backdoored else "clean")
        warn_near_chance(kind, examination.task, before["model"]["acc"], train.num_classes)
        if context.ranks.is_main:
            _tell(config, before["model"], after)
        examination.save_examples()
        row = {**examination.row(kind, before["model"]), "acc_retuned": after["poisoned"]["acc"].plain(), **head}
        for name, counts in after.items():
            row["asr_retuned" + ("" if name == "poisoned" else f"_{name}")] = counts["asr"].plain()
        every = {**{f"{role}, before": counts for role, counts in before.items()}, **after}
        plain = {when: {name: count.plain() for name, count in counts.items()} for when, counts in every.items()}
        metrics = {"poisoned_rows": np.flatnonzero(made.flags == STAMPED).tolist(), "counts": plain}
        return {"rows": [row], "targets": examination.targets(), **head, "metrics": metrics}

    return Plan(stages, result)


def _tell(config: Config, before: dict[str, Count], after: dict[str, dict[str, Count]]) -> None:
    """How far q images bring the attack back, beside what tells a memory from a lesson."""
    q, n = config.num_poisoned, config.num_images
    for name, counts in after.items():
        what = {"poisoned": f"{q} of {n} poisoned", "clean": f"none of {n} poisoned"}.get(name, "the control, likewise")
        log.info("re-tuned, %s: %s", what, told(counts, percents(before) if name != "control" else None))
    if config.control is None:
        log.warning("key 'reactivate.control' names no clean model: what %d images teach anew cannot be told", q)
    if before["acc"].percent - after["poisoned"]["acc"].percent > MOST_LOST:
        log.warning("re-tuning costs more than %g points of ACC: its ASR says little", MOST_LOST)
