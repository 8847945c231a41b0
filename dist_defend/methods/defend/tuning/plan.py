"""The plan of a tuning defence: the suspect, the defender's images, one stage, what was before and after."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_defend.data.loader import Loader
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.trainer import Stage
from dist_defend.methods.defend.defender import defence_data, defence_loader
from dist_defend.methods.defend.tuning.options import TuningConfig
from dist_defend.methods.defend.tuning.step import TuningStep
from dist_defend.models.classifier import Classifier
from dist_defend.trial import Trial


@dataclass(frozen=True)
class Tuned:
    """What a method's step is made from. model: the suspect, which is trained, on the ranks' device."""

    model: Classifier
    trial: Trial
    data: PreparedDataset
    rows: np.ndarray
    loader: Loader
    options: dict[str, Any]  # of TuningStep, beside model and optimizer: ranks, lengths, graph


def tuning_plan(
    config: TuningConfig,
    context: Context,
    make: Callable[[Tuned], tuple[Sequence[Stage], TuningStep]],
    shown: tuple[str, ...] = ("loss",),
    chosen_by: str | None = None,
) -> Plan:
    """Stages that come first, then the tuning itself; the result measures before and after.

    make: gets the parts -> what comes first, and the step. chosen_by: what anything is chosen by, if it is.
    UserError for a suspect or images that do not fit.
    """
    trial = Trial(config.model, context)
    data, rows = defence_data(config, trial)
    trial.test_on(config.test, config.attack, without=(data, rows))
    trial.look(data, rows)
    model = trial.model
    context.synchronise(model)
    loader = defence_loader(config, context, data, rows)
    options = {"ranks": context.ranks, "steps_per_epoch": loader.num_batches, "graph": config.graph}
    first, step = make(Tuned(model, trial, data, rows, loader, options))
    stage = Stage(context.method, loader, step, config.epochs, lambda _: trial.evaluate(model), config.evaluate_every)
    stage.stop_when, stage.shown = step.is_over, shown

    def result() -> dict[str, Any]:
        metrics, provenance = {"defence_images": len(rows), **step.metrics()}, {"epochs": config.epochs}
        return trial.result(model, chosen_by=chosen_by, metrics=metrics, provenance=provenance)

    return Plan([*first, stage], result)
