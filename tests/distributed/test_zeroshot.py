"""Zero-shot evaluation: two ranks count what one rank counts, and each image once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_defend import counts as counting
from dist_defend.cli import main
from tests.clips import save_clip
from tests.distributed.comparison import assert_same, train
from tests.ranks import Pool, RankError
from tests.runs import make_data, make_experiment

TEST_IMAGES = 13


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two towers on a test set whose last batch is too small for both ranks."""
    folder = tmp_path_factory.mktemp("zeroshot")
    weights, encoders = save_clip(folder / "clip.pth"), {}
    for kind, seed in (("clean", 0), ("backdoored", 1)):
        file = save_clip(folder / f"{kind}.pth", seed=seed)
        assert main(["import", file, "--arch", "open_clip:tiny_vit", "--out", str(folder / kind)]) == 0
        encoders[kind] = str(folder / kind)
    data = {"path": make_data(folder / "test", TEST_IMAGES, size=32)}
    options = {
        "clip": {"arch": "open_clip:tiny_vit", "weights": weights},
        "encoders": encoders,
        "tasks": {"noise": {"test": data, "target_class": 1, "templates": ["a {class}"]}},
        "attack": {"trigger": {"name": "badnets", "size": 10, "margin": 1}},
        "batch_size": 4,
    }
    return make_experiment(folder, "zeroshot", options)


def count(config: Path, folder: Path, is_mutated: bool = False) -> dict[str, Any]:
    """The rows of a run, in float64; mutated: each rank counts its own share alone."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        def gather(parts: Any, *_: Any) -> tuple[torch.Tensor, ...]:
            return tuple(torch.cat(column) for column in zip(*parts, strict=True))

        if is_mutated:
            patch.setattr(counting, "gather_in_order", gather)

    return {"rows": train(config, folder, mutate)["result"]["rows"]}


def test_two_ranks_count_as_one(config: Path, two_ranks: Pool, tmp_path: Path) -> None:
    alone = count(config, tmp_path / "one rank" / "run")
    assert [row["acc"]["n"] for row in alone["rows"]] == [TEST_IMAGES] * 2
    assert len({row["asr_all"]["correct"] for row in alone["rows"]}) == 2  # the two towers differ
    for found in two_ranks.run(count, config, tmp_path / "two ranks" / "run", timeout=240):
        assert_same(found, alone)
    with pytest.raises(RankError, match=f"must match the size of tensor b \\({TEST_IMAGES}\\)"):  # a share is not all
        two_ranks.run(count, config, tmp_path / "shares" / "run", True, timeout=240)
