"""The pool of ranks itself: what goes wrong on a rank must reach the test."""

import os
import subprocess
import sys
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


LEAVE = """
import sys
import torch
import torch.distributed as dist
from dist_defend.engine.dist import keep_group, stop

sys.setswitchinterval(1000)  # nobody gives Python's lock away for nothing
for _ in range(20):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    keep_group()
    network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
    works = [dist.all_reduce(torch.ones(1000), async_op=True) for _ in range(4)]
    del works  # gloo's threads are left to free the tensors
    stop()
    del network
"""


def test_a_rank_whose_model_outlives_its_group_ends() -> None:
    """Without ``keep_group`` the reducer joins gloo's threads under the lock that they wait for."""
    done = subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
