"""ANP on two gloo ranks is ANP on one: the same perturbations, masks and counts."""

from pathlib import Path

import pytest

from dist_defend.methods.defend import anp
from tests.distributed.comparison import assert_same, train
from tests.ranks import Pool
from tests.runs import make_classifier, make_data, make_experiment

SIZE = 32  # pixels: batch norms then see more than one value per image everywhere


def slopes_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(anp, "all_reduce_together", lambda tensors: tensors)


def test_two_ranks_are_one_rank(two_ranks: Pool, tmp_path: Path) -> None:
    """11 images of the defender in batches of 6: the last has 5, shares of 3 and 2."""
    options = {
        "model": make_classifier(tmp_path / "model", size=SIZE),
        "data": {"path": make_data(tmp_path / "data", size=SIZE), "max_samples": 11},
        "test": {"path": make_data(tmp_path / "test", 21, seed=1, size=SIZE)},
        "attack": {"trigger": {"name": "badnets"}, "target_class": 1},
        "batch_size": 6,
        "iterations": 4,
        "steps": 2,
    }
    config = make_experiment(tmp_path, "anp", options)
    alone = train(config, tmp_path / "one rank" / "run")
    first, _ = two_ranks.run(train, config, tmp_path / "two ranks" / "run")
    assert_same(first, alone)
    masks = [(tmp_path / name / "run" / "mask_values.txt").read_bytes() for name in ("one rank", "two ranks")]
    assert masks[0] == masks[1]
    mutated, _ = two_ranks.run(train, config, tmp_path / "mutated" / "run", slopes_of_one_rank)
    with pytest.raises(AssertionError):
        assert_same(mutated, alone)
