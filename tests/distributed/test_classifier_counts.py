"""A classifier's counts do not depend on the number of ranks, and every test image counts once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_defend import counts as counting
from dist_defend.attacks.attack import AttackConfig
from dist_defend.attacks.patterns import BadNets
from dist_defend.attacks.poison import triggered
from dist_defend.data.loader import LoaderConfig, make_loader
from dist_defend.data.store import open_dataset
from dist_defend.engine import dist
from dist_defend.models.artifact import load_classifier
from tests.ranks import Pool
from tests.runs import make_classifier, make_data

ALL_TO_ONE = AttackConfig(BadNets(size=6), target_class=1)
ALL_TO_ALL = AttackConfig(BadNets(size=6), labels="all_to_all", shift=2)


def measure(data: str, model_folder: str, batch_size: int, poison: AttackConfig, swap: bool = False) -> dict[str, Any]:
    """Predicted classes, labels, rows and counts; ``swap`` hands the second rank's parts in before the first's."""
    with pytest.MonkeyPatch.context() as patch:
        ranks = dist.start("fp64", None)
        if swap:
            gather = torch.distributed.all_gather_object

            def swapped(gathered: list[Any], parts: list[tuple[Tensor, ...]]) -> None:
                gather(gathered, parts)
                gathered.reverse()

            patch.setattr(torch.distributed, "all_gather_object", swapped)
        dataset = open_dataset(data)
        loaders = [
            make_loader(
                each,
                config=LoaderConfig("resident", 1),
                batch_size=batch_size,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )
            for each in (dataset, triggered(dataset, poison))
        ]
        model = load_classifier(model_folder)[0].to(ranks.dtype)
        clean, attacked = loaders
        classes, labels, rows = counting.predict(model, clean, ranks)
        counts = counting.evaluate_classifier(model, clean, attacked, ranks, poison)
        assert model.training  # as it was
        return {
            "classes": classes.tolist(),
            "labels": labels.tolist(),
            "rows": rows.tolist(),
            "counts": {name: (count.correct, count.n) for name, count in counts.items()},
        }


@pytest.mark.parametrize("poison", [ALL_TO_ONE, ALL_TO_ALL], ids=["all_to_one", "all_to_all"])
@pytest.mark.parametrize("batch_size", [4, 5, 512])  # last batches of 1 (none for rank 1), 3 and 13 images
def test_two_ranks_count_what_one_counts(
    batch_size: int, poison: AttackConfig, two_ranks: Pool, tmp_path: Path
) -> None:
    data, model = make_data(tmp_path / "data", 13), make_classifier(tmp_path / "model")
    alone = measure(data, model, batch_size, poison)
    assert alone["rows"] == list(range(13)) and alone["labels"] == [row % 3 for row in range(13)]
    among = 13 if poison is ALL_TO_ALL else 9  # rows 1, 4, 7 and 10 are of the target class
    assert {name: n for name, (_, n) in alone["counts"].items()} == {
        "acc": 13,
        "asr": among,
        "asr_all": 13,
        "ra": among,
    }
    assert two_ranks.run(measure, data, model, batch_size, poison) == [alone, alone]


def test_the_check_catches_ranks_in_the_wrong_order(two_ranks: Pool, tmp_path: Path) -> None:
    data, model = make_data(tmp_path / "data", 13), make_classifier(tmp_path / "model")
    found, _ = two_ranks.run(measure, data, model, 4, ALL_TO_ONE, True)
    assert found["rows"] != list(range(13))
