"""DECREE on two gloo ranks is DECREE on one: the same masks, costs and scores."""

from pathlib import Path

import pytest

from dist_defend.methods.measure import decree
from tests.distributed.comparison import assert_same, train
from tests.ranks import Pool
from tests.runs import make_data, make_experiment, make_model


def features_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(decree, "all_reduce_sum", lambda tensor: tensor)


def test_two_ranks_are_one_rank(two_ranks: Pool, tmp_path: Path) -> None:
    """11 images in batches of 6: the last has 5, shares of 3 and 2. The cosine is of all pairs, also across ranks."""
    options = {
        "encoder": make_model(tmp_path / "model"),
        "data": {"path": make_data(tmp_path / "data"), "max_samples": 11},
        "batch_size": 6,
        "epochs": 4,
        "seeds": [3, 4],
        "threshold": 0.9,
    }
    config = make_experiment(tmp_path, "decree", options)
    alone = train(config, tmp_path / "one rank" / "run")
    first, _ = two_ranks.run(train, config, tmp_path / "two ranks" / "run")
    assert_same(first, alone)
    mutated, _ = two_ranks.run(train, config, tmp_path / "mutated" / "run", features_of_one_rank)
    with pytest.raises(AssertionError):
        assert_same(mutated, alone)
