"""I-BAU on two gloo ranks is I-BAU on one: explicit sums over ranks, uneven shares, ranks without a patched image."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_defend.methods.defend.ibau import step
from dist_defend.methods.defend.ibau.step import UnlearningStep
from dist_defend.ops import hypergrad
from dist_defend.ops.collectives import all_reduce_sum
from tests.distributed.comparison import Alone, Mutation, assert_same, train
from tests.ranks import Pool
from tests.runs import make_classifier, make_data, make_experiment

TOLERANCE = 1e-11  # of a tensor's largest entry; Adam divides rounding errors by small slopes
ATTACK = {"trigger": {"name": "badnets"}, "target_class": 1}
CASES: dict[str, dict[str, Any]] = {  # of 11 images in batches of 5: shares of 3 and 2, and of 1 and none
    "default": {},
    "all_to_all": {"attack": {**ATTACK, "labels": "all_to_all"}},
    "one_patched": {"min_patched": 1, "patched_fraction": 0.0},
    "adam_projected": {"inner": {"name": "adam", "lr": 0.1}, "project_radius": 1.0, "clamp": True},
    "augmented": {"augment": {"crop": "pad", "flip": 0.5}, "batch_size": 6},
    "orders": {"orders": 3},
    "orders_augmented": {"orders": 2, "augment": {"crop": "pad", "flip": 0.5}, "batch_size": 6},
    "cg": {"solver": "cg", "K": 3},
}


def experiment(folder: Path, changes: dict[str, Any]) -> Path:
    options = {
        "model": make_classifier(folder / "model"),
        "data": {"path": make_data(folder / "data", 11)},
        "test": {"path": make_data(folder / "test", 13, seed=1)},
        "attack": ATTACK,
        "rounds": 2,
        "batch_size": 5,
        "patched_fraction": 0.4,
        "penalty": 0.1,
        "inner": {"name": "sgd", "lr": 1.0, "momentum": 0.0},
        **changes,
    }
    return make_experiment(folder, "ibau", options)


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_same(found, expected, TOLERANCE, floor=1e-15, at_least=51)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return Alone(tmp_path_factory, lambda folder, name: experiment(folder, CASES[name]))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_rank(name: str, alone: Alone, two_ranks: Pool, tmp_path: Path) -> None:
    config, expected = alone(name)
    first, second = two_ranks.run(train, config, tmp_path / "two ranks" / "run")
    assert_close(first, expected)
    assert_close({**second, "rows": expected["rows"]}, expected)
    keys = {key for row in expected["rows"] for key in row}
    assert {"inner_loss", "delta_norm", "outer_loss", "direct_norm", "implicit_norm", "v1_norm", "asr"} <= keys


def penalty_on_each_rank(patch: pytest.MonkeyPatch) -> None:
    """The regulariser once per rank."""

    def each(*given: Any) -> Any:
        outer, inner, delta, parameters, solver, step_size, penalty = given
        return hypergrad.hypergradient(outer, inner, delta, parameters, solver, step_size, 2 * penalty)

    patch.setattr(step, "hypergradient", each)


def own_outer_slope(patch: pytest.MonkeyPatch) -> None:
    """Every rank starts from its own g."""
    local(patch, lambda shape: len(shape) == 4, calls={1})


def own_products(patch: pytest.MonkeyPatch) -> None:
    """The Hessian products of a rank's own images."""
    local(patch, lambda shape: len(shape) == 4, calls=set())


def own_weights(patch: pytest.MonkeyPatch) -> None:
    """No sum of the gradients of the weights."""
    local(patch, lambda shape: len(shape) == 1, calls=set())


def local(patch: pytest.MonkeyPatch, is_meant: Callable[[torch.Size], bool], calls: set[int]) -> None:
    """Leave the sums over ranks of such tensors out of the hypergradient; calls: only these, counted from 1."""
    seen = [0]

    def reduce(tensor: Tensor) -> Tensor:
        seen[0] += is_meant(tensor.shape)
        return tensor if is_meant(tensor.shape) and (not calls or seen[0] in calls) else all_reduce_sum(tensor)

    patch.setattr(hypergrad, "all_reduce_sum", reduce)


def own_perturbation(patch: pytest.MonkeyPatch) -> None:
    """Each rank climbs on its own images."""
    patch.setattr(step, "all_reduce_sum", lambda tensor: tensor)


def patched_among_own_images(patch: pytest.MonkeyPatch) -> None:
    """Each rank draws for itself."""
    original = UnlearningStep._patched

    def draw(self: UnlearningStep, round_: int, number: int) -> Tensor:
        return original(self, round_ + self.ranks.rank, number)

    patch.setattr(UnlearningStep, "_patched", draw)


@pytest.mark.parametrize(
    "mutate",
    [penalty_on_each_rank, own_outer_slope, own_products, own_weights, own_perturbation, patched_among_own_images],
)
def test_the_comparison_catches(mutate: Mutation, alone: Alone, two_ranks: Pool, tmp_path: Path) -> None:
    config, expected = alone("default")
    first, second = two_ranks.run(train, config, tmp_path / "two ranks" / "run", mutate)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(first, expected)
        assert_close({**second, "rows": expected["rows"]}, expected)
