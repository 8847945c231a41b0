"""ZSKT with ABD on two gloo ranks is the same on one: z, masks, patched images, every gradient and product."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_defend.engine.context import Context
from dist_defend.methods.defend.abd import retrospection, vaccine
from dist_defend.methods.defend.abd.retrospection import SelfRetrospection
from dist_defend.methods.defend.zskt import step
from dist_defend.methods.defend.zskt.batches import LatentBatches
from dist_defend.ops import hypergrad
from dist_defend.ops.collectives import all_reduce_sum, rank, world_size
from tests.distributed.comparison import Alone, Mutation, assert_same, none, train
from tests.ranks import Pool
from tests.runs import make_classifier, make_data, make_experiment

TOLERANCE = 1e-9  # of a tensor's largest entry: Adam divides tiny gradients by tiny ones
ATTACK = {"trigger": {"name": "badnets"}, "target_class": 1}
RETROSPECTION = {"inner_rounds": 2, "patched_fraction": 0.2, "K": 3, "start": 1}
CASES: dict[str, dict[str, Any]] = {
    "zskt": {},
    "sv selected": {"vaccine": {"selection_batches": 4}},
    "sv and sr": {"vaccine": {}, "retrospection": {**RETROSPECTION, "restart_lr": 1e-4}},
    "sr on the student": {"retrospection": {**RETROSPECTION, "perturbs": "student", "detach_reference": False}},
}


def experiment(folder: Path, changes: dict[str, Any]) -> Path:
    options = {
        "teacher": make_classifier(folder / "teacher", arch="wrn_10_1", attack=ATTACK),
        "test": {"path": make_data(folder / "test", 13, seed=1)},
        "student": "wrn_10_1",
        "pseudo_batches": 5,
        "batch_size": 6,
        "z_dim": 8,
        "generator_width": 8,
        "student_steps": 2,
        "evaluate_every": 2,
        **changes,
    }
    return make_experiment(folder, "zskt", options)


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_same(found, expected, TOLERANCE, floor=1e-14, at_least=51)


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
    assert {"generator_loss", "student_loss", "acc", "asr"} <= keys
    assert ("suppression" in keys) == (name == "sv and sr")  # too few images have a tail that is worth a vaccine
    assert ("outer_loss" in keys) == ("sr" in name)


def own_statistics(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Context, "synchronise", lambda self, model, second_order=False: None)


def own_z(patch: pytest.MonkeyPatch) -> None:
    """Each rank draws for itself."""
    original = LatentBatches.draw

    def draw(self: LatentBatches, number: int) -> Tensor:
        return original(self, number + 100 * self.own.start)

    patch.setattr(LatentBatches, "draw", draw)


def own_gradients(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(step, "all_reduce_together", lambda tensors: tensors)


def own_mask(patch: pytest.MonkeyPatch) -> None:
    """The suppression loss is averaged over a rank's own suspects."""
    patch.setattr(vaccine, "all_reduce_sum", lambda tensor: 2 * tensor if tensor.ndim == 0 else tensor)


def own_tail(patch: pytest.MonkeyPatch) -> None:
    """Mean and deviation of a rank's own divergences."""
    patch.setattr(vaccine, "all_reduce_sum", lambda tensor: tensor)


def tail_of_share(mutate: Mutation) -> float:
    """All of the tail is with the first of two ranks."""
    logs = torch.cat([torch.full((6,), -3.0), torch.linspace(-0.2, 0.2, 194)])
    share = logs if world_size() == 1 else logs.split(100)[rank()]
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        return vaccine.tail_ratio(10**share, torch.full_like(share, 10)).item()


def test_the_tail_is_that_of_all_ranks(two_ranks: Pool) -> None:
    assert tail_of_share(none) == pytest.approx(0.03)
    assert two_ranks.run(tail_of_share, none) == pytest.approx([0.03, 0.03])
    assert two_ranks.run(tail_of_share, own_tail) != pytest.approx([0.03, 0.03])


def own_slope(patch: pytest.MonkeyPatch) -> None:
    """Each rank's delta climbs on its own images."""
    patch.setattr(retrospection, "all_reduce_sum", lambda tensor: tensor)


def own_products(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(hypergrad, "all_reduce_sum", lambda tensor: tensor if tensor.ndim == 4 else all_reduce_sum(tensor))


def own_patched(patch: pytest.MonkeyPatch) -> None:
    """int(fraction b) of each rank's own images."""

    def draw(self: SelfRetrospection, own: slice, *place: int) -> Tensor:
        mask = torch.zeros(own.stop - own.start, 1, 1, 1, dtype=torch.float64)
        mask[: max(1, int(self.config.patched_fraction * len(mask)))] = 1
        return mask

    patch.setattr(SelfRetrospection, "patched", draw)


@pytest.mark.parametrize(
    ("name", "mutate"),
    [
        ("zskt", own_statistics),
        ("zskt", own_z),
        ("zskt", own_gradients),
        ("sv and sr", own_mask),
        ("sv and sr", own_slope),
        ("sv and sr", own_products),
        ("sv and sr", own_patched),
    ],
)
def test_the_comparison_catches(name: str, mutate: Mutation, alone: Alone, two_ranks: Pool, tmp_path: Path) -> None:
    config, expected = alone(name)
    first, second = two_ranks.run(train, config, tmp_path / "two ranks" / "run", mutate)
    with pytest.raises(AssertionError):
        assert_close(first, expected)
        assert_close({**second, "rows": expected["rows"]}, expected)
