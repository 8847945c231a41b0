"""CLP on two gloo ranks is CLP on one: the same scores and choice, and every count of the sweep."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.comparison import Mutation, assert_same, none, train
from tests.distributed.test_rnp import counts_of_one_rank
from tests.ranks import Pool
from tests.runs import make_classifier, make_data, make_experiment


def make_config(folder: Path) -> Path:
    """12 images of the defender, 21 test images, of which one rank gets 11."""
    attack = {"trigger": {"name": "badnets"}, "target_class": 1}
    options = {
        "model": make_classifier(folder / "model", attack=attack),
        "data": {"path": make_data(folder / "data"), "max_samples": 12},
        "test": {"path": make_data(folder / "test", 21, seed=1)},
        "selection": "defence_data",
        "max_accuracy_drop": 0.3,
        "u_num": 11,
        "u_max": 2.0,
    }
    return make_experiment(folder, "clp", options)


def run(config: Path, folder: Path, mutate: Mutation = none) -> dict[str, Any]:
    found = train(config, folder, mutate)
    return {**found, "table": json.loads((folder / "sweep.json").read_text())}


def test_two_ranks_are_one_rank(two_ranks: Pool, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    alone = run(config, tmp_path / "one rank" / "run")
    first, _ = two_ranks.run(train, config, tmp_path / "two ranks" / "run")
    table = json.loads((tmp_path / "two ranks" / "run" / "sweep.json").read_text())
    assert_same({**first, "table": table}, alone)
    assert len({stop["pruned"] for stop in table}) > 5
    assert {stop["acc"]["n"] for stop in table} == {21} and {stop["acc_defence"]["n"] for stop in table} == {12}
    mutated, _ = two_ranks.run(train, config, tmp_path / "mutated" / "run", counts_of_one_rank)
    with pytest.raises(AssertionError):
        assert_same(mutated, {key: value for key, value in alone.items() if key != "table"})
