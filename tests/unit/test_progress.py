"""What a run shows while it works: a bar with its scalars, evaluations as lines, before and after with n; trackers."""

import io
import json
import os
import re
import signal
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.tracking import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_defend.cli import main
from dist_defend.data.loader import DatasetConfig, LoaderConfig
from dist_defend.engine import dist
from dist_defend.engine.context import Context
from dist_defend.trial import Trial
from tests.runs import make_classifier, make_data, make_experiment, metrics, options_of

ATTACK = {"trigger": {"name": "badnets"}, "target_class": 1}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines as they stand in the end, of what was written with carriage returns."""
        lines = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error from now on, without colours; not in a fixture, behind which pytest replaces it."""
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def unlearning(folder: Path, **changes: Any) -> Path:
    """Two rounds of I-BAU, each of three inner and three outer steps."""
    options = {
        "model": make_classifier(folder / "suspect", attack=ATTACK),
        "data": {"path": make_data(folder / "data")},
        "test": {"path": make_data(folder / "test", 13, seed=1)},
        "rounds": 2,
        "batch_size": 8,
        "min_patched": 1,
    }
    return make_experiment(folder, "ibau", options, **changes)


def counted(run: Path, name: str) -> tuple[float, float, int]:
    """Percent before, percent after, n: as result.json has them."""
    result = json.loads((run / "result.json").read_text())
    after = result["rows"][0][name]
    return result["metrics"][f"{name}_before"], 100 * after["correct"] / after["n"], after["n"]


def test_a_terminal_shows_scalars_evaluations_and_the_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = use_terminal(monkeypatch)
    assert main(["run", str(unlearning(tmp_path))]) == 0
    run = tmp_path / "run"
    rows = metrics(run)
    told = screen.getvalue()
    for name in ("outer_loss", "delta_norm"):
        last = [row[name] for row in rows if name in row][-1]
        assert f"{name} {last:.4g}" in told
    assert "grad_norm" not in told  # the bar is short: all scalars are in metrics.jsonl

    lines = screen.screen()
    (acc, acc_after, n), (asr, asr_after, others) = counted(run, "acc"), counted(run, "asr")
    assert acc != acc_after
    first = f"{tmp_path}/suspect on noise, before: acc {acc:.2f} % of {n}, asr {asr:.2f} % of {others}"
    evaluated = [row for row in rows if "acc" in row]
    shown = [f"ibau epoch {r['epoch']}/2 step {r['step']}: acc {r['acc']:.5g} asr {r['asr']:.5g}" for r in evaluated]
    places = [next(n for n, line in enumerate(lines) if line.startswith(start)) for start in (first, *shown)]
    bar = next(n for n, line in enumerate(lines) if line.startswith("ibau: 100%"))
    assert places == sorted(places) and len(places) == 3 and places[-1] < bar
    outcome = (
        f"ibau on noise: acc {acc:.2f} -> {acc_after:.2f} % of {n}, asr {asr:.2f} -> {asr_after:.2f} % of {others}"
    )
    assert lines[-2:] == [outcome, ""]


def test_what_ends_a_run_is_a_line_below_the_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = use_terminal(monkeypatch)
    monkeypatch.setattr("dist_defend.engine.trainer.Trainer._log", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert main(["run", str(make_experiment(tmp_path, "simclr", options_of("simclr", tmp_path)))]) == 130
    bar, last, end = screen.screen()[-3:]
    assert bar.startswith("simclr:  25%|") and end == ""
    saved = tmp_path / "run/checkpoints/step_000000001"
    assert last == f"signal received: saved step 1 to {saved}; the same command goes on from there"


def test_without_a_terminal_each_scalar_has_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(unlearning(tmp_path))]) == 0
    err = capsys.readouterr().err
    assert len(re.findall(r"^ibau epoch \d/2 step \d+: .*(inner|outer)_loss", err, re.MULTILINE)) == 12
    assert "\r" not in err and "it/s" not in err
    assert re.search(r"\bibau on noise: acc \d+\.\d\d -> \d+\.\d\d % of 13, asr ", err.splitlines()[-1])


def test_a_resume_does_not_take_what_is_half_done_for_the_suspect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = unlearning(tmp_path)
    assert main(["run", str(config)]) == 0
    before = counted(tmp_path / "run", "acc")
    (tmp_path / "run" / "result.json").unlink()
    capsys.readouterr()
    assert main(["run", str(config)]) == 0
    assert counted(tmp_path / "run", "acc") == before and before[0] != before[1]
    err = capsys.readouterr().err
    assert ", before: " not in err and f"acc {before[0]:.2f} -> {before[1]:.2f} % of 13" in err.splitlines()[-1]


@pytest.mark.parametrize("backend", ["torch", "resident"])
def test_measuring_the_suspect_draws_nothing(backend: Any, tmp_path: Path) -> None:
    """Dropout comes from torch's generator: a run must not depend on whether its first line was told."""
    context = Context(dist.start("fp32", None), 1, LoaderConfig(backend=backend, workers=1), tmp_path / "run")
    trial = Trial(make_classifier(tmp_path / "suspect", attack=ATTACK), context)
    trial.test_on(DatasetConfig(make_data(tmp_path / "test")), None)
    state = torch.get_rng_state()
    (measure,) = context.at_start
    measure()
    assert torch.equal(torch.get_rng_state(), state)
    assert trial.before["acc"].n == 24


@pytest.mark.parametrize(
    ("method", "shown"),
    [
        ("classifier", ["loss", "train_acc"]),
        ("badencoder", ["loss", "effectiveness"]),
        ("kd", ["loss", "kl"]),
        ("mimic", ["loss", "clone"]),
        ("probe", ["mean_loss"]),
        ("simclr", ["loss"]),
    ],
)
def test_each_bar_shows_what_its_method_logs(
    method: str, shown: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = use_terminal(monkeypatch)
    assert main(["run", str(make_experiment(tmp_path, method, options_of(method, tmp_path)))]) == 0
    row = [row for row in metrics(tmp_path / "run") if shown[-1] in row][-1]
    assert ", ".join(f"{name} {row[name]:.4g}" for name in shown) + "]" in screen.getvalue()


def test_trackers_get_the_final_metrics(tmp_path: Path) -> None:
    trainer = {"log_every": 1, "trackers": ["tensorboard"]}
    assert main(["run", str(unlearning(tmp_path, trainer=trainer))]) == 0
    (events,) = (tmp_path / "run" / "dist_defend").glob("events.out.tfevents*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    final = {
        tag: (event.step, event.value)
        for tag in accumulator.Tags()["scalars"]
        if tag.startswith("final/")
        for event in accumulator.Scalars(tag)
    }
    before, after, _ = counted(tmp_path / "run", "acc")
    assert final["final/acc_before"] == (12, pytest.approx(before))
    assert final["final/ibau/noise/acc"] == (12, pytest.approx(after))
    assert final["final/defence_images"] == (12, 24)


def test_a_wandb_run_holds_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in wandb's place, which need not be installed, notes what Accelerate's tracker tells it."""
    told: dict[str, Any] = {"config": {}, "logged": {}}
    run = SimpleNamespace(
        log=lambda values, step=None: told["logged"].update(values), finish=lambda: told.update(finished=True)
    )

    def init(project: str, **options: Any) -> Any:
        told.update(project=project, mode=os.environ["WANDB_MODE"], **options)
        return run

    wandb = ModuleType("wandb")
    config = SimpleNamespace(update=lambda values, **_: told["config"].update(values))
    vars(wandb).update(init=init, config=config)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert main(["run", str(unlearning(tmp_path, trainer={"trackers": ["wandb"]}))]) == 0
    assert told["project"] == "dist_defend" and told["mode"] == "offline" and told["finished"]
    assert (told["name"], told["dir"]) == ("run", str(tmp_path / "run"))
    assert told["config"]["ibau.rounds"] == 2 and told["config"]["ibau.attack"] == "null"
    assert told["config"]["run"] == "run" and len(told["config"]["config_sha256"]) == 64
    assert all(isinstance(value, int | float | str) for value in told["config"].values())
    assert {"ibau/acc", "ibau/asr", "final/ibau/noise/acc"} <= told["logged"].keys()
