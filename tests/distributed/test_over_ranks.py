"""What two ranks write down: the device time of both, and each one's random state."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dist_defend import experiment
from dist_defend.batch import Batch
from dist_defend.config import load_experiment
from dist_defend.engine import dist
from dist_defend.engine.objective import Objective
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.run import RunFolder
from dist_defend.engine.step import GradientStep
from dist_defend.engine.trainer import Stage, Trainer, TrainerConfig
from tests.ranks import Pool
from tests.runs import make_experiment, options_of


def run(config: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "end_training", lambda self: None)  # the pool's process group lives on
        experiment.run(load_experiment(config))


def test_device_seconds_are_those_of_every_rank(two_ranks: Pool, tmp_path: Path) -> None:
    config = make_experiment(tmp_path, "simclr", options_of("simclr", tmp_path))
    two_ranks.run(run, str(config))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["world_size"] == 2
    assert result["device_seconds"] == pytest.approx(2 * result["wall_seconds"], rel=1e-9)


class Dropped(Objective):
    """Mean of (w x - 1)^2 over what dropout leaves of w x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.arange(5.0) / 5)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": (nn.functional.dropout(batch.images * self.w).sum(1) - 1).square().mean()}


class Numbers:
    num_batches = 3

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        for number in range(start_batch, self.num_batches):
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * epoch + number))
            yield Batch((x,), torch.zeros(4).long(), torch.arange(4))


class Killed(BaseException):
    """Stands for kill -9, on all ranks."""


def fit(folder: Path, kill_before: int | None) -> list[float]:
    """The weights after six updates of a network with dropout, in processes that begin as every run does."""
    torch.manual_seed(0)
    ranks = dist.start("fp32", None)
    torch.rand(ranks.rank)  # as a rank that drew more, for initial weights of its own
    update = UpdateConfig(epochs=2, optimizer=OptimizerConfig("sgd", lr=0.01))
    step = GradientStep(Dropped(), update, ranks, steps_per_epoch=3)

    updates = itertools.count()

    def after_backward() -> None:
        if next(updates) == kill_before:
            raise Killed

    step.objective.after_backward = after_backward  # type: ignore[method-assign]
    run_folder = RunFolder(folder, ranks.is_main)
    run_folder.open({}, "")
    torch.distributed.barrier()
    try:
        config = TrainerConfig(log_every=1, checkpoint_every=2, trackers=())
        Trainer(ranks, run_folder, config).fit([Stage("dropped", Numbers(), step, 2)])
    except Killed:
        return []
    finally:
        run_folder.close()
    return step.objective.get_parameter("w").tolist()


def test_each_rank_goes_on_with_its_own_draws(two_ranks: Pool, tmp_path: Path) -> None:
    whole = two_ranks.run(fit, tmp_path / "whole", None)
    assert whole[0] == whole[1]
    assert two_ranks.run(fit, tmp_path / "killed", 5) == [[], []]
    assert two_ranks.run(fit, tmp_path / "killed", None) == whole
