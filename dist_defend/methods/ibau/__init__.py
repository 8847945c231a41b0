"""I-BAU (Zeng et al., ICLR 2022): unlearn a backdoor with a few clean images, knowing neither trigger nor target.

Adversarial unlearning of backdoors via implicit hypergradient: find one perturbation that, added to all images, changes
the model's predictions; then train on images of which some carry it, with a gradient that knows that the perturbation
follows the weights.
"""

import logging
from dataclasses import replace
from typing import Any

import numpy as np

from dist_defend.attacks.poison import poison_from, triggered
from dist_defend.data.augment import View
from dist_defend.data.loader import Loader
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.trainer import Stage
from dist_defend.errors import UserError
from dist_defend.evaluate import Count, der, evaluate_classifier
from dist_defend.methods.ibau.options import LARGEST_EXACT, PRESETS, Config
from dist_defend.methods.ibau.rounds import Rounds
from dist_defend.methods.ibau.step import UnlearningStep
from dist_defend.models.classifier import Classifier

__all__ = ["PRESETS", "Config", "build"]

log = logging.getLogger(__name__)


def build(config: Config, context: Context) -> Plan:
    """One stage whose epochs are rounds."""
    model, card, sha256 = context.load_classifier(config.model)
    data, rows = context.dataset("defender", config.data, is_labelled=True)
    test, test_rows = context.dataset("test", config.test, is_labelled=True)
    _check_fit(model, {config.data.path: data, config.test.path: test}, config)
    if data.digest == test.digest:
        test_rows = np.setdiff1d(test_rows, rows)  # the official split: what is unlearned on is not tested on
        if not len(test_rows):
            raise UserError(f"{config.test.path}: all test images are the defender's; take fewer for key 'ibau.data'")
    attack = config.attack or (poison_from(card.trigger) if card.trigger else None)
    clean_loader = context.eval_loader(test, test_rows)
    triggered_loader = None if attack is None else context.eval_loader(triggered(test, attack), test_rows)
    rounds = Rounds(_loader(config, context, data, rows), model.image_size, context.ranks)
    _warn_of_unpatched(config, rounds, context)
    step = UnlearningStep(model, config, rounds, context.seed)
    latest: dict[str, Count] = {}

    def measure(which: Classifier) -> dict[str, Count]:
        return evaluate_classifier(which, clean_loader, triggered_loader, context.ranks, attack)

    def evaluate(round_: int) -> dict[str, float]:
        latest.update(measure(model))
        return {name: count.percent for name, count in latest.items() if count.n}

    def result() -> dict[str, Any]:
        original = context.load_classifier(config.model)[0].to(context.ranks.device, context.ranks.dtype)
        before, after = measure(original), latest or measure(model)
        metrics: dict[str, Any] = {"acc_before": before["acc"].percent, "defence_images": len(rows)}
        if attack is not None:
            metrics |= {"asr_before": before["asr"].percent, "der": der(before, after)}
        cleaned = replace(
            card,
            backdoored=False,
            parent_sha256=sha256,
            provenance={"method": "ibau", "data": context.digests, "rounds": config.rounds, "seed": context.seed},
        )
        row = {"run": context.folder.name, "kind": "ibau", "task": test.manifest.name, "seed": context.seed}
        return {
            "model_sha256": context.save_model(model, cleaned),
            "rows": [{**row, **{name: count.plain() for name, count in after.items()}}],
            "metrics": metrics,
        }

    return Plan([Stage("ibau", rounds, step, config.rounds, evaluate, config.evaluate_every)], result)


def _loader(config: Config, context: Context, data: PreparedDataset, rows: np.ndarray) -> Loader:
    if config.augment is None:
        context.check_order(data, rows, config.batch_size)
        return context.eval_loader(data, rows, config.batch_size)
    return context.train_loader(data, rows, config.batch_size, (View(config.augment),), drop_last=False)


def _check_fit(model: Classifier, datasets: dict[str, PreparedDataset], config: Config) -> None:
    size, classes = model.image_size, model.num_classes
    for path, dataset in datasets.items():
        if dataset.num_classes != classes or dataset.image_shape != (size, size, 3):
            raise UserError(
                f"{path} has {dataset.num_classes} classes and images of {dataset.image_shape}, but {config.model} "
                f"wants {classes} classes and {size} px: prepare the data set that it was trained on"
            )
    if config.attack is not None and config.attack.target_class >= classes:
        target = config.attack.target_class
        raise UserError(f"key 'ibau.attack.target_class' is {target}; the classes are 0 to {classes - 1}")
    if config.augment is not None and config.augment.size not in (None, size):
        raise UserError(
            f"key 'ibau.augment.size' is {config.augment.size}, but the model wants {size} px: leave it out"
        )
    if config.solver == "exact" and 3 * size**2 > LARGEST_EXACT:
        raise UserError(
            f"key 'ibau.solver' is exact, which is for at most {LARGEST_EXACT} values, but delta has {3 * size**2}: "
            "say neumann or cg"
        )


def _warn_of_unpatched(config: Config, rounds: Rounds, context: Context) -> None:
    """int(0.01 n) is 0 for n < 100: published, and silent there."""
    sizes = {rounds.size(number) for number in range(rounds.batches)}
    unpatched = sorted(size for size in sizes if not config.num_patched(size))
    if unpatched and context.ranks.is_main:
        log.warning(
            "no image of a batch of %s carries the perturbation (patched_fraction %g, rounded down): such a batch only "
            "fine-tunes and unlearns nothing; say min_patched: 1, or choose larger batches",
            " or ".join(map(str, unpatched)),
            config.patched_fraction,
        )
