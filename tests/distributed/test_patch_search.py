"""PatchSearch on two gloo ranks is PatchSearch on one: the same ranking, scores and precision."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_defend.methods.measure import patch_search
from tests.distributed.comparison import train
from tests.ranks import Pool
from tests.runs import make_data, make_experiment, make_model


def scores_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(patch_search, "all_reduce_sum", lambda tensor: tensor)


def found(folder: Path) -> dict[str, Any]:
    return {name: array.tolist() for name, array in np.load(folder / "suspects.npz").items()}


def test_two_ranks_are_one_rank(two_ranks: Pool, tmp_path: Path) -> None:
    """23 images in 5 clusters: rounds of odd counts."""
    options = {
        "encoder": make_model(tmp_path / "model"),
        "data": {"path": make_data(tmp_path / "data"), "max_samples": 23},
        "clusters": 5,
        "num_test": 10,
        "window": 5,
    }
    config = make_experiment(tmp_path, "patch_search", options)
    folders = {name: tmp_path / name / "run" for name in ("one rank", "two ranks", "mutated")}
    alone = train(config, folders["one rank"])
    first, second = two_ranks.run(train, config, folders["two ranks"])
    assert first["result"] == second["result"] == alone["result"] and alone["result"]["metrics"]["num_scored"] > 10
    assert found(folders["two ranks"]) == found(folders["one rank"])
    two_ranks.run(train, config, folders["mutated"], scores_of_one_rank)
    assert found(folders["mutated"]) != found(folders["one rank"])
