"""CUDA graphs with NCCL's sums inside, on two GPUs: eager steps, bitwise; one GPU's numbers; and no wait."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dist_defend.batch import Batch
from dist_defend.engine.graphed import GraphMode
from tests.capture.cases import CASES
from tests.distributed.comparison import assert_same
from tests.distributed.test_graphs import NAMES, assert_replays_are_eager_steps, both, drive, mean_over_ranks
from tests.gpu.settings import no_waits, repeatable
from tests.ranks import Pool

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
SECONDS = 200.0


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[Pool]:
    pool = Pool(2, on_gpus=True)
    yield pool
    pool.close()


def on_gpu(name: str) -> dict[GraphMode, dict[str, Any]]:
    """Both modes, on a rank."""
    with repeatable():
        return both(name, is_emulated=False)


def steps_without_waits(name: str) -> int:
    """A case's steps after the first six, by when all has been captured; the device that ran them."""
    with repeatable():
        case = CASES[name]("on")
        device = case.updates[0].parameters[0].device
        moved = [
            (Batch((batch.images.to(device),), batch.labels.to(device), batch.index.to(device)), at)
            for batch, at in case.given
        ]
        for given in moved[:6]:
            case.step(*given)
        with no_waits():
            for given in moved[6:]:
                case.step(*given)
        torch.cuda.synchronize()
        return int(device.index)


@pytest.mark.parametrize("name", [*NAMES, "rnp unlearn, dropout"])
def test_replays_are_eager_steps(name: str, two_gpus: Pool) -> None:
    for outcomes in two_gpus.run(on_gpu, name, timeout=SECONDS):
        assert_replays_are_eager_steps(outcomes["off"], outcomes["on"])


@pytest.mark.parametrize("name", NAMES)
def test_two_gpus_are_one(name: str, two_gpus: Pool) -> None:
    found = [outcomes["on"] for outcomes in two_gpus.run(on_gpu, name, timeout=SECONDS)]
    alone = drive(name, "off", is_emulated=False)
    for outcome in found:
        assert_same({"state": outcome["state"]}, {"state": alone["state"]}, 1e-10, floor=1e-14)
    told = mean_over_ranks([outcome["told"] for outcome in found])
    assert_same({"told": told}, {"told": alone["told"]}, 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_no_step_waits(name: str, two_gpus: Pool) -> None:
    assert two_gpus.run(steps_without_waits, name, timeout=SECONDS) == [0, 1]
