"""The plan of a tuning defence: the suspect, the defender's images, one stage, counts before and after."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_defend.counts import Count, agreeing, predict
from dist_defend.data.loader import Loader
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.trainer import Stage
from dist_defend.methods.defend.defender import defence_data, defence_loader
from dist_defend.methods.defend.tuning.options import TuningConfig
from dist_defend.methods.defend.tuning.selection import EpochChoice, split_held_out
from dist_defend.methods.defend.tuning.step import TuningStep
from dist_defend.models.classifier import Classifier
from dist_defend.trial import Trial


@dataclass(frozen=True)
class Tuned:
    """The parts that a method's step is made from. model: the suspect, which is trained, on the ranks' device.

    rows: those of the defender's images that are trained on.
    """

    model: Classifier
    trial: Trial
    data: PreparedDataset
    rows: np.ndarray
    loader: Loader
    options: dict[str, Any]  # arguments of TuningStep: ranks, steps_per_epoch, graph


def tuning_plan(
    config: TuningConfig,
    context: Context,
    make: Callable[[Tuned], tuple[Sequence[Stage], TuningStep]],
    shown: tuple[str, ...] = ("loss",),
    chosen_by: str | None = None,
) -> Plan:
    """Stages that come first, then the stage of the tuning; the result measures before and after.

    make: parts -> the stages that come first, and the step. chosen_by: data that a choice is made by, if one is.
    UserError for a suspect or images that do not fit.
    """
    trial = Trial(config.model, context)
    data, rows = defence_data(config, trial)
    trial.test_on(config.test, config.attack, without=(data, rows))
    trial.look(data, rows)
    model, trained, held_out = trial.model, rows, rows[:0]
    context.synchronise(model)
    if config.held_out:
        trained, held_out = split_held_out(rows, config.held_out, context.seed, context.method)
    loader = defence_loader(config, context, data, trained)
    options = {"ranks": context.ranks, "steps_per_epoch": loader.num_batches, "graph": config.graph}
    first, step = make(Tuned(model, trial, data, trained, loader, options))
    stage = Stage(context.method, loader, step, config.epochs, lambda _: trial.evaluate(model), config.evaluate_every)
    stage.stop_when, stage.shown = step.is_over, shown
    if config.held_out:
        chosen_by = chosen_by or "defence_data"
        judges = context.eval_loader(data, held_out)

        def count(judged: Classifier) -> Count:
            return agreeing(*predict(judged, judges, context.ranks)[:2])

        step.choice = EpochChoice(model, trial.original, count, config.max_accuracy_drop)
        _choose_epoch(stage, step.choice, trial, model)

    def result() -> dict[str, Any]:
        chosen = {} if step.choice is None else {"held_out_images": len(held_out), **step.choice.metrics()}
        metrics, provenance = {"defence_images": len(rows), **step.metrics(), **chosen}, {"epochs": config.epochs}
        return trial.result(model, chosen_by=chosen_by, metrics=metrics, provenance=provenance)

    return Plan([*first, stage], result)


def _choose_epoch(stage: Stage, choice: EpochChoice, trial: Trial, model: Classifier) -> None:
    """Have the stage judge the model after each epoch, and at its end deliver and measure the chosen epoch."""
    measure_every, stage.evaluate_every = stage.evaluate_every, 1

    def evaluate(epoch: int) -> dict[str, float]:
        told = choice.look(epoch)
        return told | (trial.evaluate(model) if epoch % measure_every == 0 else {})

    def finish() -> None:
        choice.deliver()
        trial.evaluate(model)

    stage.evaluate, stage.finish = evaluate, finish
