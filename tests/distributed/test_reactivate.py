"""Re-activation on two gloo ranks is what it is on one: weights, the rows that are poisoned, and counts."""

from pathlib import Path
from typing import Any

import pytest

from dist_defend.methods.defend.tuning import step
from tests.distributed.comparison import assert_same, train
from tests.ranks import Pool
from tests.runs import make_classifier, make_data, make_experiment, make_model

SIZE = 32  # pixels: batch norms then see more than one value per image everywhere
HEAD = {"hidden": [8], "update": {"batch_size": 4, "epochs": 2, "optimizer": {"name": "adam", "lr": 0.03}}}
QUERY = {"hidden": [8], "update": {"batch_size": 6, "epochs": 2, "optimizer": {"name": "sgd", "lr": 0.01}}}
OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "classifier": (make_classifier, {"preset": "published"}),
    "encoder": (make_model, {"head": HEAD, "query": QUERY}),
}


def gradients_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(step, "all_reduce_together", lambda tensors: tensors)


@pytest.mark.parametrize("kind", OPTIONS)
def test_two_ranks_are_one_rank(kind: str, two_ranks: Pool, tmp_path: Path) -> None:
    """11 images in batches of 6: the last has 5, shares of 3 and 2."""
    make, own = OPTIONS[kind]
    options = {
        "model": make(tmp_path / "model", size=SIZE),
        "control": make(tmp_path / "control", seed=1, size=SIZE),
        "data": {"path": make_data(tmp_path / "data", size=SIZE)},
        "test": {"path": make_data(tmp_path / "test", 21, seed=1, size=SIZE)},
        "attack": {"trigger": {"name": "badnets"}, "target_class": 1},
        "num_images": 11,
        "num_poisoned": 2,
        "batch_size": 6,
        "epochs": 2,
        **own,
    }
    config = make_experiment(tmp_path, "reactivate", options)
    alone = train(config, tmp_path / "one rank" / "run")
    first, _ = two_ranks.run(train, config, tmp_path / "two ranks" / "run")
    assert_same(first, alone)
    if kind == "classifier":
        mutated, _ = two_ranks.run(train, config, tmp_path / "mutated" / "run", gradients_of_one_rank)
        with pytest.raises(AssertionError):
            assert_same(mutated, alone)
