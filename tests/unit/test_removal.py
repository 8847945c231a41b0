"""Seconds of work: what they leave out, and how soon a defence had removed the backdoor."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_defend import counts
from dist_defend.cli import main
from dist_defend.engine.clock import WorkClock
from dist_defend.engine.identity import Identity, Past
from dist_defend.methods.defend.pruning.stops import predict_pruned
from dist_defend.methods.defend.tuning.step import TuningStep
from dist_defend.removal import removal_seconds
from tests.runs import make_classifier, make_data, make_experiment, metrics

ATTACK = {"trigger": {"name": "badnets"}, "target_class": 1}


class Hands:
    """Of a clock; a test moves them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.at = 100.0
        patch.setattr(WorkClock, "_now", lambda clock: self.at)

    def slowed(self, function: Any) -> Any:
        """A call takes a thousand seconds."""

        def slow(*given: Any, **named: Any) -> Any:
            self.at += 1000
            return function(*given, **named)

        return slow


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    return Hands(monkeypatch)


def test_measuring_is_no_work(hands: Hands) -> None:
    work = WorkClock()
    hands.at += 3
    with pytest.raises(KeyError), work.measuring():
        hands.at += 50
        raise KeyError
    hands.at += 4
    assert work.seconds == 7.0


def test_work_is_that_of_all_lives_and_ranks(hands: Hands, tmp_path: Path) -> None:
    first = Identity({}, 2, "a")
    hands.at += 5
    second = Identity({}, 3, "a")
    second.follow(Past.read(first.plain(), tmp_path), tmp_path, True)
    hands.at += 7
    assert second.work_seconds == 5 * 2 + 7 * 3
    old = {"inputs": {}, "lives": [{"code_version": "a", "world_size": 1, "wall_seconds": 9.0}]}
    second.follow(Past.read(old, tmp_path), tmp_path, True)
    assert second.work_seconds == 7 * 3  # a life of before it was kept


def options(folder: Path, **own: Any) -> dict[str, Any]:
    data, test = make_data(folder / "data"), make_data(folder / "test", 13, seed=1)
    model = make_classifier(folder / "model", attack=ATTACK)
    return {"model": model, "data": {"path": data}, "test": {"path": test}, "ratio": 1.0, "batch_size": 8, **own}


def test_tuning_works_between_its_measurements(hands: Hands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A step takes a thousand seconds, and so does a look at images."""
    monkeypatch.setattr(TuningStep, "learn", hands.slowed(TuningStep.learn))
    monkeypatch.setattr("dist_defend.trial.predict", hands.slowed(counts.predict))
    assert main(["run", str(make_experiment(tmp_path, "ft", options(tmp_path, epochs=2, evaluate_every=1)))]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [row["work_seconds"] for row in metrics(tmp_path / "run") if "acc" in row] == [3000.0, 6000.0]
    assert result["work_seconds"] == 6000.0 and hands.at == 100 + 6000 + 7000  # a look at the suspect, and 3 x 2


def test_a_stop_chosen_by_the_defenders_images_is_work(
    hands: Hands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A pass over images at all stops takes a thousand seconds: one of the defender's, two of the test's."""
    monkeypatch.setattr("dist_defend.methods.defend.pruning.outcome.predict_pruned", hands.slowed(predict_pruned))
    short = {"unlearning_epochs": 1, "recovering_epochs": 1, "pruning_max": 0.2, "pruning_step": 0.1}
    assert main(["run", str(make_experiment(tmp_path, "rnp", options(tmp_path, **short)))]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["work_seconds"] == 1000.0 and hands.at == 3100


def lines(folder: Path, *rows: tuple[float, float, float]) -> None:
    told = [{"step": n, "stage": "ft", "work_seconds": s, "acc": a, "asr": b} for n, (s, a, b) in enumerate(rows)]
    others = [{"step": 9, "stage": "ft", "loss": 0.1}, {"step": 9, "stage": "other", "acc": 90.0, "asr": 0.0}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in [*others, *told]))


def ended(acc: int, asr: int, **others: Any) -> dict[str, Any]:
    row = {"acc": {"correct": acc, "n": 100}, "asr": {"correct": asr, "n": 100}}
    return {"rows": [row], "metrics": {"acc_before": 90.0}, "work_seconds": 50.0, **others}


def test_the_first_measurement_that_has_both(tmp_path: Path) -> None:
    lines(tmp_path, (1.0, 90.0, 50.0), (2.0, 85.0, 1.0), (3.0, 85.1, 10.0), (4.0, 85.1, 9.9), (5.0, 90.0, 0.0))
    assert removal_seconds(tmp_path, ended(90, 99)) == 4.0


def test_a_run_that_measures_once_has_its_end_to_tell(tmp_path: Path) -> None:
    assert removal_seconds(tmp_path, ended(86, 9)) == 50.0
    assert removal_seconds(tmp_path, ended(85, 9)) is None
    assert removal_seconds(tmp_path, ended(86, 10)) is None
    assert removal_seconds(tmp_path, ended(86, 9, work_seconds=None)) is None
    assert removal_seconds(tmp_path, ended(86, 9, metrics={})) is None  # no defence
