"""Clean, OOD and CMI distillation on two gloo ranks are those on one rank, without and with both defences."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_defend.data import cutmix
from dist_defend.methods.defend import ood
from dist_defend.methods.defend.abd import retrospective_step
from dist_defend.methods.defend.cmi import inversion, synthesis
from dist_defend.ops.collectives import all_gather_rows, rank
from dist_defend.ops.streams import draws
from tests.distributed.comparison import Alone, Mutation, assert_same, train
from tests.ranks import Pool
from tests.runs import make_classifier, make_data, make_experiment

TOLERANCE = 1e-9  # of a tensor's largest entry
ATTACK = {"trigger": {"name": "badnets"}, "target_class": 1}
RETROSPECTION = {"start": 1, "inner_rounds": 2, "synthesis_penalty": 0.0, "detach_reference": False}
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
SYNTHESIS = {
    "batch_size": 6, "iterations": 3, "width": 4, "latent_dim": 5,
    "contrast": {"negatives": 7, "bank_size": 10, "dim": 4},
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "kd": ("kd", {}),
    "ood": ("ood", {}),
    "ood_both": ("ood", {"vaccine": {"members": 2}, "retrospection": RETROSPECTION}),
    "ood_selected": ("ood", {"vaccine": {"selection_batches": 12}, "update": {"batch_size": 2, "epochs": 2}}),
    "cmi": ("cmi", {"update": {"batch_size": 4, "epochs": 3, "optimizer": SGD}}),
    "cmi_both": ("cmi", {"vaccine": {"members": 2}, "retrospection": RETROSPECTION}),
}


def experiment(folder: Path, method: str, changes: dict[str, Any]) -> Path:
    own = {"distillation_steps": 2, "synthesis": SYNTHESIS} if method == "cmi" else {}
    data = {"data": {"path": make_data(folder / "data", 16)}} if method != "cmi" else {}
    options = {
        "teacher": make_classifier(folder / "teacher", arch="wrn_10_1"),
        "test": {"path": make_data(folder / "test", 13, seed=1)},
        "student": "wrn_10_1",
        "attack": ATTACK,
        "update": {"batch_size": 4, "epochs": 2, "optimizer": SGD},
        **data,
        **own,
        **changes,
    }
    return make_experiment(folder, method, options)


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert_same(found, expected, TOLERANCE, floor=1e-13, at_least=51)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return Alone(tmp_path_factory, lambda folder, name: experiment(folder, *CASES[name]))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_rank(name: str, alone: Alone, two_ranks: Pool, tmp_path: Path) -> None:
    config, expected = alone(name)
    first, second = two_ranks.run(train, config, tmp_path / "two ranks" / "run")
    assert_close(first, expected)
    assert_close({**second, "rows": expected["rows"]}, expected)


def partners_among_own_images(patch: pytest.MonkeyPatch) -> None:
    """Each rank mixes what it has."""
    patch.setattr(cutmix, "all_gather_rows", lambda images, rows: torch.cat([images] * len(rows)))


def own_suspects(patch: pytest.MonkeyPatch) -> None:
    """Means over a rank's own suspects and others."""
    patch.setattr(ood, "all_reduce_sum", lambda counts: counts)


def own_gradient_beside_the_hypergradient(patch: pytest.MonkeyPatch) -> None:
    """No sum over ranks of the distillation loss's gradient."""
    patch.setattr(retrospective_step, "all_reduce_together", lambda gradients: gradients)


def own_statistics(patch: pytest.MonkeyPatch) -> None:
    """The batch-norm distance of a rank's own batch."""

    def moments(inputs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        pairs = (torch.var_mean(x, (0, 2, 3), correction=0) for x in inputs)
        return [(mean, variance) for variance, mean in pairs]

    patch.setattr(inversion, "global_moments", moments)


def own_columns(patch: pytest.MonkeyPatch) -> None:
    """Contrast with a rank's own images: the others' columns are zeros."""

    def gather(x: Tensor, rows: list[int]) -> Tensor:
        if len(x) != rows[rank()] or x.shape[1:] != (4,):
            return all_gather_rows(x, rows)
        before, after = sum(rows[: rank()]), sum(rows[rank() + 1 :])
        return torch.nn.functional.pad(x, (0, 0, before, after))

    patch.setattr(inversion, "all_gather_rows", gather)


def own_rows_of_the_bank(patch: pytest.MonkeyPatch) -> None:
    """Codes and negatives drawn by each rank for itself."""
    patch.setattr(synthesis, "draws", lambda seed, stream, *place: draws(seed, stream, *place, rank()))


def own_best_iteration(patch: pytest.MonkeyPatch) -> None:
    """Each rank keeps the images of its own best iteration, or rather of another one."""
    patch.setattr(synthesis, "all_reduce_sum", lambda loss: -loss if rank() else loss)


def own_generator(patch: pytest.MonkeyPatch) -> None:
    """Generators that drift apart."""
    patch.setattr(synthesis, "all_reduce_together", lambda gradients: gradients)


MUTATIONS: list[tuple[str, Mutation]] = [
    ("ood", partners_among_own_images),
    ("ood_both", own_suspects),
    ("ood_both", own_gradient_beside_the_hypergradient),
    ("cmi", own_statistics),
    ("cmi", own_columns),
    ("cmi", own_rows_of_the_bank),
    ("cmi", own_best_iteration),
    ("cmi", own_generator),
]


@pytest.mark.parametrize(("name", "mutate"), MUTATIONS, ids=[f"{name}-{m.__name__}" for name, m in MUTATIONS])
def test_the_comparison_catches(name: str, mutate: Mutation, alone: Alone, two_ranks: Pool, tmp_path: Path) -> None:
    config, expected = alone(name)
    first, second = two_ranks.run(train, config, tmp_path / "two ranks" / "run", mutate)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(first, expected)
        assert_close({**second, "rows": expected["rows"]}, expected)
