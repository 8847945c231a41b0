"""I-BAU (Zeng et al., ICLR 2022): unlearn a backdoor with a few clean images, knowing neither trigger nor target.

Implicit backdoor adversarial unlearning: find one perturbation that, added to all images, changes the model's
predictions; then train on images of which some carry it. The gradient of the weights is a hypergradient: it takes into
account that the perturbation depends on the weights.
"""

from typing import Any

import numpy as np

from dist_defend.data.augment import View
from dist_defend.data.loader import Loader
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.trainer import Stage
from dist_defend.errors import UserError
from dist_defend.methods.defend.ibau.options import LARGEST_EXACT, PRESETS, Config
from dist_defend.methods.defend.ibau.rounds import Rounds
from dist_defend.methods.defend.ibau.step import UnlearningStep
from dist_defend.trial import Trial

__all__ = ["PRESETS", "Config", "build"]


def build(config: Config, context: Context) -> Plan:
    """One stage whose epochs are rounds."""
    trial = Trial(config.model, context)
    data, rows = trial.dataset("defence", config.data)
    model = trial.model
    _check(config, model.image_size)
    trial.test_on(config.test, config.attack, without=(data, rows))  # the official split takes both from one set
    loader = _loader(config, context, data, rows)
    is_constant = config.augment is None
    rounds = Rounds(loader, model.image_size, context.ranks, is_constant, config.num_orders)
    trial.look(data, rows)
    step = UnlearningStep(model, config, rounds, context.seed)

    def result() -> dict[str, Any]:
        trial.examination.show_perturbation(step.delta)
        if step.orders is not None and (note := step.orders.disagreement()) is not None:
            context.tell(note)
        metrics, provenance = {"defence_images": len(rows)}, {"rounds": config.rounds}
        return trial.result(model, metrics=metrics, provenance=provenance)

    stage = Stage("ibau", rounds, step, config.rounds, lambda _: trial.evaluate(model), config.evaluate_every)
    stage.shown = "outer_loss", "delta_norm"
    return Plan([stage], result)


def _loader(config: Config, context: Context, data: PreparedDataset, rows: np.ndarray) -> Loader:
    if config.augment is None:
        context.check_order(data, rows, config.batch_size)
        return context.eval_loader(data, rows, config.batch_size)
    return context.train_loader(data, rows, config.batch_size, (View(config.augment),), drop_last=False)


def _check(config: Config, size: int) -> None:
    """UserError for options that do not go with a model for images of ``size`` pixels."""
    if config.augment is not None and config.augment.size not in (None, size):
        raise UserError(
            f"key 'ibau.augment.size' is {config.augment.size}, but the model wants {size} px: leave it out"
        )
    if config.solver == "exact" and 3 * size**2 > LARGEST_EXACT:
        raise UserError(
            f"key 'ibau.solver' is exact, which is for at most {LARGEST_EXACT} values, but delta has {3 * size**2}: "
            "say neumann or cg"
        )
