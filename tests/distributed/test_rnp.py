"""RNP on two gloo ranks is RNP on one: masks with synchronised batch norm, and every count of the sweep."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_defend import counts
from dist_defend.engine.context import Context
from dist_defend.methods.defend.rnp import steps
from dist_defend.models.artifact import ModelCard, save_artifact
from dist_defend.models.classifier import build_classifier
from tests.distributed.comparison import assert_same, none, train
from tests.ranks import Pool
from tests.runs import CLASSES, make_data, make_experiment

SIZE = 32  # pixels: batch norms then see more than one value per image everywhere
Mutation = Callable[[pytest.MonkeyPatch], None]


def statistics_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Context, "synchronise", lambda self, model: model)


def gradients_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(steps, "all_reduce_together", lambda gradients: gradients)


def counts_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    """Each rank counts the images that it has seen itself; the others stand for class 0."""

    def gather(parts: list[Any], total: int, batch_size: int, ranks: Any) -> tuple[Any, ...]:
        own = (torch.cat(column) for column in zip(*parts, strict=True))
        return tuple(torch.cat([seen, seen.new_zeros(total - len(seen), *seen.shape[1:])]) for seen in own)

    patch.setattr(counts, "gather_in_order", gather)


def make_config(folder: Path, labels: str, **options: Any) -> Path:
    """11 images of the defender in batches of 6 (the last has 5: shares of 3 and 2), 21 test images."""
    torch.manual_seed(0)
    model = build_classifier("small_resnet", CLASSES, "cifar10", image_size=SIZE)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.rand(32, 3, SIZE, SIZE))
    card = ModelCard("classifier", "small_resnet", "cifar10", SIZE, num_classes=CLASSES)
    save_artifact(folder / "model", model, card)
    rnp = {
        "model": str(folder / "model"),
        "data": {"path": make_data(folder / "data", size=SIZE), "max_samples": 11},
        "test": {"path": make_data(folder / "test", 21, seed=1, size=SIZE)},
        "attack": {"trigger": {"name": "badnets"}, "labels": labels, "target_class": 1},
        "batch_size": 6,
        "unlearning_lr": 1e-4,
        "unlearning_epochs": 2,
        "recovering_lr": 5.0,
        "recovering_epochs": 3,
        "clean_threshold": 0.0,
        "max_accuracy_drop": 0.5,
        **options,
    }
    return make_experiment(folder, "rnp", rnp)


def run(config: Path, folder: Path, mutate: Mutation = none) -> dict[str, Any]:
    """What train() tells, and the run folder's table and masks."""
    found = train(config, folder, mutate)
    torch.distributed.barrier() if torch.distributed.is_initialized() else None
    table = json.loads((folder / "sweep.json").read_text())
    return {**found, "table": table, "masks": (folder / "mask_values.txt").read_text().splitlines()}


@pytest.fixture(scope="module", params=["all_to_one", "all_to_all"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp(request.param)
    config = make_config(folder, request.param)
    return config, run(config, folder / "one rank" / "run")


def test_two_ranks_are_one_rank(case: tuple[Path, dict[str, Any]], two_ranks: Pool, tmp_path: Path) -> None:
    config, alone = case
    first, second = two_ranks.run(run, config, tmp_path / "two ranks" / "run")
    assert_same(first, alone)
    assert_same({**second, "rows": alone["rows"]}, alone)
    pruned = [row["pruned"] for row in alone["table"]]
    assert len(alone["table"]) == 20 and len(set(pruned)) > 5
    assert {row["acc"]["n"] for row in alone["table"]} == {21}
    assert len({row["acc"]["correct"] for row in alone["table"]}) > 1
    assert sum(row["chosen"] for row in alone["table"]) == sum(row["oracle"] for row in alone["table"]) == 1


@pytest.mark.parametrize("mutate", [statistics_of_one_rank, gradients_of_one_rank, counts_of_one_rank])
def test_the_comparison_catches(mutate: Mutation, two_ranks: Pool, tmp_path: Path) -> None:
    config = make_config(tmp_path, "all_to_one")
    alone = run(config, tmp_path / "one rank" / "run")
    first, _ = two_ranks.run(run, config, tmp_path / "two ranks" / "run", mutate)
    with pytest.raises(AssertionError):
        assert_same(first, alone)


def test_stopping_is_agreed_on(two_ranks: Pool, tmp_path: Path) -> None:
    """The stop rule reads the accuracy over all ranks: both stop after the first epoch."""
    config = make_config(tmp_path, "all_to_one", clean_threshold=1.0)
    alone = run(config, tmp_path / "one rank" / "run")
    assert {row["epoch"] for row in alone["rows"] if row["stage"] == "unlearn"} == {0}
    first, _ = two_ranks.run(run, config, tmp_path / "two ranks" / "run")
    assert_same(first, alone)


def test_a_last_batch_without_a_share_is_refused(two_ranks: Pool, tmp_path: Path) -> None:
    config = make_config(tmp_path, "all_to_one", batch_size=10)
    with pytest.raises(Exception, match="too few for batch norm"):
        two_ranks.run(run, config, tmp_path / "two ranks" / "run")
