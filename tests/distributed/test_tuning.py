"""FT, FT-SAM, NAD, FP, SAU and NC on two gloo ranks are what they are on one: the same weights, scores and counts."""

from pathlib import Path
from typing import Any

import pytest

from dist_defend.methods.defend import fp
from dist_defend.methods.defend.tuning import step
from tests.distributed.comparison import assert_same, train
from tests.ranks import Pool
from tests.runs import make_classifier, make_data, make_experiment

SIZE = 32  # pixels: batch norms then see more than one value per image everywhere
SGD = {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
OPTIONS: dict[str, dict[str, Any]] = {
    "ft": {},
    "ft_sam": {},
    "nad": {"teacher_epochs": 1, "teacher_optimizer": SGD},
    "sau": {"attack_steps": 2},
    "nc": {"search": {"epochs": 2, "threshold": 30.0, "patience": 1}, "anomaly_threshold": 1e-3, "stamped_share": 0.5},
    "fp": {"once_prune_ratio": 0.1, "max_accuracy_drop": 0.5},
}


def gradients_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(step, "all_reduce_together", lambda tensors: tensors)


def features_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(fp, "all_reduce_sum", lambda tensor: tensor)


@pytest.mark.parametrize("method", [*OPTIONS, "ft by held-out images"])
def test_two_ranks_are_one_rank(method: str, two_ranks: Pool, tmp_path: Path) -> None:
    """11 images of the defender in batches of 6: the last has 5, shares of 3 and 2."""
    method, _, is_chosen = method.partition(" ")
    options: dict[str, Any] = {
        "model": make_classifier(tmp_path / "model", size=SIZE),
        "data": {"path": make_data(tmp_path / "data", size=SIZE), "max_samples": 11},
        "test": {"path": make_data(tmp_path / "test", 21, seed=1, size=SIZE)},
        "attack": {"trigger": {"name": "badnets"}, "target_class": 1},
        "batch_size": 6,
        "epochs": 2,
        "optimizer": SGD,
        **OPTIONS[method],
    }
    if is_chosen:
        options["data"]["max_samples"], options["held_out"], options["epochs"] = 18, 0.4, 4
    config = make_experiment(tmp_path, method, options)
    alone = train(config, tmp_path / "one rank" / "run")
    first, _ = two_ranks.run(train, config, tmp_path / "two ranks" / "run")
    assert_same(first, alone)
    if method == "fp":
        means = [(tmp_path / name / "run" / "feature_means.txt").read_bytes() for name in ("one rank", "two ranks")]
        assert means[0] == means[1]
    if method in ("ft", "fp") and not is_chosen:
        wrong = gradients_of_one_rank if method == "ft" else features_of_one_rank
        mutated, _ = two_ranks.run(train, config, tmp_path / "mutated" / "run", wrong)
        with pytest.raises(AssertionError):
            assert_same(mutated, alone)
            assert means[0] == (tmp_path / "mutated" / "run" / "feature_means.txt").read_bytes()
