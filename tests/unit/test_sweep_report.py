"""Results of points to tables, leaderboard and plot."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dist_defend.config import Experiment
from dist_defend.errors import UserError
from dist_defend.sweep import collect, report
from dist_defend.sweep.expectation import Expectation, outcomes
from dist_defend.sweep.file import StageConfig, SweepConfig
from dist_defend.sweep.grid import Point, Sweep


def counts(acc: int, asr: int) -> dict[str, Any]:
    rates = {"acc": (acc, 100), "asr": (asr, 50), "asr_all": (asr, 100), "ra": (50 - asr, 50)}
    return {name: {"correct": correct, "n": n} for name, (correct, n) in rates.items()}


def result(kind: str, seed: int, *rows: tuple[int, int], seconds: float = 10.0, **metrics: float) -> dict[str, Any]:
    """Its first row is the defender's, a second one the oracle's."""
    kinds = (kind, f"{kind} (oracle)")
    listed = [{"kind": k, "task": "t", "seed": seed, **counts(*row)} for k, row in zip(kinds, rows, strict=False)]
    return {"device_seconds": seconds, "wall_seconds": seconds, "rows": listed, "metrics": metrics}


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """Two seeds of one attack; of two defences one is missing for the second seed; RNP has an oracle."""
    points: list[Point] = []
    results: list[dict[str, Any] | None] = []

    def add(stage: str, parent: Point | None, labels: dict[str, Any], content: dict[str, Any] | None) -> Point:
        key = f"{stage}{len(points)}"
        method = "ibau" if stage == "defence" else "classifier"
        experiment = Experiment(method, str(tmp_path / "points" / key), options={})
        point = Point(stage, key, experiment, {**(parent.labels if parent else {}), **labels}, parent, 0, ())
        points.append(point)
        results.append(content)
        return point

    before = {"acc_before": 90.0, "asr_before": 100.0}
    for seed, acc in ((1, 80), (2, 84)):
        labels = {"attack.classifier.attack.trigger": "badnets", "attack.seed": seed}
        attack = add("attack", None, labels, result("backdoored", seed, (90, 50)))
        pruned = result("rnp", seed, (acc, 20), (acc + 2, 2), seconds=5.0 * seed, **before)
        add("defence", attack, {"defence": "rnp"}, pruned)
        add("defence", attack, {"defence": "ibau"}, None if seed == 2 else result("ibau", 1, (88, 1), **before))
    for point, content in zip(points, results, strict=True):
        if content is not None:
            folder = Path(point.experiment.output)
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps(content))
    stages = {"attack": StageConfig(), "defence": StageConfig(after="attack")}
    return Sweep(tmp_path / "sweep.yaml", SweepConfig(str(tmp_path), stages), tuple(points))


def test_a_row_per_point_kind_task_and_seed(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    collect.write(sweep, collect.table(sweep))
    told = capsys.readouterr().out
    assert "5 of 6 points" in told and "missing defence defence5 (trigger=badnets seed=2 defence=ibau)" in told
    parquet, text = (
        read(sweep.folder / f"results.{kind}") for read, kind in ((pd.read_parquet, "parquet"), (pd.read_csv, "csv"))
    )
    assert len(parquet) == len(text) == 8 and list(parquet) == list(text)
    oracle = parquet[(parquet["key"] == "defence1") & (parquet["chosen_by"] == "oracle")].iloc[0]
    assert (oracle["kind"], oracle["acc"], oracle["asr"], oracle["n_triggered"]) == ("rnp", 82.0, 4.0, 50)
    assert oracle["der"] == pytest.approx(100 * (0.96 - 0.08 + 1) / 2)
    assert parquet["state"].tolist().count("missing") == 1


def test_labels_of_several_types_fit_one_column(sweep: Sweep) -> None:
    mixed = [1, "all", None, 2.5, True, "x"]
    points = tuple(
        Point(p.stage, p.key, p.experiment, {"a.b": v}, p.parent, 0, ())
        for p, v in zip(sweep.points, mixed, strict=True)
    )
    mixed_sweep = Sweep(sweep.path, sweep.config, points)
    collect.write(mixed_sweep, collect.table(mixed_sweep))
    labels = pd.read_parquet(sweep.folder / "results.parquet").drop_duplicates("key")["a.b"].tolist()
    assert labels[:2] == ["1", "all"] and labels[3:] == ["2.5", "True", "x"]


def test_the_leaderboard_is_mean_and_spread_over_seeds(sweep: Sweep) -> None:
    board = report.leaderboard(sweep, collect.table(sweep))
    assert board["kind"].tolist() == ["ibau", "rnp", "backdoored"]  # by ASR
    rnp = board[board["kind"] == "rnp"].iloc[0]
    assert (rnp["acc_defender"], rnp["n_defender"], rnp["n_oracle"]) == (82.0, 2, 2)
    assert rnp["acc_defender_std"] == pytest.approx(math.sqrt(8))
    assert (rnp["acc_oracle"], rnp["asr_oracle"]) == (84.0, 4.0)
    assert rnp["device_seconds"] == 7.5  # each point once, whatever its rows
    ibau = board[board["kind"] == "ibau"].iloc[0]
    assert ibau["n_defender"] == 1 and math.isnan(ibau["acc_defender_std"]) and ibau["n_oracle"] == 0


def test_a_terminal_is_not_flooded_by_what_is_missing(
    sweep: Sweep, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for point in sweep.points[1:4]:
        Path(point.experiment.output, "result.json").unlink()
    lacking = [point.key for point in sweep.points if not sweep.is_done(point)]
    assert len(lacking) == 4
    for module in (collect, report):
        monkeypatch.setattr(module, "MOST_TOLD", 1)
        capsys.readouterr()
        module.write(sweep, collect.table(sweep))
        told = capsys.readouterr().out
        assert [key for key in lacking if key in told] == lacking[:1] and "and 3 more: " in told
    text = (sweep.folder / "leaderboard.md").read_text()
    assert all(f"`{key}`" in text for key in lacking)


def test_the_report_lists_what_is_missing(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    report.write(sweep, collect.table(sweep))
    text = (sweep.folder / "leaderboard.md").read_text()
    assert text.strip() in f"# sweep\n\n{capsys.readouterr().out}"[: len(text)]
    assert "| badnets | rnp | rnp | t | 82.0 ± 2.8 | 40.0 ± 0.0 |" in text
    assert "84.0 ± 2.8 | 4.0 ± 0.0 | 8 |" in text
    assert "Missing: 1 of 6 points\n\n- defence `defence5` trigger=badnets seed=2 defence=ibau" in text
    assert len(pd.read_csv(sweep.folder / "leaderboard.csv")) == 3
    svg = (sweep.folder / "tradeoff.svg").read_text()
    assert all(
        f"<!-- {label} -->" in svg for label in ("ASR (%)", "ACC (%)", "ibau", "rnp", "rnp (oracle)", "backdoored")
    )


def retuned(sweep: Sweep, *points: tuple[Point, int]) -> Sweep:
    """With a point of method reactivate after each of these, which finds so many of 50 after re-tuning."""
    more = []
    for number, (parent, asr) in enumerate(points):
        own = {"acc_retuned": (90, 100), "asr_retuned": (asr, 50), "asr_retuned_clean": (1, 50)}
        content = result("rnp", 1, (80, 20))
        content["rows"][0] |= {name: {"correct": correct, "n": n} for name, (correct, n) in own.items()}
        key = f"again{number}"
        labels = {**parent.labels, "again.reactivate.num_poisoned": number}
        more.append(Point("again", key, Experiment("reactivate", str(sweep.folder / "points" / key), options={}),
                          labels, parent, 0, ()))  # fmt: skip
        (sweep.folder / "points" / key).mkdir()
        (sweep.folder / "points" / key / "result.json").write_text(json.dumps(content))
    stages = {**sweep.config.stages, "again": StageConfig(after="defence")}
    return Sweep(sweep.path, SweepConfig(str(sweep.folder), stages), (*sweep.points, *more))


def test_re_tuning_stands_in_the_line_of_its_defence(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    again = retuned(sweep, (sweep.points[1], 40))
    rows = collect.table(again)
    own = rows[rows["key"] == sweep.points[1].key]
    assert own.loc[own["chosen_by"] == "defender", ["acc_retuned", "asr_retuned"]].values.tolist() == [[90.0, 80.0]]
    assert own.loc[own["chosen_by"] == "oracle", "asr_retuned"].isna().all()
    collect.write(again, rows)
    report.write(again, rows)
    board = pd.read_csv(again.folder / "leaderboard.csv")
    assert list(board["stage"]) == ["defence", "defence", "attack"]
    rnp = board[board["kind"] == "rnp"].iloc[0]
    assert (rnp["asr_retuned_defender"], rnp["asr_retuned_clean_defender"], rnp["acc_defender"]) == (80.0, 2.0, 82.0)
    text = (again.folder / "leaderboard.md").read_text()
    assert "| ACC re-tuned | ASR re-tuned | q = 0 | oracle ACC |" in text and "| 90.0 | 80.0 | 2.0 |" in text


def test_several_re_tunings_of_one_model_have_lines_of_their_own(sweep: Sweep) -> None:
    again = retuned(sweep, (sweep.points[1], 40), (sweep.points[1], 45))
    board = report.leaderboard(again, collect.table(again))
    own = board[board["stage"] == "again"]
    assert sorted(own["asr_retuned_defender"]) == [80.0, 90.0]
    assert board.loc[board["stage"] == "defence", "asr_retuned_defender"].isna().all()


def test_a_sweep_without_results_reports_too(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    for file in sweep.folder.glob("points/*/result.json"):
        file.unlink()
    report.write(sweep, collect.table(sweep))
    told = capsys.readouterr().out
    assert "No point has counted anything yet" in told and "Missing: 6 of 6 points" in told


def detected(truth: str, score: float | None, detector: str = "decree", flags: str = "below") -> dict[str, Any]:
    """A detector's row."""
    own = {"kind": "detector", "task": "t", "seed": 1, "detector": detector, "quantity": "PL1", "flags": flags}
    return {**own, "score": score, "low": score, "high": score, "bound": 0.1, "verdict": None, "truth": truth}


def add_detections(sweep: Sweep, *rows: dict[str, Any]) -> None:
    """A row for each of the first points, beside what they counted."""
    for point, row in zip(sweep.points, rows, strict=False):
        file = sweep.run_folder(point) / "result.json"
        if file.exists():
            content = json.loads(file.read_text())
            file.write_text(json.dumps(content | {"rows": [*content["rows"], row]}))


def test_detectors_are_rated_over_the_models_that_they_saw(sweep: Sweep) -> None:
    before = report.leaderboard(sweep, collect.table(sweep))
    scores = (("clean", 0.2), ("backdoored", 0.05), ("backdoored", 0.15), ("clean", 0.12), ("defended", 0.01))
    add_detections(sweep, *(detected(*pair) for pair in scores))
    rows = collect.table(sweep)
    collect.write(sweep, rows)
    report.write(sweep, rows)
    text = (sweep.folder / "leaderboard.md").read_text()
    assert "| decree: PL1 | 0.750 | 1 of 2 | 2 of 2 | 0 |" in text  # 3 of 4 pairs in order
    pd.testing.assert_frame_equal(before, report.leaderboard(sweep, rows))
    parquet = pd.read_parquet(sweep.folder / "results.parquet").query("kind == 'detector'")
    assert parquet["score"].tolist() == [0.2, 0.05, 0.15, 0.12, 0.01]
    assert parquet["verdict"].tolist() == ["clean", "backdoored", "clean", "clean", "backdoored"]


def test_each_detector_is_rated_by_itself_and_none_found_is_told(sweep: Sweep) -> None:
    add_detections(
        sweep, detected("clean", None), detected("backdoored", 0.05), detected("clean", 3, "nc", "above"),
        detected("backdoored", 5.5, "nc", "above"),
    )  # fmt: skip
    report.write(sweep, collect.table(sweep))
    text = (sweep.folder / "leaderboard.md").read_text()
    assert "| decree: PL1 | – | 1 of 1 | 0 of 0 | 1 |" in text
    assert "| nc: PL1 | 1.000 | 1 of 1 | 0 of 1 | 0 |" in text


WRONG = ["{", "[]", '{"rows": [{"kind": "x"}]}', '{"rows": 3}', '{"wall_seconds": -1}', '{"seed": 1, "seed": 2}']


@pytest.mark.parametrize("content", WRONG)
def test_a_damaged_result_among_good_ones_is_named_and_left_out(
    sweep: Sweep, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (sweep.run_folder(sweep.points[0]) / "result.json").write_text(content)
    rows = collect.table(sweep)
    assert rows["state"].tolist().count("damaged") == 1 and rows["kind"].notna().sum() == 6
    assert collect.write(sweep, rows) == 1
    told = capsys.readouterr().out
    assert "4 of 6 points" in told
    assert re.search(r"damaged attack attack0 .*result\.json: .*delete it and resubmit", told)
    report.write(sweep, rows)
    assert "result.json: " in (sweep.folder / "leaderboard.md").read_text()


@pytest.mark.parametrize("content", WRONG)
def test_damaged_results_alone_are_an_error(sweep: Sweep, content: str) -> None:
    for file in sweep.folder.glob("points/*/result.json"):
        file.write_text(content)
    with pytest.raises(UserError, match=r"result\.json: .*delete it and resubmit"):
        collect.table(sweep)


def test_names_from_results_do_nothing_in_markdown_csv_and_plot(sweep: Sweep) -> None:
    name = '=HYPERLINK("http://x")|<img src=x>$\\frac$'
    file = sweep.run_folder(sweep.points[0]) / "result.json"
    content = json.loads(file.read_text())
    content["rows"][0] |= {"kind": name, "task": "-1+2"}
    file.write_text(json.dumps(content))
    rows = collect.table(sweep)
    collect.write(sweep, rows)
    report.write(sweep, rows)
    text = (sweep.folder / "leaderboard.md").read_text()
    assert "<img" not in text and "http://" not in text and "\\|" in text
    for table in ("results.csv", "leaderboard.csv"):
        found = pd.read_csv(sweep.folder / table, dtype=str)
        assert "'" + name in found["kind"].tolist() and "'-1+2" in found["task"].tolist()
    assert pd.read_parquet(sweep.folder / "results.parquet")["kind"].tolist()[0] == name


def expecting(sweep: Sweep, *expectations: Expectation) -> Sweep:
    return replace(sweep, config=replace(sweep.config, expect=expectations))


@pytest.mark.parametrize(
    ("published", "tolerance", "verdict"),
    [(82.0, 0.0, "PASS"), (80.0, 2.0, "PASS"), (80.0, 1.9, "FAIL"), (85, 3, "PASS")],
)
def test_published_figures_stand_beside_the_sweeps_own(
    sweep: Sweep, published: float, tolerance: float, verdict: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """RNP's ACC is 80 and 84 by the defender: 82 in the mean."""
    own = Expectation(at={"defence": "rnp"}, metric="acc", published=published, tolerance=tolerance, source="a | log")
    report.write(expecting(sweep, own), collect.table(sweep))
    told = capsys.readouterr().out
    line = f"| defence=rnp | acc | {published:g} | {tolerance:g} | 82.0 ± 2.8 | 2 of 2 |"
    line += f" {82 - published:+.1f} | {verdict} |"
    assert line in told and line in (sweep.folder / "leaderboard.md").read_text(encoding="utf-8")


def test_which_rows_are_compared(sweep: Sweep) -> None:
    records = collect.table(sweep).to_dict("records")
    labels = {point.key: point.labels for point in sweep.points}
    usual: dict[str, Any] = {"metric": "asr", "published": 0.0, "tolerance": 1.0, "source": "s"}

    def found(**given: Any) -> tuple[tuple[float, ...], int, str]:
        (outcome,) = outcomes([Expectation(**{**usual, **given})], labels, records)
        return outcome.values, outcome.points, outcome.verdict

    assert found(at={"defence": "rnp"}) == ((40.0, 40.0), 2, "FAIL")
    assert found(at={"defence": "rnp"}, published=99.0)[2] == "FAIL"
    assert found(at={"defence": "rnp"}, chosen_by="oracle") == ((4.0, 4.0), 2, "FAIL")
    assert found(at={"defence": "ibau"}) == ((2.0,), 2, "FAIL")
    assert found(at={"defence": "ibau", "seed": 1}, tolerance=2.0) == ((2.0,), 1, "PASS")
    assert found(at={"defence": "ibau", "attack.seed": 2}) == ((), 1, "NOT RUN")
    assert found(kind="backdoored") == ((100.0, 100.0), 6, "FAIL")
    assert found(at={"defence": "rnp"}, metric="acc_before", published=90.0) == ((90.0, 90.0), 2, "PASS")
