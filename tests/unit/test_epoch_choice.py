"""Tuning defences deliver their last epoch, or the one that held-out clean images choose."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_defend.cli import PREEMPTED, main
from dist_defend.counts import Count, predict
from dist_defend.errors import UserError
from dist_defend.methods.defend.pruning import outcome
from dist_defend.methods.defend.tuning import plan
from dist_defend.methods.defend.tuning.selection import EpochChoice, split_held_out
from dist_defend.methods.defend.tuning.step import TuningStep
from dist_defend.models.artifact import load_classifier
from tests.runs import make_classifier, make_data, make_experiment, metrics


class Weight(nn.Module):
    """A network of one number, which is the epoch that it stands at."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))


@pytest.mark.parametrize(
    ("right", "max_drop", "chosen"),
    [
        ([97, 99, 95, 94], 0.05, 3),  # of 100: 95 is the last within
        ([97, 94, 96, 98], 0.05, 4),  # one that costs more lies between
        ([50, 60, 60, 40], 0.05, 3),  # none is within: the best, the last among equals
        ([50, 95, 60, 94], 0.05, 2),  # one within is kept, whatever is better than 94
        ([99, 100, 101, 99], 0.0, 3),
        ([0, 0, 0, 0], 1.0, 4),
    ],
)
def test_the_last_epoch_that_costs_little(right: list[int], max_drop: float, chosen: int) -> None:
    model: Any = Weight()
    suspect = Weight()
    found = {0: 100, **dict(enumerate(right, 1))}

    def count(judged: Any) -> Count:
        return Count(100, 120) if judged is suspect else Count(found[int(judged.value.detach())], 120)

    choice = EpochChoice(model, lambda: suspect, count, max_drop)  # type: ignore[arg-type, return-value]
    told = []
    for epoch in range(1, 5):
        model.value.data.fill_(epoch)
        told.append(choice.look(epoch)["acc_held_out"])
        if epoch == 2:  # a resume
            state = choice.state_dict() | {"kept": {k: v.clone() for k, v in choice.kept.items()}}
            choice = EpochChoice(model, lambda: suspect, count, max_drop)  # type: ignore[arg-type, return-value]
            choice.load_state_dict(state)
    choice.deliver()
    assert float(model.value.detach()) == chosen
    assert told == pytest.approx([count / 1.2 for count in right])
    expected = {"chosen_epoch": chosen, "held_out_right": right[chosen - 1], "held_out_right_before": 100}
    assert choice.metrics() == expected


def test_rows_are_held_out_once() -> None:
    rows = np.arange(5, 45)
    trained, held = split_held_out(rows, 0.2, seed=3, method="ft")
    assert (len(trained), len(held)) == (32, 8) and sorted([*trained, *held]) == rows.tolist()
    assert (np.diff(trained) > 0).all() and (np.diff(held) > 0).all()
    assert held.tolist() != split_held_out(rows, 0.2, seed=4, method="ft")[1].tolist()
    for share, told in ((0.01, "0 would be held out and 40"), (0.99, "40 would be held out and 0")):
        with pytest.raises(UserError, match=rf"key 'sau.held_out' is {share}: of 40 images {told}"):
            split_held_out(rows, share, seed=3, method="sau")


def options(folder: Path, **more: Any) -> dict[str, Any]:
    """Rates so large that later epochs are worse on the held-out images."""
    return {
        "model": make_classifier(folder / "model", attack={"trigger": {"name": "badnets"}, "target_class": 1}),
        "data": {"path": make_data(folder / "data"), "max_samples": 18},
        "test": {"path": make_data(folder / "test", 9, seed=1)},
        "batch_size": 4,
        "epochs": 6,
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
        "held_out": 0.34,
        "max_accuracy_drop": 0.0,
        **more,
    }


SHORT: dict[str, dict[str, Any]] = {
    "ft": {},
    "ft_sam": {},
    "nad": {"teacher_epochs": 1},
    "sau": {"attack_steps": 1},
    "nc": {"search": {"epochs": 1}, "anomaly_threshold": 1e-3, "stamped_share": 0.5},
    "fp": {"once_prune_ratio": 0.2},
}


@pytest.mark.parametrize("method", SHORT)
def test_a_run_delivers_the_chosen_epoch(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is where a run of so many epochs ends."""
    given = options(tmp_path, **SHORT[method])
    learned: set[int] = set()
    judged: set[int] = set()
    call = TuningStep.__call__

    def noting(model: Any, loader: Any, ranks: Any) -> tuple[Tensor, Tensor, Tensor]:
        found = predict(model, loader, ranks)
        judged.update(found[2].tolist())
        return found

    def learning(self: TuningStep, batch: Any, at: Any) -> Any:
        learned.update(batch.index.tolist())
        return call(self, batch, at)

    monkeypatch.setattr(plan, "predict", noting)
    monkeypatch.setattr(TuningStep, "__call__", learning)
    assert main(["run", str(make_experiment(tmp_path / "all", method, given))]) == 0
    result = json.loads((tmp_path / "all" / "run" / "result.json").read_text())
    own, log = result["metrics"], metrics(tmp_path / "all" / "run")
    held = [row["acc_held_out"] for row in log if "acc_held_out" in row]
    before, right = own["held_out_right_before"], [round(percent * 6 / 100) for percent in held]
    within = [n for n, count in enumerate(right, 1) if count >= before]
    chosen = within[-1] if within else max(range(1, len(right) + 1), key=lambda n: (right[n - 1], n))
    assert (own["chosen_epoch"], own["held_out_images"], own["defence_images"]) == (chosen, 6, 18)
    assert learned.isdisjoint(judged) and len(learned) == 12 and len(judged) == 6
    model, card = load_classifier(tmp_path / "all" / "run" / "model")
    assert card.chosen_by == "defence_data"
    again = {**given, "epochs": chosen, "max_accuracy_drop": 1.0 if method != "fp" else 0.0}
    assert main(["run", str(make_experiment(tmp_path / "some", method, again))]) == 0
    other = load_classifier(tmp_path / "some" / "run" / "model")[0].state_dict()
    assert all(value.equal(other[name]) for name, value in model.state_dict().items())
    rows = [json.loads((tmp_path / name / "run" / "result.json").read_text())["rows"] for name in ("all", "some")]
    first, second = ([row["acc"] for row in run if "acc" in row] for run in rows)  # a detector's row has none
    assert first == second and first


def test_a_resumed_run_remembers_what_it_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the fifth of six epochs of three updates."""
    given = options(tmp_path)
    call, seen, ends = TuningStep.__call__, [0], []

    def stopping(self: TuningStep, batch: Any, at: Any) -> Any:
        seen[0] += 1
        if seen[0] == 14:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, batch, at)

    for name in ("whole", "cut"):
        config = make_experiment(tmp_path / name, "ft", given)
        if name == "cut":
            monkeypatch.setattr(TuningStep, "__call__", stopping)
            assert main(["run", str(config)]) == PREEMPTED
        assert main(["run", str(config)]) == 0
        result = json.loads((tmp_path / name / "run" / "result.json").read_text())
        ends.append((result["model_sha256"], result["rows"][0]["acc"], result["metrics"]["chosen_epoch"]))
    assert ends[0] == ends[1]


def test_the_last_epoch_is_delivered_unless_told_otherwise(tmp_path: Path) -> None:
    assert main(["run", str(make_experiment(tmp_path, "ft", options(tmp_path, held_out=0.0)))]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert "chosen_epoch" not in result["metrics"]
    assert not any("acc_held_out" in row for row in metrics(tmp_path / "run"))
    assert load_classifier(tmp_path / "run" / "model")[1].chosen_by is None


def test_a_share_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(make_experiment(tmp_path, "ft", options(tmp_path, held_out=1.0)))]) == 2
    assert "key 'ft.held_out' is 1.0; it must be at least 0 and below 1" in capsys.readouterr().err


@pytest.mark.parametrize("full_table", [True, False])
def test_pruning_by_the_test_set_counts_it_once(
    full_table: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    count = outcome.Outcome._count

    def noting(self: Any, order: Any, stops: Any, tested: Any) -> Any:
        seen.append(len(list(tested)))
        return count(self, order, stops, tested)

    monkeypatch.setattr(outcome.Outcome, "_count", noting)
    given = options(tmp_path, held_out=0.0, epochs=1, preset="backdoorbench", full_table=full_table)
    given["once_prune_ratio"] = 0.25  # of 128 features: stops at 0, 32, 64 and 96, less one
    assert main(["run", str(make_experiment(tmp_path, "fp", given))]) == 0
    table = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert seen == [4] and [stop["pruned"] for stop in table] == [0, 31, 63, 95]
    assert all("acc" in stop for stop in table)
