"""The loop and its first-order step, on a straight line that is fitted to numbers."""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from dist_defend.batch import Batch
from dist_defend.cli import main
from dist_defend.config import load_experiment
from dist_defend.engine import checkpoint, dist
from dist_defend.engine.objective import NonFiniteError, Objective
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig, lr_factor
from dist_defend.engine.run import RunFolder
from dist_defend.engine.step import GradientStep, Position
from dist_defend.engine.trainer import Stage, Trainer, TrainerConfig
from tests.runs import make_experiment, metrics, options_of, untimed
from tests.steps import positions

SGD = OptimizerConfig("sgd", lr=0.1, momentum=0.9)


class Line(Objective):
    """Mean of (w x - 1)^2, a loss per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.0, 0.5]))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": (batch.images @ self.w - 1).square().mean()}


class Numbers:
    """Batches of 4 pairs of numbers; ``bad`` is the (epoch, number) of a batch that holds a nan."""

    num_batches = 3

    def __init__(self, bad: tuple[int, int] | None = None) -> None:
        self.bad = bad

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        for number in range(start_batch, self.num_batches):
            generator = torch.Generator().manual_seed(10 * epoch + number)
            x = torch.randn(4, 2, generator=generator)
            if (epoch, number) == self.bad:
                x[0, 0] = math.nan
            yield Batch((x,), torch.zeros(4).long(), torch.arange(4))


def make_step(config: OptimizerConfig = SGD, epochs: int = 2, **options: Any) -> GradientStep:
    update = UpdateConfig(epochs=epochs, optimizer=config, **options)
    return GradientStep(Line(), update, dist.start("fp32", None), steps_per_epoch=3)


def fit(folder: Path, *stages: Stage, **changes: Any) -> None:
    """Train as a run in that folder."""
    config = replace(TrainerConfig(log_every=1, checkpoint_every=1, trackers=()), **changes)
    run = RunFolder(folder, True)
    run.open({}, "")
    try:
        Trainer(dist.start("fp32", None), run, config).fit(stages)
    finally:
        run.close()


def weights(step: GradientStep) -> list[float]:
    return step.objective.get_parameter("w").tolist()


def test_warm_up_then_half_a_cosine() -> None:
    config = OptimizerConfig(schedule="cosine", warmup_epochs=0.5)
    factors = [lr_factor(config, step, steps_per_epoch=8, total_steps=24) for step in range(25)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[14] == pytest.approx(0.5)
    assert factors[24] == pytest.approx(0.0, abs=1e-12)
    assert all(a >= b for a, b in pairwise(factors[4:]))
    constant = OptimizerConfig(warmup_epochs=0.5)
    assert [lr_factor(constant, step, 8, 24) for step in (0, 3, 4, 24)] == [0.25, 1.0, 1.0, 1.0]


def test_milestones_are_whole_epochs() -> None:
    config = OptimizerConfig(schedule="multistep", milestones=(1, 3))
    factors = [lr_factor(config, step, steps_per_epoch=2, total_steps=8) for step in range(8)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01], rel=1e-12)
    halves = OptimizerConfig(schedule="multistep", milestones=(1, 3), gamma=0.5)
    assert [lr_factor(halves, step, 2, 8) for step in range(8)] == [1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]
    with pytest.raises(ValueError, match="key 'gamma' is 0"):
        OptimizerConfig(gamma=0.0)
    for broken in ({"schedule": "multistep"}, {"milestones": (3,)}, {"schedule": "cosine", "milestones": (3,)}):
        with pytest.raises(ValueError, match="key 'milestones' is"):
            OptimizerConfig(**broken)


def test_the_rate_of_each_update_is_the_schedules() -> None:
    step = make_step(OptimizerConfig("sgd", lr=0.1, momentum=0.0, schedule="cosine"))
    for number, (at, batch) in enumerate(zip(positions(3), [*Numbers().epoch(0), *Numbers().epoch(1)], strict=False)):
        before = step.objective.get_parameter("w").detach().clone()
        rate = 0.1 * 0.5 * (1 + math.cos(math.pi * number / 6))
        expected = before.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((batch.images @ expected - 1).square().mean(), expected)
        step(batch, at)
        torch.testing.assert_close(step.objective.get_parameter("w").detach(), before - rate * gradient)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_the_whole_batch(parts: int) -> None:
    whole, split = make_step(), make_step(accumulation=parts)
    for at, batch in zip(positions(3), Numbers().epoch(0), strict=False):
        losses = [step(batch, at)["loss"].item() for step in (whole, split)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert weights(split) == pytest.approx(weights(whole), rel=1e-6)


def test_clipping_limits_the_update_and_reports_the_norm_before_it() -> None:
    step = make_step(OptimizerConfig("sgd", lr=1.0, momentum=0.0), max_grad_norm=1e-3)
    before = torch.tensor(weights(step))
    scalars = step(next(Numbers().epoch(0)), Position())
    assert scalars["grad_norm"] > 0.1
    assert (torch.tensor(weights(step)) - before).norm().item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_step_goes_on_from_its_state(name: str, tmp_path: Path) -> None:
    config = OptimizerConfig(name, lr=0.1, weight_decay=0.01, schedule="cosine")  # type: ignore[arg-type]
    first, second = make_step(config), make_step(config)
    *early, late = Numbers().epoch(0)
    for at, batch in zip(positions(3), early, strict=False):
        first(batch, at)
    second.load_state_dict(checkpoint.load(checkpoint.save(tmp_path, 2, first.state_dict())))
    first(late, Position(batch=2))
    second(late, Position(batch=2))
    assert weights(second) == weights(first)


def test_a_nan_stops_the_run_before_the_update(tmp_path: Path) -> None:
    good = make_step()
    for at, batch in zip(positions(3), [*Numbers().epoch(0), next(Numbers().epoch(1))], strict=False):
        good(batch, at)
    step = make_step()
    with pytest.raises(NonFiniteError, match=r"not finite: stage line, step 5, rank 0"):
        fit(tmp_path, Stage("line", Numbers(bad=(1, 1)), step, epochs=2))
    assert weights(step) == weights(good)
    newest = checkpoint.newest(tmp_path / "checkpoints")
    assert newest is not None and newest.name == "step_000000004"
    assert checkpoint.load(newest)["stages"]["line"]["objective"]["w"].tolist() == weights(good)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4]


class Killed(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("moment", ["step 5", "evaluation 1", "after evaluation 1", "finish"])
@pytest.mark.parametrize("checkpoint_every", [1, 2, 100])
def test_an_interrupted_run_logs_and_ends_like_a_whole_one(moment: str, checkpoint_every: int, tmp_path: Path) -> None:
    def run(folder: Path, is_killed: bool) -> list[float]:
        step = make_step(epochs=3)
        plain, updates = step.objective.after_backward, itertools.count()

        def evaluate(epoch: int) -> dict[str, float]:
            if is_killed and moment == f"evaluation {epoch}":
                raise Killed
            return {"accuracy": float(epoch)}

        def after_backward() -> None:
            if is_killed and (moment, next(updates)) in (("step 5", 4), ("after evaluation 1", 3)):
                raise Killed
            plain()

        def finish() -> None:
            if is_killed and moment == "finish":
                raise Killed

        step.objective.after_backward = after_backward  # type: ignore[method-assign]
        stage = Stage("line", Numbers(), step, 3, evaluate=evaluate, finish=finish)
        fit(folder, stage, checkpoint_every=checkpoint_every)
        return weights(step)

    def told(folder: Path) -> list[dict[str, Any]]:
        return untimed(folder)

    expected = run(tmp_path / "whole", False)
    with pytest.raises(Killed):
        run(tmp_path / "killed", True)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # a torn line
    assert run(tmp_path / "killed", False) == expected
    assert told(tmp_path / "killed") == told(tmp_path / "whole")
    assert [row["accuracy"] for row in told(tmp_path / "whole") if "accuracy" in row] == [1.0, 2.0, 3.0]


def test_lines_are_means_since_the_last_line(tmp_path: Path) -> None:
    fit(tmp_path / "each", Stage("line", Numbers(), make_step(), epochs=1))
    fit(tmp_path / "all", Stage("line", Numbers(), make_step(), epochs=1), log_every=2)
    losses = [row["loss"] for row in metrics(tmp_path / "each")]
    rows = metrics(tmp_path / "all")
    assert [row["step"] for row in rows] == [2, 3]
    assert [row["loss"] for row in rows] == pytest.approx([(losses[0] + losses[1]) / 2, losses[2]])


def test_only_kept_stages_stay_in_checkpoints(tmp_path: Path) -> None:
    stages = [Stage(name, Numbers(), make_step(), 1, is_kept=name == "kept") for name in ("kept", "gone", "last")]
    fit(tmp_path, *stages)
    newest = checkpoint.newest(tmp_path / "checkpoints")
    assert newest is not None
    assert list(checkpoint.load(newest)["stages"]) == ["kept", "last"]
    assert newest.name == "step_000000009"


def test_a_run_that_ends_before_its_result_has_its_weights_again(tmp_path: Path) -> None:
    """Killed after the last step: the same command must not make a result of fresh weights."""
    first = make_step()
    fit(tmp_path, Stage("line", Numbers(), first, epochs=2))
    again = make_step()
    before = [tensor.clone() for tensor in again.objective.parameters()]
    fit(tmp_path, Stage("line", Numbers(), again, epochs=2))
    for fresh, mine, theirs in zip(before, again.objective.parameters(), first.objective.parameters(), strict=True):
        assert mine.equal(theirs) and not mine.equal(fresh)


@pytest.mark.parametrize(("save_seconds", "expected"), [(0.0, [3, 6, 9, 12]), (0.2, [3, 8, 12])])
def test_saves_by_the_clock_but_not_for_more_than_a_twentieth_of_it(
    save_seconds: float, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, saved, save = [0.0], [], checkpoint.save

    class OneSecondEach(Numbers):
        def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
            for batch in super().epoch(epoch, start_batch):
                now[0] += 1
                yield batch

    def slow_save(folder: Path, step: int, *rest: Any) -> Path:
        saved.append(step)
        now[0] += save_seconds
        return save(folder, step, *rest)

    monkeypatch.setattr("dist_defend.engine.trainer.time.perf_counter", lambda: now[0])
    monkeypatch.setattr(checkpoint, "save", slow_save)
    stage = Stage("line", OneSecondEach(), make_step(epochs=4), epochs=4)
    fit(tmp_path, stage, checkpoint_every=100, checkpoint_seconds=2.5)
    assert list(dict.fromkeys(saved)) == expected


class Told:
    """A step that notes what it is told."""

    def __init__(self) -> None:
        self.positions: list[tuple[int, int, int, int]] = []

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        self.positions.append((at.stage, at.epoch, at.batch, at.step))
        return {"loss": torch.zeros(())}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_a_step_is_told_where_the_run_stands(tmp_path: Path) -> None:
    first, second = Told(), Told()
    stages = [
        Stage("a", Numbers(), first, 5, stop_when=lambda: len(first.positions) >= 6),
        Stage("b", Numbers(), second, 1),
    ]
    fit(tmp_path, *stages)
    assert first.positions == [(0, epoch, batch, 3 * epoch + batch) for epoch in range(2) for batch in range(3)]
    assert second.positions == [(1, 0, batch, 6 + batch) for batch in range(3)]


def test_a_stage_stops_when_it_is_told_to(tmp_path: Path) -> None:
    asked: list[int] = []

    updates: list[None] = []

    def first(step: GradientStep) -> Stage:
        def is_enough() -> bool:
            asked.append(len(updates))
            return len(updates) >= 6

        step.objective.after_backward = lambda: updates.append(None)  # type: ignore[method-assign]

        return Stage("line", Numbers(), step, 5, evaluate=lambda e: {"at": e}, evaluate_every=9, stop_when=is_enough)

    stages = [first(make_step(epochs=5)), Stage("next", Numbers(), make_step(), 1)]
    fit(tmp_path, *stages)
    assert asked == [3, 6]
    rows = metrics(tmp_path)
    assert [row["stage"] for row in rows if "loss" in row] == ["line"] * 6 + ["next"] * 3
    assert [row["at"] for row in rows if "at" in row] == [2]  # its last epoch, though not every 9th


def simclr_run(folder: Path, *overrides: str, **changes: Any) -> tuple[int, Path]:
    config = make_experiment(folder, "simclr", options_of("simclr", folder), **changes)
    return main(["run", str(config), *overrides]), folder / "run"


def test_a_finished_run_is_not_redone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, run = simclr_run(tmp_path)
    assert status == 0
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    capsys.readouterr()
    assert main(["run", str(tmp_path / "simclr.yaml"), "trainer.log_every=3"]) == 0  # a key that changes no number
    assert capsys.readouterr().err == f"{run} is finished; delete the folder to run it again\n"
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    _, run = simclr_run(tmp_path)
    result = json.loads((run / "result.json").read_text())
    assert (result["name"], result["method"], result["world_size"], result["seed"]) == ("run", "simclr", 1, 100)
    experiment = load_experiment(run / "config.yaml")
    assert result["config_sha256"] == experiment.digest()
    assert len(result["data"]["train"]) == 64
    assert result["peak_memory_bytes"] > 1e6
    assert result["device_seconds"] == result["wall_seconds"] > 0
    assert json.loads((run / "env.json").read_text())["packages"]["torch"] == torch.__version__
    assert "finished" in (run / "log.txt").read_text()
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]


def test_a_dry_run_builds_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_experiment(tmp_path, "mimic", options_of("mimic", tmp_path))
    before = sorted(tmp_path.rglob("*"))
    assert main(["run", str(config), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "stage information: 2 epochs x 2 batches = 4 steps" in out
    assert "stage mimic: 2 epochs x 2 batches = 4 steps" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_the_printed_configuration_is_one_that_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_experiment(tmp_path, "simclr", options_of("simclr", tmp_path))
    assert main(["run", str(config), "seed=5", "--print-config"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_experiment(tmp_path / "printed.yaml") == load_experiment(config, ["seed=5"])
    assert not (tmp_path / "run").exists()


def _hparams_folders(run: Path) -> set[Path]:
    """TensorBoard's own, one for each set of hyperparameters."""
    return {path.parent for path in (run / "dist_defend").glob("*/*tfevents*")}


def test_tensorboard_gets_what_metrics_get(tmp_path: Path) -> None:
    status, run = simclr_run(tmp_path, trainer={"log_every": 1, "trackers": ["tensorboard"]})
    assert status == 0
    (events,) = (run / "dist_defend").glob("events.out.tfevents*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    found = [(event.step, event.value) for event in accumulator.Scalars("simclr/loss")]
    assert [step for step, _ in found] == [1, 2, 3, 4]
    assert [value for _, value in found] == pytest.approx([row["loss"] for row in metrics(run)], rel=1e-6)
    (written,) = (run / "dist_defend").glob("*/hparams.yml")
    hparams = yaml.safe_load(written.read_text())
    assert (hparams["run"], hparams["method"], hparams["seed"]) == ("run", "simclr", 100)
    assert (hparams["simclr.update.optimizer.lr"], hparams["trainer.trackers"]) == (0.01, '["tensorboard"]')
    assert len(hparams["config_sha256"]) == 64
    assert {path.parent for path in tmp_path.rglob("*tfevents*")} == {run / "dist_defend", *_hparams_folders(run)}


def test_bf16_trains_float32_weights_on_a_cpu(tmp_path: Path) -> None:
    runs = [simclr_run(tmp_path / name, precision=name) for name in ("bf16", "fp32")]
    assert [status for status, _ in runs] == [0, 0]
    first = [metrics(run)[0]["loss"] for _, run in runs]
    assert first[0] != first[1]
    assert first[0] == pytest.approx(first[1], rel=0.05)
    state = load_file(runs[0][1] / "model" / "model.safetensors")
    assert {v.dtype for v in state.values()} == {torch.float32, torch.int64}


def test_a_run_that_diverges_says_so_and_keeps_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = {"log_every": 1, "checkpoint_every": 1, "trackers": []}
    status, run = simclr_run(tmp_path, "simclr.update.optimizer.lr=1e30", trainer=trainer)
    assert status == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("failed: the gradient is not finite: stage simclr, step")
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    assert not (run / "result.json").exists()
    assert yaml.safe_load((run / "config.yaml").read_text())["simclr"]["update"]["optimizer"]["lr"] == 1e30
