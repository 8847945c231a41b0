"""Runs on one rank and on two, compared leaf by leaf: what the tests of all methods share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_defend.config import load_experiment
from dist_defend.engine import dist
from dist_defend.engine.context import Context
from dist_defend.engine.run import RunFolder
from dist_defend.engine.step import GradientStep
from dist_defend.engine.trainer import Stage, Trainer
from dist_defend.methods import find_method
from tests.runs import untimed

Mutation = Callable[[pytest.MonkeyPatch], None]


def none(patch: pytest.MonkeyPatch) -> None:
    """What is under test."""


def train(config: Path, folder: Path, mutate: Mutation = none) -> dict[str, Any]:
    """All stages of an experiment file in float64: logged scalars, first gradients, last states, result."""
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        experiment = load_experiment(config)
        ranks = dist.start("fp64", None)
        context = Context(ranks, experiment.seed, experiment.loader, folder, experiment.method)
        plan = find_method(experiment.method).build(experiment.options, context)
        gradients: dict[str, Tensor] = {}
        for stage in plan.stages:
            watch_gradients(stage, gradients)
        run = RunFolder(folder, ranks.is_main)
        run.open(experiment.resolved(), "")
        torch.distributed.barrier() if ranks.world_size > 1 else None
        Trainer(ranks, run, experiment.trainer).fit(plan.stages, context.at_start)
        states = {stage.name: stage.step.state_dict() for stage in plan.stages}
        result = {key: value for key, value in plan.result().items() if key in ("metrics", "rows")}
        run.close()
        rows = untimed(folder) if ranks.is_main else []
        return {"gradients": gradients, "states": states, "result": result, "rows": rows}


def watch_gradients(stage: Stage, gradients: dict[str, Tensor]) -> None:
    """Note the gradients of the stage's first update."""
    if not isinstance(stage.step, GradientStep):
        return
    objective, after_backward = stage.step.objective, stage.step.objective.after_backward

    def note() -> None:
        for name, parameter in objective.named_parameters():
            if parameter.grad is not None:
                gradients.setdefault(f"{stage.name}/{name}", parameter.grad.clone())
        after_backward()

    objective.after_backward = note  # type: ignore[method-assign]


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dicts, lists and tuples with their paths."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flat(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from flat(item, f"{path}/{number}")
    else:
        yield path, value


def assert_same(
    found: dict[str, Any],
    expected: dict[str, Any],
    tolerance: float = 1e-10,
    floor: float = 1e-15,
    at_least: int = 5,
) -> None:
    """Integers and strings equal; floating point to ``tolerance`` of the largest entry, plus ``floor``.

    at_least: so many leaves must be there to compare.
    """
    left, right = dict(flat(found)), dict(flat(expected))
    assert left.keys() == right.keys()
    assert len(right) >= at_least
    for name, value in right.items():
        if not isinstance(value, Tensor | float):
            assert left[name] == value, name
            continue
        mine, theirs = (torch.as_tensor(v, dtype=torch.float64) for v in (left[name], value))
        if not theirs.numel() or theirs.isinf().any():
            assert mine.equal(theirs), name
            continue
        error = (mine - theirs).abs().max().item()
        assert error <= tolerance * theirs.abs().max().item() + floor, f"{name}: off by {error:.2e}"


class Alone:
    """What one rank makes of each case, run once: alone(name) -> experiment file, what ``train`` gives.

    make(folder, name): writes the experiment file of a case.
    """

    def __init__(self, factory: pytest.TempPathFactory, make: Callable[[Path, str], Path]) -> None:
        self._factory, self._make = factory, make
        self._done: dict[str, tuple[Path, dict[str, Any]]] = {}

    def __call__(self, name: str) -> tuple[Path, dict[str, Any]]:
        if name not in self._done:
            folder = self._factory.mktemp(name.replace(" ", "_"))
            config = self._make(folder, name)
            self._done[name] = config, train(config, folder / "one rank" / "run")
        return self._done[name]
