"""What a sweep's points take from their ancestors, and that its leaderboard compares defences of one attack."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_defend.config import Experiment
from dist_defend.errors import UserError
from dist_defend.sweep import collect, report
from dist_defend.sweep.file import StageConfig, SweepConfig
from dist_defend.sweep.grid import Point, Sweep, load_sweep

CLASSIFIER = {"data": {"path": "data/train"}, "test": {"path": "data/test"}, "update": {"batch_size": 4, "epochs": 2}}


def three_stages(folder: Path, **last: Any) -> Sweep:
    experiment = {"method": "classifier", "output": "runs/x", "classifier": CLASSIFIER}
    (folder / "classifier.yaml").write_text(yaml.safe_dump(experiment))
    config = str(folder / "classifier.yaml")
    stages = {
        "first": {"config": config, "product": {"classifier.update.epochs": [2, 3]}, "seeds": [11, 12]},
        "second": {
            "config": config,
            "after": "first",
            "set": {"classifier.data.path": "${first.output}"},
            "product": {"classifier.update.batch_size": [8, 16]},
        },
        "third": {"config": config, "after": "second", "set": last},
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"output": "runs/s", "stages": stages}, sort_keys=False))
    return load_sweep(folder / "sweep.yaml")


def test_a_point_reads_its_grandparent_too(tmp_path: Path) -> None:
    changes = {
        "seed": "${first.seed}",
        "classifier.update.epochs": "${first.classifier.update.epochs}",
        "classifier.update.batch_size": "${second.classifier.update.batch_size}",
        "classifier.data.path": "${first.output}/beside/${second.output}",
    }
    sweep = three_stages(tmp_path, **changes)
    found = []
    for point in sweep.stage("third"):
        own = point.experiment.resolved()
        update = own["classifier"]["update"]
        found.append((own["seed"], update["epochs"], update["batch_size"]))
        assert point.parent is not None and point.parent.parent is not None
        parent, grandparent = point.parent.key, point.parent.parent.key
        assert own["classifier"]["data"]["path"] == f"runs/s/points/{grandparent}/beside/runs/s/points/{parent}"
        assert list(point.labels.values()) == [update["epochs"], own["seed"], update["batch_size"]]
    assert sorted(found) == [(s, e, b) for s in (11, 12) for e in (2, 3) for b in (8, 16)]
    assert [(point.root, point.column) for point in sweep.stage("third")] == [
        (r, (c, 0)) for r in range(4) for c in (0, 1)
    ]


def test_a_point_reads_no_stage_beside_its_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"this stage comes after second, first"):
        three_stages(tmp_path, seed="${third.seed}")


def write_result(point: Point, kind: str, asr: int, acc: int) -> None:
    rates = {"acc": (acc, 100), "asr": (asr, 50), "asr_all": (asr, 100), "ra": (50 - asr, 50)}
    counts = {name: {"correct": correct, "n": n} for name, (correct, n) in rates.items()}
    rows = [{"kind": kind, "task": "t", "seed": 1, **counts}]
    folder = Path(point.experiment.output)
    folder.mkdir(parents=True)
    before = {"acc_before": 90.0, "asr_before": 80.0}
    content = {"device_seconds": 1.0, "wall_seconds": 1.0, "rows": rows, "metrics": before}
    (folder / "result.json").write_text(json.dumps(content))


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """Two attacks by two seeds of the first stage; each is defended by two methods."""
    points: list[Point] = []

    def add(stage: str, labels: dict[str, Any], parent: Point | None, kind: str, asr: int, acc: int) -> Point:
        experiment = Experiment("classifier", str(tmp_path / "points" / str(len(points))), options={})
        own = {**(parent.labels if parent else {}), **labels}
        points.append(Point(stage, f"{stage}{len(points)}", experiment, own, parent, 0, ()))
        write_result(points[-1], kind, asr, acc)
        return points[-1]

    for attack, rates in (("sig", (40, 30, 20)), ("badnets", (45, 10, 25))):
        for seed in (1, 2):
            first = {"attack.trigger": attack, "attack.seed": seed}
            parent = add("attack", first, None, "backdoored", rates[0], 90)
            add("defence", {"defence": "rnp"}, parent, "rnp", rates[1], 94)
            add("defence", {"defence": "ibau"}, parent, "ibau", rates[2], 81)
    stages = {"attack": StageConfig(), "defence": StageConfig(after="attack")}
    return Sweep(tmp_path / "sweep.yaml", SweepConfig(str(tmp_path), stages), tuple(points))


def test_the_leaderboard_ranks_defences_attack_by_attack(sweep: Sweep) -> None:
    board = report.leaderboard(sweep, collect.table(sweep))
    assert list(zip(board["attack.trigger"], board["kind"], board["asr_defender"], strict=True)) == [
        ("sig", "ibau", 40.0), ("sig", "rnp", 60.0), ("sig", "backdoored", 80.0),
        ("badnets", "rnp", 20.0), ("badnets", "ibau", 50.0), ("badnets", "backdoored", 90.0),
    ]  # fmt: skip
    assert board["n_defender"].tolist() == [2] * 6


def test_a_sweep_rates_no_gain_of_accuracy_and_no_rise_of_asr(sweep: Sweep) -> None:
    """DER = (max(0, fall of ASR) - max(0, fall of ACC) + 1) / 2, as BackdoorBench documents it."""
    rows = collect.table(sweep)
    found = {(row["attack.trigger"], row["kind"]): row["der"] for row in rows.to_dict("records")}
    assert found["sig", "rnp"] == pytest.approx(100 * (0.2 + 1) / 2)  # 80 to 60 %, accuracy 90 to 94 %
    assert found["sig", "ibau"] == pytest.approx(100 * (0.4 - 0.09 + 1) / 2)
    assert found["badnets", "backdoored"] == pytest.approx(50)  # 80 to 90 %: no worse than nothing
