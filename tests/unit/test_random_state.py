"""Random numbers: where dropout's come from, that a resume goes on with them, and that epochs do not repeat them."""

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_defend import experiment
from dist_defend.batch import Batch
from dist_defend.config import load_experiment
from dist_defend.data.loader import DatasetConfig, LoaderConfig
from dist_defend.engine import checkpoint, dist
from dist_defend.engine.context import Context
from dist_defend.engine.objective import Objective
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.run import RunFolder
from dist_defend.engine.step import GradientStep
from dist_defend.engine.trainer import Stage, Trainer, TrainerConfig
from dist_defend.methods.measure.probe import Config, FeatureBatches, TaskConfig
from dist_defend.methods.pretrain import classifier
from tests.runs import make_experiment, options_of


class Dropped(Objective):
    """Its loss depends on what dropout leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(64))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": nn.functional.dropout(batch.images @ self.w.diag()).square().mean()}


class Devices:
    """Stands for two CUDA devices' default generators."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.generators = [torch.Generator(), torch.Generator()]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(self.generators))
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: self.generators[device].get_state())
        monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, at: self.generators[at].set_state(state))

    def begin(self) -> None:
        """As every run does."""
        for generator in self.generators:
            generator.manual_seed(0)


class Ones:
    num_batches = 3

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        for _ in range(start_batch, self.num_batches):
            yield Batch((torch.ones(4, 64),), torch.zeros(4).long(), torch.arange(4))


class Killed(BaseException):
    """Stands for kill -9."""


def fit(folder: Path, kill_before: int | None = None, objective: Objective | None = None) -> list[float]:
    """The weights after two epochs of three updates, in a process that begins as every run does."""
    torch.manual_seed(0)
    update = UpdateConfig(epochs=2, optimizer=OptimizerConfig("sgd", lr=0.1))
    step = GradientStep(objective or Dropped(), update, dist.start("fp32", None), steps_per_epoch=3)

    updates = itertools.count()

    def after_backward() -> None:
        if next(updates) == kill_before:
            raise Killed

    step.objective.after_backward = after_backward  # type: ignore[method-assign]
    run = RunFolder(folder, True)
    run.open({}, "")
    try:
        config = TrainerConfig(log_every=1, checkpoint_every=2, trackers=())
        Trainer(dist.start("fp32", None), run, config).fit([Stage("dropped", Ones(), step, 2)])
    finally:
        run.close()
    return step.objective.get_parameter("w").tolist()


def test_a_resume_goes_on_with_the_draws_of_dropout(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole")
    assert len(set(whole)) > 8  # what dropout left is in the weights
    with pytest.raises(Killed):
        fit(tmp_path / "killed", kill_before=5)
    assert fit(tmp_path / "killed") == whole


def test_a_resume_goes_on_with_the_draws_of_every_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = Devices(monkeypatch)

    class DroppedThere(Dropped):
        def forward(self, batch: Batch) -> dict[str, Tensor]:
            first, second = (torch.rand(64, generator=generator) for generator in devices.generators)
            return {"loss": (first * second * (batch.images @ self.w.diag())).square().mean()}

    def fit_there(name: str, kill_before: int | None = None) -> list[float]:
        devices.begin()
        return fit(tmp_path / name, kill_before, DroppedThere())

    whole = fit_there("whole")
    assert len(set(whole)) > 8
    with pytest.raises(Killed):
        fit_there("killed", kill_before=5)
    shutil.copytree(tmp_path / "killed", tmp_path / "elsewhere")
    assert fit_there("killed") == whole
    devices.generators.pop()  # a machine of fewer devices, which needs no more than its own
    monkeypatch.setattr(DroppedThere, "forward", Dropped.forward)
    assert len(fit_there("elsewhere")) == 64
    assert devices.generators[0].get_state().equal(newest_random(tmp_path / "elsewhere")[0])


def newest_random(folder: Path) -> list[Tensor]:
    """The only rank's device states in the newest checkpoint."""
    path = checkpoint.newest(folder / "checkpoints")
    assert path is not None
    found: list[Tensor] = checkpoint.load(path)["device_random"][0]
    return found


@pytest.mark.parametrize("seed", [3, 4])
def test_a_networks_own_draws_follow_the_runs_seed(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []

    def build(*_: Any) -> None:
        drawn.append(torch.rand(4))
        raise Killed

    monkeypatch.setattr(classifier, "build", build)
    path = make_experiment(tmp_path, "classifier", options_of("classifier", tmp_path), seed=seed)
    torch.manual_seed(99)  # of whatever ran before
    with pytest.raises(Killed):
        experiment.run(load_experiment(path))
    assert drawn[0].equal(torch.rand(4, generator=torch.Generator().manual_seed(seed)))


def probe_batches(
    folder: Path, dropout: float = 0.25, seeds: tuple[int, ...] = (1, 2), shuffle: bool = False
) -> FeatureBatches:
    nowhere = DatasetConfig("nowhere")
    tasks = {"task": TaskConfig(nowhere, nowhere, 0)}
    config = Config({"clean": "nowhere"}, tasks, seeds=seeds, hidden=(512,), dropout=dropout, shuffle=shuffle)
    config = replace(config, update=replace(config.update, batch_size=8))
    context = Context(dist.start("fp64", None), 7, LoaderConfig("resident", 1), folder)
    return FeatureBatches(config, torch.zeros(20).long(), context, lambda index, _: torch.zeros(3, len(index), 2))


def test_a_probes_dropout_differs_between_epochs_batches_and_seeds(tmp_path: Path) -> None:
    batches = probe_batches(tmp_path)
    factors = [batch.views[1] for epoch in (0, 1, 2) for batch in batches.epoch(epoch)]
    assert [tuple(f.shape) for f in factors] == 3 * [(6, 8, 512), (6, 8, 512), (6, 4, 512)]
    masks = [f[head, :4].numpy().tobytes() for f in factors for head in (0, 1)]
    assert len(set(masks)) == len(masks) == 18
    for f in factors:
        assert set(f.unique().tolist()) == {0.0, 1 / 0.75}
        assert f[0].equal(f[2]) and f[1].equal(f[5])  # the same seeds of other encoders
        assert abs((f[:2] > 0).double().mean().item() - 0.75) < 6 * np.sqrt(0.75 * 0.25 / f[:2].numel())
    again = [batch.views[1] for batch in probe_batches(tmp_path).epoch(1, start_batch=1)]
    assert [a.equal(b) for a, b in zip(again, factors[4:6], strict=True)] == [True, True]


def test_a_seeds_dropout_is_its_own_whoever_else_is_trained(tmp_path: Path) -> None:
    both, alone = (next(probe_batches(tmp_path, seeds=seeds).epoch(4)).views[1] for seeds in ((1, 2), (2,)))
    assert both[1].equal(alone[0]) and not both[0].equal(both[1])


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_probe_reads_in_order_unless_it_is_told_to_shuffle(shuffle: bool, tmp_path: Path) -> None:
    """Published: the file's order in every epoch."""
    batches = probe_batches(tmp_path, shuffle=shuffle)
    for epoch in (0, 1):
        found = torch.cat([batch.index for batch in batches.epoch(epoch)]).tolist()
        shuffled = np.random.default_rng([7, epoch]).permutation(20).tolist()
        assert found == (shuffled if shuffle else list(range(20)))
