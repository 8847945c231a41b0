"""Defences side by side: paired differences, cost and stability, by hand."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dist_defend.config import Experiment
from dist_defend.sweep import collect, estimate, report
from dist_defend.sweep.comparison import SETTING, Comparison, deviation, interval, making, places
from dist_defend.sweep.file import StageConfig, SweepConfig
from dist_defend.sweep.grid import Point, Sweep


def test_an_interval_is_students() -> None:
    """t of 0.975 is 4.30265 for two degrees of freedom, 12.7062 for one; the deviation is 10, of two 10 / sqrt(2)."""
    assert interval([-10.0, -20.0, -30.0]) == pytest.approx((-20.0, 4.3026527 * 10 / math.sqrt(3)))
    assert interval([0.0, 10.0]) == pytest.approx((5.0, 12.7062047 * 5))
    mean, half = interval([3.0])
    assert mean == 3.0 and math.isnan(half)
    assert all(math.isnan(value) for value in interval([]))


def test_a_deviation_is_the_median_of_those_from_the_median() -> None:
    assert deviation([1, 1, 2, 2, 4, 6, 9]) == 1
    assert deviation([80, 84, 90]) == 4
    assert deviation([1, 2]) == 0.5


# network -> setting -> right of 100 clean images, triggered ones of 100 as the target, seconds; None: not done
RUNS: dict[tuple[str, int], dict[str, tuple[int, int | None, float] | None]] = {
    ("a", 1): {"ft": (90, 50, 10), "x_low": (78, 40, 20), "x_mid": (84, 30, 30), "x_high": (92, 0, 40)},
    ("a", 2): {"ft": (88, 60, 10), "x_low": (82, 40, 20), "x_mid": (84, 10, 30), "x_high": (88, 20, 40)},
    ("a", 3): {"ft": (86, 70, 10), "x_low": (60, 40, 20), "x_mid": (84, 20, 30), "x_high": None},
    ("b", 1): {"ft": (80, 10, 10), "x_low": (70, 12, 20), "x_mid": (71, 13, 30), "x_high": (80, 17, 40)},
    ("none", 1): {"ft": (95, None, 10), "x_low": (93, None, 20), "x_mid": (94, None, 30), "x_high": (94, None, 40)},
}


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    points: list[Point] = []

    def add(stage: str, parent: Point | None, labels: dict[str, Any], counts: Any, *column: int) -> Point:
        key = f"{stage}{len(points)}"
        method = "ft" if stage == "defence" else "classifier"
        experiment = Experiment(method, str(tmp_path / "points" / key), options={})
        own = {**(parent.labels if parent else {}), **labels}
        points.append(Point(stage, key, experiment, own, parent, 0, column))
        if counts is not None:
            acc, asr, seconds = counts
            n = 0 if asr is None else 100
            row = {"acc": (acc, 100), **dict.fromkeys(("asr", "asr_all"), (asr or 0, n)), "ra": (0, n)}
            kind = labels[stage].partition("_")[0] if stage == "defence" else "backdoored"
            rows = [{"kind": kind, "task": "t", "seed": 1, **{k: {"correct": c, "n": m} for k, (c, m) in row.items()}}]
            Path(experiment.output).mkdir(parents=True)
            content = {"device_seconds": seconds, "wall_seconds": seconds, "rows": rows, "metrics": {}}
            (Path(experiment.output) / "result.json").write_text(json.dumps(content))
        return points[-1]

    for (attack, seed), defences in RUNS.items():
        parent = add("attack", None, {"attack": attack, "attack.seed": seed}, (91, 100, 5.0))
        for number, (name, counts) in enumerate(defences.items()):
            add("defence", parent, {"defence": name}, counts, number)
    stages = {"attack": StageConfig(), "defence": StageConfig(after="attack")}
    return Sweep(tmp_path / "sweep.yaml", SweepConfig(str(tmp_path), stages), tuple(points))


def test_an_attack_after_clean_networks_makes_the_networks_that_are_compared(sweep: Sweep) -> None:
    """The same numbers as without the stage before it, which only names two seeds' clean networks."""
    root = Point("clean", "clean", Experiment("classifier", "c", options={}), {"clean": "control"}, None, 0, ())
    moved: dict[str, Point] = {}
    for point in sweep.points:
        parent = root if point.parent is None else moved[point.parent.key]
        moved[point.key] = dataclasses.replace(point, parent=parent, labels={**root.labels, **point.labels})
    stages = {"clean": StageConfig(), "attack": StageConfig(after="clean"), "defence": StageConfig(after="attack")}
    config = dataclasses.replace(sweep.config, stages=stages)
    chained = dataclasses.replace(sweep, config=config, points=(root, *moved.values()))
    assert making(chained) == {"clean", "attack"} and making(sweep) == {"attack"}
    plain, found = (Comparison(each, collect.table(each)) for each in (sweep, chained))
    for defence in plain.defences:
        assert found.differences(defence) == pytest.approx(plain.differences(defence), nan_ok=True)
        for attack in ("a", "b"):
            own = found.differences(defence, f"control {attack}")
            assert own == pytest.approx(plain.differences(defence, attack), nan_ok=True)
    board = report.leaderboard(chained, collect.table(chained))
    order = [name for name, rows in board[board["stage"] != "clean"].groupby("attack", sort=False)]
    assert order == ["a", "b", "none"]  # an attack's lines stand together


def test_settings_that_the_file_names_need_no_stage_before_their_names(sweep: Sweep) -> None:
    """A stage after them, which has no names of its own, says which one it is."""
    defences = [point for point in sweep.points if point.stage == "defence"]
    again = [dataclasses.replace(p, stage="again", key=f"{p.key}_again", parent=p) for p in defences]
    stages = {**sweep.config.stages, "again": StageConfig(after="defence")}
    config = dataclasses.replace(sweep.config, stages=stages)
    found = places(dataclasses.replace(sweep, config=config, points=(*sweep.points, *again)))
    told = dict(zip(found["key"], found[SETTING], strict=True))
    assert {told[p.key] for p in defences} == {"ft", "x_low", "x_mid", "x_high"}
    assert {told[p.key] for p in again} == {"again ft", "again x_low", "again x_mid", "again x_high"}


def test_differences_are_those_of_one_network(sweep: Sweep) -> None:
    """x_low's ASR on a: -10, -20, -30 points; on b +2. x_high lacks the third network of a."""
    comparison = Comparison(sweep, collect.table(sweep))
    assert comparison.reference == ("ft", "ft")
    own = comparison.differences(("x_low", "x"), "a")
    assert (own["asr_diff"], own["asr_diff_half"]) == pytest.approx((-20.0, 24.84138))
    assert own["asr_diff_n"] == 3 and own["acc_diff"] == pytest.approx((-12 - 6 - 26) / 3)
    every = comparison.differences(("x_low", "x"))
    assert every["asr_diff"] == pytest.approx((-10 - 20 - 30 + 2) / 4) and every["asr_diff_n"] == 4
    assert every["acc_diff"] == pytest.approx((-12 - 6 - 26 - 10 - 2) / 5) and every["acc_diff_n"] == 5
    assert comparison.differences(("x_high", "x"), "a")["asr_diff"] == pytest.approx((-50 - 40) / 2)
    assert math.isnan(comparison.differences(("ft", "ft"))["acc_diff"])


def test_stability_is_over_settings_on_the_networks_that_all_have(sweep: Sweep) -> None:
    """Means on a, networks 1 and 2: ACC 80, 84, 90, ASR 40, 20, 10; on b 70, 71, 80 and 12, 13, 17; none 93, 94, 94."""
    found = Comparison(sweep, collect.table(sweep)).stability()
    assert found.keys() == {"x"} and found["x"]["settings"] == 3
    assert found["x"]["acc_mad"] == pytest.approx((4 + 1 + 0) / 3)
    assert found["x"]["asr_mad"] == pytest.approx((10 + 1) / 2)


def test_the_table_has_cost_side_by_side(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    rows = collect.table(sweep)
    table = Comparison(sweep, rows).table().set_index("setting")
    assert table.index.tolist() == ["ft", "x_low", "x_mid", "x_high"]
    assert table["times"].tolist() == [1.0, 2.0, 3.0, 4.0] and table["networks"].tolist() == [5, 5, 5, 4]
    assert table["acc"]["ft"] == pytest.approx((90 + 88 + 86 + 80 + 95) / 5)
    assert table["asr"]["ft"] == pytest.approx((50 + 60 + 70 + 10) / 4)
    report.write(sweep, rows)
    text = (sweep.folder / "leaderboard.md").read_text()
    assert "| ft | ft | 5 | 87.8 ± 5.5 | 47.5 ± 26.3 | – | – | 10.0 ± 0.0 | 1.0 | – | – |" in text
    line = "| a | x_low | x | t | 73.3 ± 11.7 | 40.0 ± 0.0 | 0.0 ± 0.0 | – | 3 | -14.7 ± 25.5 | -20.0 ± 24.8 | 20 |"
    assert line in text
    assert "mean difference to ft ft, the first setting of the file" in text
    assert "## Defences side by side" in capsys.readouterr().out
    assert pd.read_csv(sweep.folder / "defences.csv")["asr_mad"].tolist()[1:] == pytest.approx([5.5] * 3)


def test_a_sweep_of_one_stage_compares_nothing(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    alone = Sweep(sweep.path, SweepConfig(sweep.config.output, {"attack": StageConfig()}), tuple(sweep.stage("attack")))
    report.write(alone, collect.table(alone))
    assert "side by side" not in capsys.readouterr().out


def test_presets_of_several_stages_are_settings(sweep: Sweep) -> None:
    """An axis shows its key; where several stages come after the attacks, a setting shows its stage."""
    attack = sweep.stage("attack")[0]
    points = [attack]
    for stage in ("fine", "other"):
        for preset in ("one", "two"):
            key, labels = f"{stage}{preset}", {**attack.labels, f"{stage}.ft.preset": preset, f"{stage}.seed": 3}
            points.append(Point(stage, key, attack.experiment, labels, attack, 0, ()))
    stages = {"attack": StageConfig(), "fine": StageConfig(after="attack"), "other": StageConfig(after="attack")}
    presets = Sweep(sweep.path, SweepConfig(sweep.config.output, stages), tuple(points))
    found = Comparison(presets, collect.table(presets)).places
    assert found[":setting"].tolist() == [f"{s} preset={p}" for s in ("fine", "other") for p in ("one", "two")]
    assert set(found[":attack"]) == {"a"} and set(found[":network"]) == {attack.key}


def test_the_rest_costs_what_its_neighbours_did(sweep: Sweep) -> None:
    """x_high of the third network: the other three of its column took 40 s."""
    told = estimate.told(sweep)
    assert told[0].startswith("stage attack: 5 of 5 done, 5.0 device-seconds each; the other 0 will take about 0")
    assert "stage defence: 19 of 20 done" in told[1] and "the other 1 will take about 0.011 device-hours" in told[1]
