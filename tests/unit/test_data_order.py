"""One order for any number of ranks."""

import numpy as np
import pytest

from dist_defend.data.order import Sampling, epoch_order, rank_slice


def sampling(n: int, batch_size: int, rank: int = 0, world_size: int = 1, drop_last: bool = False) -> Sampling:
    return Sampling(1000 + np.arange(n), batch_size, True, drop_last, 7, rank, world_size)


def test_an_epoch_is_a_permutation_that_only_seed_and_epoch_change() -> None:
    first = epoch_order(50, 3, 0, shuffle=True)
    assert sorted(first) == list(range(50))
    assert (first == epoch_order(50, 3, 0, shuffle=True)).all()
    assert (first != epoch_order(50, 3, 1, shuffle=True)).any()
    assert (epoch_order(50, 3, 1, True) != epoch_order(50, 4, 0, True)).any()  # seed + epoch is not what counts
    assert (epoch_order(50, 3, 5, shuffle=False) == np.arange(50)).all()


@pytest.mark.parametrize(("n", "world_size"), [(0, 3), (1, 3), (7, 3), (12, 4), (13, 5)])
def test_rank_slices_are_those_of_array_split(n: int, world_size: int) -> None:
    parts = [np.arange(n)[rank_slice(n, rank, world_size)].tolist() for rank in range(world_size)]
    assert parts == [part.tolist() for part in np.array_split(np.arange(n), world_size)]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_together_see_the_batches_of_one_rank(world_size: int, drop_last: bool) -> None:
    alone = sampling(47, 15, drop_last=drop_last).shares(epoch=2)
    ranks = [sampling(47, 15, rank, world_size, drop_last).shares(2) for rank in range(world_size)]
    for number, batch in enumerate(alone):
        shares = [rank[number] for rank in ranks if number < len(rank)]
        assert np.concatenate(shares).tolist() == batch.tolist()
    assert len(np.concatenate(alone)) == (45 if drop_last else 47)
    assert sampling(47, 15, drop_last=drop_last).num_batches == len(alone)


def test_an_empty_share_is_no_batch() -> None:
    shares = [sampling(21, 10, rank, 3).shares(0) for rank in range(3)]
    assert [len(rank) for rank in shares] == [3, 2, 2]  # the last batch holds one sample
    assert [[len(share) for share in rank] for rank in shares] == [[4, 4, 1], [3, 3], [3, 3]]


def test_a_resumed_epoch_goes_on_with_any_number_of_ranks() -> None:
    alone = sampling(48, 12, drop_last=True).shares(1)
    for world_size in (1, 2, 4):
        ranks = [sampling(48, 12, rank, world_size, True).shares(1, start_batch=2) for rank in range(world_size)]
        assert [np.concatenate(parts).tolist() for parts in zip(*ranks, strict=True)] == [b.tolist() for b in alone[2:]]
