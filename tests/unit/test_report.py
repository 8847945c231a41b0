"""The report says what the counts say, in one file that needs no other."""

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from dist_defend.cli import main
from dist_defend.errors import UserError
from dist_defend.report import plots, runs, tables


def row(kind: str, seed: int, acc: int, asr: int, asr_all: int, ra: int, task: str = "digits") -> dict[str, Any]:
    """Counts of 50 clean test images, 40 of them not of the target class."""
    counts = {"acc": (acc, 50), "asr": (asr, 40), "asr_all": (asr_all, 50), "ra": (ra, 40)}
    return {"run": "probe", "kind": kind, "task": task, "seed": seed} | {
        name: {"correct": correct, "n": n} for name, (correct, n) in counts.items()
    }


ROWS = [
    row("purified", 100, 42, 4, 12, 30),
    row("backdoored", 100, 44, 40, 50, 0),
    row("backdoored", 101, 46, 38, 47, 1),
    row("clean", 100, 45, 1, 11, 35),
    row("clean", 101, 40, 3, 12, 33),
]


def write_run(folder: Path, rows: list[dict[str, Any]] | None = None, **result: Any) -> Path:
    folder.mkdir(parents=True)
    base = {"name": folder.name, "method": "probe" if rows else "simclr", "seed": 100, "wall_seconds": 61.2}
    (folder / "result.json").write_text(json.dumps({**base, **({"rows": rows} if rows else {}), **result}))
    (folder / "config.yaml").write_text("probe:\n  tasks:\n    digits: {target_class: 1}\n")
    return folder


def write_story(parent: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """A pretraining run with a torn log, an unfinished run, and a probe run with features and pictures."""
    pretrain = write_run(parent / "clean", config_sha256="c0ffee" * 10, data={"train": "deadbeef" * 8})
    lines = [{"step": s, "stage": "simclr", "images_per_second": 9.0, "loss": 5.0 / s, "epoch": 0} for s in (1, 2, 3)]
    lines.append({"step": 3, "stage": "simclr", "epoch": 1, "knn_acc": 61.0})
    (pretrain / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "sta')
    (parent / "purified").mkdir()
    (parent / "purified/config.yaml").write_text("method: mimic\n")
    probe = write_run(parent / "probe", rows, targets={"digits": "one"})
    rng = np.random.default_rng(0)
    features: dict[str, np.ndarray] = {}
    for kind in ("clean", "backdoored"):
        for part in ("clean", "triggered"):
            features[f"{kind}/digits/{part}"] = rng.normal(size=(30, 6)).astype(np.float32)
        features[f"{kind}/digits/labels"] = np.arange(30) % 3
    save_file(features, probe / "features.safetensors")
    clean = rng.integers(0, 256, (8, 6, 6, 3), dtype=np.uint8)
    save_file({"digits/clean": clean, "digits/triggered": 255 - clean}, probe / "examples.safetensors")
    return parent


class Links(HTMLParser):
    """Everything on a page that could make a browser ask for something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.targets += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "srcset", "data")]


def test_percentages_mean_and_spread(tmp_path: Path) -> None:
    found, *_ = runs.find_runs([write_run(tmp_path / "probe", ROWS)])
    lines = tables.summarise(found)
    assert [line.kind for line in lines] == ["clean", "backdoored", "purified"]
    clean, backdoored, purified = lines
    assert clean.scores["acc"].mean == pytest.approx((90.0 + 80.0) / 2)
    assert clean.scores["acc"].std == pytest.approx(7.0710678)  # sqrt((5^2 + 5^2) / 1)
    assert str(clean.scores["acc"]) == "85.0 ± 7.1"
    assert backdoored.scores["asr"].mean == pytest.approx((100.0 + 95.0) / 2)
    assert backdoored.scores["asr_all"].mean == pytest.approx((100.0 + 94.0) / 2)
    assert str(purified.scores["ra"]) == "75.0"
    assert (clean.num_seeds, purified.num_seeds, clean.n_clean, clean.n_triggered) == (2, 1, 50, 40)
    assert clean.chance == pytest.approx(20.0)


def test_csv(tmp_path: Path) -> None:
    write_story(tmp_path / "demo")
    assert main(["report", str(tmp_path / "demo")]) == 0
    rows = list(csv.reader(io.StringIO((tmp_path / "demo/report.csv").read_text())))
    assert rows[0] == ["run", "kind", "task", "seed", "acc", "asr", "asr_all", "ra", "der", "n_clean", "n_triggered"]
    assert rows[1] == ["probe", "purified", "digits", "100", "84.0000", "10.0000", "24.0000", "75.0000", "", "50", "40"]
    assert len(rows) == 1 + len(ROWS)


def test_nothing_to_count_is_left_blank(tmp_path: Path) -> None:
    empty = row("clean", 1, 50, 0, 50, 0) | {"asr": {"correct": 0, "n": 0}, "ra": {"correct": 0, "n": 0}}
    found, *_ = runs.find_runs([write_run(tmp_path / "probe", [empty])])
    assert tables.to_csv(found).splitlines()[1] == "probe,clean,digits,1,100.0000,,100.0000,,,50,0"
    assert str(tables.summarise(found)[0].scores["asr"]) == "–"


def test_terminal_and_markdown_tell_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_story(tmp_path / "demo")
    main(["report", str(tmp_path / "demo")])
    printed = capsys.readouterr().out
    markdown = (tmp_path / "demo/report.md").read_text()
    cells = ["digits", "backdoored", "90.0 ± 2.8", "–", "97.5 ± 3.5", "–", "97.0 ± 4.2", "1.2 ± 1.8", "50 / 40", "2"]
    assert "| " + " | ".join(cells) + " |" in markdown
    assert cells in [re.split(r" {2,}", line) for line in printed.splitlines()]
    assert str(tmp_path / "demo/report.html") in printed
    for text in (printed, markdown):
        assert "clean: 1 unreadable line(s) of metrics.jsonl left out" in text
        assert f"{tmp_path / 'demo/purified'} is unfinished and left out" in text
    assert "c0ffeec0ffee" in markdown and "train deadbeef" in markdown


@pytest.mark.parametrize("embedding", ["pca", "tsne"])
def test_page_is_whole_and_needs_nothing_else(tmp_path: Path, embedding: str) -> None:
    write_story(tmp_path / "demo")
    main(["report", str(tmp_path / "demo"), "--embedding", embedding])
    page = (tmp_path / "demo/report.html").read_text()
    links = Links()
    links.feed(page)
    assert links.targets and all(target.startswith(("data:image/png;base64,", "#")) for target in links.targets)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", re.sub(r"data:image/png;base64,[\w+/=\s]+", "", page))
    assert not {"link", "iframe", "object"} & set(links.tags)
    assert links.tags.count("script") == 1 and page.count("<script>") == 1  # its own, which sorts tables
    assert links.tags.count("svg") == 2 + 2 + 1  # simclr's losses and evaluation, features of two kinds, ACC and ASR
    assert links.tags.count("img") == 1
    for heading in ("Before and after", "The trigger", "Features", "Training", "Runs"):
        assert f"<h2>{heading}</h2>" in page
    for text in (
        "target class “one”",
        "clean, of the target class",
        "90.0 ± 2.8",
        "attack success rate",
        "1 unreadable",
    ):
        assert text in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_page_without_features_pictures_or_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "lone", probe=None)
    assert main(["report", str(tmp_path / "lone"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/report.html").read_text()
    assert re.findall("<h2>(.+?)</h2>", page) == ["Runs"]
    assert "no probe, classifier or defence" in page and "no probe, classifier" in capsys.readouterr().out
    assert (tmp_path / "out/report.csv").read_text().count("\n") == 1
    assert not (tmp_path / "lone/report.html").exists()


def detected(score: float | None, verdict: str | None, **changes: Any) -> dict[str, Any]:
    """A detector's row."""
    own = {"run": "x", "kind": "detector", "task": "digits", "seed": 100, "detector": "decree", "quantity": "PL1"}
    told = {"score": score, "low": score, "high": score, "bound": 0.1, "flags": "below", "verdict": verdict}
    return {**own, **told, "truth": "backdoored", "note": "3 of 3 seeds found a mask", **changes}


def test_detectors_stand_in_page_markdown_terminal_and_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "decree", [detected(0.07, "backdoored", low=0.06666667, high=0.08)], method="decree")
    Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(run / "found.png")
    write_run(tmp_path / "none", [detected(None, None)], method="decree")
    write_run(tmp_path / "nc", [row("nc", 100, 45, 1, 11, 35), detected(3, "backdoored", flags="above")], method="nc")
    assert main(["report", str(tmp_path)]) == 0
    printed, markdown = capsys.readouterr().out, (tmp_path / "report.md").read_text()
    page = (tmp_path / "report.html").read_text()
    cells = ["decree", "decree: PL1", "0.07", "0.06667 to 0.08", "below 0.1", "backdoored", "backdoored"]
    assert "| " + " | ".join([*cells, "3 of 3 seeds found a mask"]) + " |" in markdown
    assert [*cells, "3 of 3 seeds found a mask"] in [re.split(r" {2,}", line) for line in printed.splitlines()]
    assert '<td data-label="range">0.06667 to 0.08</td>' in page and page.count('alt="masks and patterns') == 1
    assert "<h2>Detectors</h2>" in page and "no probe" not in page
    lines = (tmp_path / "report.csv").read_text().splitlines()
    assert lines[0].endswith(",n_clean,n_triggered,detector,score,low,high,verdict,truth")
    assert lines[1] == "decree,detector,digits,100,,,,,,,,decree,0.07,0.0666667,0.08,backdoored,backdoored"
    assert "nc,detector,digits,100,,,,,,,,decree,3,3,3,backdoored,backdoored" in lines
    assert "none,detector,digits,100,,,,,,,,decree,,,,,backdoored" in lines
    assert [line.kind for line in tables.summarise(runs.find_runs([tmp_path])[0])] == ["nc"]


@pytest.mark.parametrize(
    "changes",
    [{"low": 0.09}, {"truth": "unknown"}, {"low": None}, {"bound": None}, {"flags": "beside"}, {"seed": -1}],
)
def test_a_detectors_row_that_cannot_be_is_refused(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "decree", [detected(0.07, "backdoored", **changes)], method="decree")
    assert main(["report", str(run)]) == 2
    assert "result.json: not a result of dist-defend: it has a row 1 that" in capsys.readouterr().err


def test_names_from_files_are_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    run = write_run(tmp_path / "probe", [row(hostile, 1, 45, 1, 11, 35, task=hostile)], name=hostile)
    line = {"step": 1, "stage": hostile, "images_per_second": 1.0, f"loss{hostile}": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(line))
    main(["report", str(run)])
    links = Links()
    links.feed((run / "report.html").read_text())
    page = (run / "report.html").read_text()
    assert links.tags.count("script") == 1 and page.count("<script>") == 1 and "svg" in links.tags


@pytest.mark.parametrize(("correct", "is_broken"), [(14, True), (15, False)])
def test_accuracy_at_chance_is_called_broken(tmp_path: Path, correct: int, is_broken: bool) -> None:
    """Always answering the target scores 10 of 50; half as much again, 15, is the least that passes."""
    run = write_run(tmp_path / "probe", [row("clean", 1, correct, 1, 11, 35)])
    main(["report", str(run)])
    for name in ("report.html", "report.md"):
        assert ("clean accuracy" in (run / name).read_text()) == is_broken
    assert ('class="broken"' in (run / "report.html").read_text()) == is_broken


def test_two_probe_runs_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name / "probe", [row("clean", 1, 45, 1, 11, 35)])
    found, *_ = runs.find_runs([tmp_path])
    assert [line.run for line in tables.summarise(found)] == [str(tmp_path / "a/probe"), str(tmp_path / "b/probe")]
    again, *_ = runs.find_runs([tmp_path / "a", tmp_path / "a/probe", tmp_path / "b"])
    assert len(again) == 2
    assert tables.cells(tables.summarise(found))[0][1] == "run"
    main(["report", str(tmp_path)])
    assert f"clean <span>{tmp_path / 'a/probe'}</span>" in (tmp_path / "report.html").read_text()


def write_defence(parent: Path) -> Path:
    """A backdoored classifier, and RNP's run on it with a sweep over two thresholds."""
    write_run(parent / "backdoored", [row("backdoored", 100, 45, 40, 50, 0)], method="classifier")
    rows = [row("rnp (oracle)", 100, 40, 0, 1, 36), row("rnp", 100, 43, 2, 12, 30)]
    before = {"acc_before": 90.0, "asr_before": 100.0}
    run = write_run(parent / "rnp", rows, method="rnp", metrics=before)
    counts = {"acc": {"correct": 45, "n": 50}, "asr": {"correct": 40, "n": 40}, "acc_defence": {"correct": 9, "n": 10}}
    stops = [
        {"threshold": None, "pruned": 0, "chosen": False, "oracle": False, **counts},
        {"threshold": 0.0, "pruned": 3, "chosen": False, "oracle": False, "acc_defence": counts["acc_defence"]},
        {"threshold": 0.05, "pruned": 7, "chosen": True, "oracle": False, **counts},
        {"threshold": 0.1, "pruned": 9, "chosen": False, "oracle": True, **counts},
    ]
    (run / "sweep.json").write_text(json.dumps(stops))
    return parent


@pytest.mark.parametrize(
    ("acc", "asr", "expected"),
    [(45, 0, 100.0), (50, 0, 100.0), (40, 0, 95.0), (45, 20, 75.0), (40, 40, 45.0), (47, 40, 50.0)],
)
def test_a_gain_of_accuracy_is_neither_rewarded_nor_punished(
    acc: int, asr: int, expected: float, tmp_path: Path
) -> None:
    """DER = (max(0, fall of ASR) - max(0, fall of ACC) + 1) / 2, as BackdoorBench documents it; 90 and 100 % before."""
    before = {"acc_before": 90.0, "asr_before": 100.0}
    run = write_run(tmp_path / "rnp", [row("rnp", 1, acc, asr, asr, 0)], metrics=before)
    (line,) = tables.summarise(runs.find_runs([run])[0])
    assert line.scores["der"].mean == pytest.approx(expected)


def test_a_defence_is_rated_against_what_was_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, *_ = runs.find_runs([write_defence(tmp_path)])
    lines = tables.summarise(found)
    assert [(line.run, line.kind) for line in lines] == [
        ("backdoored", "backdoored"), ("rnp", "rnp"), ("rnp", "rnp (oracle)")
    ]  # fmt: skip
    assert [str(line.scores["der"]) for line in lines] == [
        "–",
        "95.5",
        "95.0",
    ]  # (0.95 - 0.04 + 1) / 2, (1 - 0.1 + 1) / 2
    assert tables.cells(lines)[0][:4] == ["task", "run", "model", "ACC %"] and "DER %" in tables.cells(lines)[0]
    assert tables.to_csv(found).splitlines()[1:] == [
        "backdoored,backdoored,digits,100,90.0000,100.0000,100.0000,0.0000,,50,40",
        "rnp,rnp (oracle),digits,100,80.0000,0.0000,2.0000,90.0000,95.0000,50,40",
        "rnp,rnp,digits,100,86.0000,5.0000,24.0000,75.0000,95.5000,50,40",
    ]
    assert main(["report", str(tmp_path)]) == 0
    assert "defence effectiveness rating" in (tmp_path / "report.html").read_text()
    assert "sample standard deviation" not in (tmp_path / "report.md").read_text()  # one seed each
    assert "DER %" in capsys.readouterr().out


def test_without_a_defence_there_is_no_rating(tmp_path: Path) -> None:
    write_story(tmp_path / "demo")
    main(["report", str(tmp_path / "demo")])
    for name in ("report.html", "report.md"):
        text = (tmp_path / "demo" / name).read_text()
        assert "DER" not in text and "sample standard deviation" in text


def test_the_sweep_is_drawn_with_its_choice(tmp_path: Path) -> None:
    write_defence(tmp_path)
    main(["report", str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Pruning</h2>" in page and "<b>rnp</b> <span>7 pruned</span>" in page
    stops = runs.find_runs([tmp_path / "rnp"])[0][0].sweep
    svg = plots.sweep(stops, "a").svg
    for text in (">ACC<", ">ASR<", ">ACC, defender's images<", ">threshold<"):
        assert text in svg
    assert svg.count("stroke-dasharray: 0.8,1.32") == 1 and plots.sweep(stops[:3], "a").svg.count("0.8,1.32") == 0
    by_number = plots.sweep([stop | {"threshold": None} for stop in stops], "b").svg
    assert ">pruned neurons<" in by_number and ">threshold<" not in by_number


@pytest.mark.parametrize("content", ["{", "[1]", '[{"pruned": 1}]', '[{"pruned": 1, "threshold": 0, "acc": {"n": 1}}]'])
def test_a_damaged_sweep_is_one_line(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_defence(tmp_path)
    (tmp_path / "rnp/sweep.json").write_text(content)
    assert main(["report", str(tmp_path / "rnp")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sweep.json: damaged" in line
    assert main(["report", str(tmp_path)]) == 1  # the other run is reported
    out, err = capsys.readouterr()
    assert err == "" and "note: left out: " in out and "sweep.json: damaged" in out
    page = (tmp_path / "report.md").read_text()
    assert "| digits | backdoored |" in page and "sweep.json: damaged" in page and "| rnp |" not in page


def test_runs_are_listed_in_the_order_they_started(tmp_path: Path) -> None:
    for name, time in (("a", "2026-03-01"), ("b", "2026-02-01"), ("c", "2026-01-01")):
        write_run(tmp_path / name)
        (tmp_path / name / "env.json").write_text(json.dumps({"time": time}))
    assert [run.label for run in runs.find_runs([tmp_path])[0]] == ["c", "b", "a"]


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report", str(tmp_path / "absent")]) == 2
    run = write_run(tmp_path / "probe", ROWS)
    (run / "features.safetensors").write_bytes(b"not a tensor")
    assert main(["report", str(run)]) == 2
    (run / "result.json").write_text('{"rows": [{"kind": "clean"}]}')
    assert main(["report", str(run)]) == 2
    (run / "result.json").write_text("{")
    assert main(["report", str(run)]) == 2
    lines = capsys.readouterr().err.splitlines()
    wanted = [
        "no finished run",
        "no such folder",
        "features.safetensors: damaged",
        "result.json: not a",
        "result.json: not a",
    ]
    assert len(lines) == 5
    for line, text in zip(lines, wanted, strict=True):
        assert line.startswith("error: ") and text in line


def test_a_report_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    run = write_run(tmp_path / "probe", ROWS)
    (tmp_path / "file").write_text("")
    assert main(["report", str(run), "--out", str(tmp_path / "file")]) == 2


def test_long_curves_are_averaged_and_gaps_left_out() -> None:
    rows = [
        {"step": s, "stage": "a", "epoch": 0, "aux": 1.0, "loss": float(s), "gap": float("nan")} for s in range(600)
    ]
    series = plots.scalars(rows)
    assert list(series) == ["loss", "aux"]
    steps, values = series["loss"]
    assert len(steps) == 300
    np.testing.assert_allclose(values[:2], [0.5, 2.5])
    np.testing.assert_allclose(steps, values)


def test_image_grid_shows_the_pixels() -> None:
    above = np.arange(2 * 2 * 3 * 3, dtype=np.uint8).reshape(2, 2, 3, 3)
    uri = plots.image_grid([above, 255 - above], gap=1)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))
    assert sheet.shape == (5, 7, 4)
    np.testing.assert_array_equal(sheet[:2, 4:, :3], above[1])
    np.testing.assert_array_equal(sheet[3:, :3, :3], 255 - above[0])
    assert (sheet[2, :, 3] == 0).all() and (sheet[:, 3, 3] == 0).all() and (sheet[:2, :3, 3] == 255).all()


def test_feature_map_states_its_share_of_the_variance() -> None:
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(40, 2)) @ rng.normal(size=(2, 8))
    assert plots.feature_map(plane[:20], plane[20:], None, "pca", "a").title == "100% of the variance"
    cube = rng.permutation(np.concatenate([np.eye(4), -np.eye(4)]))  # the same variance in four directions
    assert plots.feature_map(cube[:4], cube[4:], None, "pca", "b").title == "50% of the variance"
    same = np.ones((10, 4))
    assert plots.feature_map(same, same, None, "pca", "c").title == "0% of the variance"


def test_damaged_features_raise(tmp_path: Path) -> None:
    run = write_run(tmp_path / "probe", ROWS)
    (run / "examples.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match=r"examples\.safetensors: damaged"):
        _ = runs.find_runs([run])[0][0].examples
