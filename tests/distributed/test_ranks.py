"""The pool of ranks itself: what goes wrong on a rank must reach the test."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Pool, RankError


def add_ranks(offset: int) -> float:
    total = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(total)
    return total.item() + dist.get_rank() / 4


def misbehave(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("rank one fell over")
        if how == "exit":
            os._exit(3)
        time.sleep(60)
    dist.barrier()


def test_failures_and_time_outs_surface_and_the_pool_recovers() -> None:
    pool = Pool(2)
    try:
        assert pool.run(add_ranks, 10) == [21.0, 21.25]
        with pytest.raises(RankError, match="rank one fell over"):
            pool.run(misbehave, "raise")
        with pytest.raises(RankError, match="rank 1: the process died"):
            pool.run(misbehave, "exit")
        with pytest.raises(RankError, match="rank 1: no answer in time"):
            pool.run(misbehave, "sleep", timeout=1.0)
        assert pool.run(add_ranks, 0) == [1.0, 1.25]
    finally:
        pool.close()
