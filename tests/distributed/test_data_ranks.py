"""Loaders on two real ranks: together they see what one rank sees."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dist_defend.data.augment import SIMCLR, BlurConfig, SolarizeConfig, View
from dist_defend.data.loader import LoaderConfig, make_loader
from dist_defend.data.sources import ArraySource
from dist_defend.data.store import open_dataset, write_dataset
from tests.ranks import Pool

BATCH = 12
BLURRED = replace(SIMCLR, blur=BlurConfig(kernel=0.3), solarize=SolarizeConfig(0.5))


def epoch(folder: str, shuffle: bool, start: int, rank: int, world_size: int) -> list[tuple[list[int], np.ndarray]]:
    """Rows and pixels of each batch that this rank gets."""
    loader = make_loader(
        open_dataset(folder),
        config=LoaderConfig(),
        batch_size=BATCH,
        views=(View(SIMCLR), View(BLURRED)),
        shuffle=shuffle,
        drop_last=shuffle,
        seed=3,
        rank=rank,
        world_size=world_size,
    )
    batches = list(loader.epoch(2, start))
    return [(batch.index.tolist(), torch.stack(batch.views).numpy()) for batch in batches]


def on_this_rank(folder: str, shuffle: bool, start: int) -> list[tuple[list[int], np.ndarray]]:
    mine = epoch(folder, shuffle, start, dist.get_rank(), dist.get_world_size())
    seen = torch.tensor(sum(len(rows) for rows, _ in mine))
    dist.all_reduce(seen)  # the counts that an evaluation would sum
    assert int(seen) == (60 if shuffle else 61) - start * BATCH
    return mine


def test_two_ranks_share_each_batch(tmp_path: Path, two_ranks: Pool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (61, 10, 10, 3), dtype=np.uint8)
    write_dataset(ArraySource(images, np.zeros(61, np.int64), ["any"]), tmp_path / "d", name="noise", split="train")
    for shuffle, start, lengths in ((False, 0, [6, 5]), (False, 4, [2, 1]), (True, 0, [5, 5])):
        alone = epoch(str(tmp_path / "d"), shuffle, start, 0, 1)
        ranks = two_ranks.run(on_this_rank, str(tmp_path / "d"), shuffle, start)
        assert [len(rank) for rank in ranks] == lengths  # the last batch of 61 has one row, so rank 1 has none of it
        for number, (rows, pixels) in enumerate(alone):
            shares = [rank[number] for rank in ranks if number < len(rank)]
            assert [row for share, _ in shares for row in share] == rows
            assert np.array_equal(np.concatenate([share for _, share in shares], axis=1), pixels)
