"""Each rank makes and keeps its share of the frozen features, and everybody gets the rows that it needs."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_defend.counts import unit_features
from dist_defend.data.loader import LoaderConfig
from dist_defend.data.store import open_dataset
from dist_defend.engine import dist, features
from dist_defend.engine.context import Context, Place
from dist_defend.engine.features import FrozenFeatures
from dist_defend.models.artifact import load_simclr
from tests.distributed.comparison import assert_same, train
from tests.distributed.test_strategies import run
from tests.ranks import Pool
from tests.runs import make_data, make_experiment, make_model, metrics, options_of

COUNT = 13  # images: rank 0 of two keeps 7, rank 1 keeps 6
BATCH = [12, 0, 5, 7, 5, 1, 6]  # positions of a global batch: rank 0 asks for four, rank 1 for three


def make_features(folder: Path, count: int, place: Place, ranks: dist.Ranks) -> FrozenFeatures:
    encoders = [load_simclr(folder / name)[0].f.to(ranks.dtype) for name in ("a", "b")]
    context = Context(ranks, 0, LoaderConfig("resident", 1), folder)
    rows = np.arange(3, 3 + count)
    return FrozenFeatures(encoders, encoders[0].feature_dim, context, open_dataset(folder / "data"), rows, place)


def on_a_rank(folder: Path, count: int, place: Place, forgets: bool = False) -> dict[str, Any]:
    """What a rank keeps, gets for its part of BATCH, and says of the second encoder."""
    with pytest.MonkeyPatch.context() as patch:
        if forgets:
            patch.setattr(features, "all_reduce_sum", lambda x: x)
        ranks = dist.start("fp64", None)
        frozen = make_features(folder, count, place, ranks)
        assert frozen.encoders[0].training
        positions = torch.tensor(BATCH) % count
        counts = [len(part) for part in positions.tensor_split(ranks.world_size)]
        taken = frozen.take(positions.tensor_split(ranks.world_size)[ranks.rank], counts)
        assert frozen.encoders[0].training and not taken.requires_grad
        files = [path.name for path in folder.iterdir() if path.is_file()]
        cosine = frozen.mean_cosine(frozen.encoders[1])
        return {"kept": tuple(frozen.table.shape), "taken": taken.clone(), "cosine": cosine, "files": files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("features")
    make_data(place / "data", 3 + COUNT)
    for seed, name in enumerate(("a", "b")):
        make_model(place / name, seed)
    return place


def expected(folder: Path, count: int) -> Tensor:
    """(E, N, D) of all images at once."""
    ranks = dist.start("fp64", None)
    images = torch.from_numpy(open_dataset(folder / "data").images(np.arange(3, 3 + count))).permute(0, 3, 1, 2)
    pixels = (images / torch.tensor(255.0)).double()
    encoders = [load_simclr(folder / name)[0].f.double().eval() for name in ("a", "b")]
    with torch.no_grad():
        return torch.stack([unit_features(encoder, pixels, ranks) for encoder in encoders])


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("count", [COUNT, 1])  # of one image rank 1 keeps nothing
def test_every_rank_gets_its_rows(place: Place, count: int, folder: Path, two_ranks: Pool) -> None:
    whole = expected(folder, count)
    wanted = whole[:, torch.tensor(BATCH) % count]
    cosine = (whole[0] * whole[1]).sum(1).mean().item()
    alone = on_a_rank(folder, count, place)
    first, second = two_ranks.run(on_a_rank, folder, count, place)
    assert [found["kept"][0] for found in (alone, first, second)] == [count, -(-count // 2), max(1, count // 2)]
    for taken in (alone["taken"], torch.cat([first["taken"], second["taken"]], 1)):
        torch.testing.assert_close(taken, wanted, rtol=1e-12, atol=1e-14)
    for found in (alone, first, second):
        assert found["cosine"] == pytest.approx(cosine, rel=1e-12)
        assert found["files"] == []  # a mapped file has no name


def test_rows_that_are_not_sent_are_missed(folder: Path, two_ranks: Pool) -> None:
    first, second = two_ranks.run(on_a_rank, folder, COUNT, "memory", True)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            torch.cat([first["taken"], second["taken"]], 1), expected(folder, COUNT)[:, BATCH], rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize("method", ["badencoder", "mimic", "probe"])
def test_where_the_cache_lies_changes_nothing(method: str, tmp_path: Path, two_ranks: Pool) -> None:
    options = options_of(method, tmp_path)
    alone = train(make_experiment(tmp_path, method, options), tmp_path / "memory" / "run")
    section = options["information"] if method == "mimic" else options
    section["cache"] = "disk"
    config = make_experiment(tmp_path, method, options)
    assert_same(train(config, tmp_path / "disk" / "run"), alone)
    assert_same(two_ranks.run(train, config, tmp_path / "two" / "run")[0], alone)


def test_a_disk_without_room_is_told_before_it_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapped file that the disk cannot hold would end the process by SIGBUS, without a word."""

    def full(file: int, start: int, size: int) -> None:
        raise OSError(28, f"No space left on device for {size} bytes")

    monkeypatch.setattr(os, "posix_fallocate", full)
    frozen = make_features(folder, COUNT, "disk", dist.start("fp32", None))
    with pytest.raises(OSError, match=f"for {COUNT * 2 * frozen.feature_dim * 4} bytes"):
        frozen.take(torch.tensor([0]), [1])


def test_a_run_goes_on_with_other_shares(tmp_path: Path, two_ranks: Pool) -> None:
    """Two ranks, then one, then two again, each with a cache of its own."""
    trainer = {"log_every": 1, "trackers": [], "checkpoint_every": 1}
    options = options_of("badencoder", tmp_path)
    config = str(make_experiment(tmp_path, "badencoder", options, precision="fp64", trainer=trainer))
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert run(config, str(whole), "ddp") == ""
    assert two_ranks.run(run, config, str(parted), "ddp", 1) == ["killed", "killed"]
    assert run(config, str(parted), "ddp", 3) == "killed"
    assert two_ranks.run(run, config, str(parted), "ddp") == ["", ""]
    utility = [[row["utility"] for row in metrics(folder)] for folder in (whole, parted)]
    assert len(utility[0]) == 4
    assert utility[1] == pytest.approx(utility[0], rel=1e-12)
