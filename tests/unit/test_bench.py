"""The bench: what it prints and writes, at sizes whose times mean nothing."""

import json
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_defend.bench import graphs, peaks, runner, scaling
from dist_defend.bench.runner import Case, Settings
from dist_defend.cli import main
from tests.capture.emulator import emulated_gpu

ROWS = {
    "data": ["plain-32px", "twoview-32px", "jpeg-224px"],
    "simclr": ["simclr"],
    "badencoder": ["badencoder", "badencoder-epoch"],
    "mimic": ["mimic", "mimic-after-phase1"],
    "mimic-mi": ["mimic-mi"],
    "head": ["head", "head-alone"],
    "ibau": ["ibau-outer-step", "ibau-round"],
    "rnp": ["rnp-default", "rnp-full-table"],
    "zskt": ["zskt", "zskt-sv", "zskt-sv-sr"],
    "graphs": [f"graphs-{x}" for x in ("ibau-inner", "ibau-outer", "rnp-unlearn", "rnp-recover", "rnp-defence")],
}
KEYS = {"name", "ratio", "ours_ms", "baseline_ms", "device", "dtype", "batch_size", "ranks", "images_per_second"}
CASE = Case("case", "small_cifar", 4, 8)


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_defend.bench.mimic.LEAKED_HOOKS", 3)
    monkeypatch.setattr("dist_defend.bench.mimic_mi.EPOCHS", 1)
    for setting in ("UNLEARNING_EPOCHS", "RECOVERING_EPOCHS", "TEST_SHARE", "EQUAL_SHARE"):
        monkeypatch.setattr(f"dist_defend.bench.rnp.{setting}", 1)
    arguments = ["bench", name, "--json", str(tmp_path / "rows.json"), "--repeats", "1"]
    monkeypatch.setattr("dist_defend.bench.zskt.STUDENT_STEPS", 1)
    monkeypatch.setattr("dist_defend.bench.zskt.TEACHER", "wrn_10_1")
    arguments += ["--batch-size", "4", "--num-images", "8"]
    others = dict.fromkeys(("ibau", "rnp", "graphs"), "small_resnet") | {"zskt": "wrn_10_1"}
    encoder = others.get(name, "small_cifar")
    arguments += [] if name == "data" else ["--encoder", encoder]
    assert main(arguments) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    printed = capsys.readouterr().out.splitlines()
    assert [row["name"] for row in rows] == ROWS[name]
    for row in rows:
        assert row.keys() >= KEYS
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ours_ms"])
        assert min(row["ratio"], row["ours_ms"], row["batch_size"]) > 0
        assert (row["dtype"], row["ranks"]) == ("float32", 1)
        assert [line for line in printed if line.startswith(f"{row['name']}: {row['ratio']:.2f}x")]
        if name != "data":
            assert row["encoder"] == encoder and row["note"]
            assert row["min_ratio"] <= row["ratio"] <= row["max_ratio"]
    for row in (row for row in rows if "flop" in row):
        duration = row["ours_ms"] / 1e3
        assert row["matrix_share"] == pytest.approx(row["flop"] / duration / row["peak_flop"])
        assert row["copy_share"] == pytest.approx(row["bytes"] / duration / row["peak_bytes"])
        assert row["operators"] > 20 and "no GPU here" in row["note"]


def test_scaling_compares_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With runs that take no time but tell their speed: 10 images a second for each image in a rank's batch."""
    started: list[tuple[int, int, int]] = []

    def start(self: scaling._Runs, output: Path, ranks: int, batch: int, device: int = 0) -> "subprocess.Popen[bytes]":
        started.append((ranks, batch, device))
        output.mkdir(parents=True)
        speeds = [1.0, 1.0, 10.0 * batch / ranks, 10.0 * batch / ranks]  # the first two warm up
        rows = [{"stage": self.method, "images_per_second": speed} for speed in speeds]
        (output / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return subprocess.Popen(["sleep", "0.1" if ranks == 2 else "0.01"])

    monkeypatch.setattr(scaling._Runs, "_start", start)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    arguments = ["--json", str(tmp_path / "rows.json"), "--repeats", "2", "--batch-size", "4", "--num-images", "16"]
    assert main(["bench", "scaling", "--method", "classifier", *arguments]) == 0
    strong, weak, points = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in (strong, weak, points)] == [
        f"scaling-classifier-{x}" for x in ("strong", "weak", "points")
    ]
    assert strong["images_per_second"] == {"ours": 40.0, "baseline": 80.0}  # 8 images over two ranks, or on one
    assert weak["images_per_second"] == {"ours": 40.0, "baseline": 40.0}  # 4 on each rank, or on the only one
    assert (strong["ratio"], weak["ratio"], points["ratio"] > 2) == (0.5, 1.0, True)
    assert {(row["ranks"], row["batch_size"], row["encoder"]) for row in (strong, weak, points)} == {
        (2, 8, "small_resnet")
    }
    each = [(1, 8, 0), (2, 8, 0), (2, 8, 0), (1, 4, 0)] * 2
    assert started == each + [(1, 8, 0), (1, 8, 1), (2, 8, 0), (2, 8, 0)] * 2


def test_scaling_says_what_a_run_that_failed_said(tmp_path: Path) -> None:
    runs = scaling._Runs(tmp_path, "simclr", {"data": {"path": "nowhere"}}, 1)
    with pytest.raises(RuntimeError, match="nowhere"):
        runs.images_per_second(1, 4)


def test_default_cases_name_both_encoders() -> None:
    defaults = (("", "small_cifar", 256, 2048), ("-resnet18", "resnet18_cifar", 64, 192))
    assert [(c.name, c.encoder, c.batch_size) for c in runner.cases(Settings(), "x", *defaults)] == [
        ("x", "small_cifar", 256),
        ("x-resnet18", "resnet18_cifar", 64),
    ]
    (only,) = runner.cases(Settings("resnet34_cifar", 7), "x", *defaults)
    assert only == Case("x", "resnet34_cifar", 7, 2048)


def test_sides_take_turns_and_the_median_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    seconds = {"baseline": iter([9.0, 4.0, 8.0, 6.0]), "ours": iter([9.0, 2.0, 1.0, 3.0])}
    clock = [0.0]

    def run(side: str) -> None:
        order.append(side)
        clock[0] += next(seconds[side])

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    sides = (lambda: run("baseline"), lambda: run("ours"))
    row = runner.compare(CASE, *sides, Settings(repeats=3), images=10, note="", heads=2)
    assert order == ["baseline", "ours"] * 4
    # The first pair is left out; then 4 / 1, 8 / 0.5 and 6 / 1.5 seconds, ours halved for its two heads.
    assert (row["ratio"], row["min_ratio"], row["max_ratio"]) == (4.0, 4.0, 16.0)
    assert (row["baseline_ms"], row["ours_ms"], row["images_per_second"]) == (6000.0, 1000.0, 5.0)


def test_sides_that_differ_are_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    runner.show_equal("case", lambda: 2.0, lambda: 2.0001)
    assert "case: loss 2 as published" in capsys.readouterr().out
    for ours in (2.001, float("nan")):
        with pytest.raises(RuntimeError, match="do not compute the same"):
            runner.show_equal("case", lambda: 2.0, partial(float, ours))


def test_equality_is_shown_without_tf32_and_times_are_taken_as_torch_has_it() -> None:
    def allowed(told: list[tuple[bool, bool]]) -> float:
        told.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return 1.0

    shown: list[tuple[bool, bool]] = []
    timed: list[tuple[bool, bool]] = []
    runner.show_equal("case", lambda: allowed(shown), lambda: allowed(shown))
    sides = (lambda: allowed(timed), lambda: allowed(timed))
    runner.compare(CASE, *sides, Settings(repeats=1), images=1, note="")
    assert set(shown) == {(False, False)} and set(timed) == {(True, False)}


def test_rows_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(settings: Settings) -> Iterator[dict[str, Any]]:
        yield runner.compare(CASE, lambda: None, lambda: None, settings, images=1, note="")
        raise RuntimeError("the second row's baseline broke")

    monkeypatch.setattr("dist_defend.bench.mimic.rows", rows)
    path = tmp_path / "rows.json"
    assert main(["bench", "mimic", "--repeats", "1", "--json", str(path)]) == 1
    assert [row["name"] for row in json.loads(path.read_text())] == ["case"]


def test_an_update_is_timed_against_its_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One side's updates are captured, each once; with TF32 and, to show that both are equal, without."""
    monkeypatch.setattr(graphs, "can_capture", lambda device: True)
    case, ranks = Case("case", "small_resnet", 4, 8), runner.start()
    with emulated_gpu() as captured:
        both = [graphs._ibau(case, ranks, tmp_path / graph, graph) for graph in graphs._modes()]
        assert not captured
        found = list(graphs._compare(case, ranks, peaks.Peaks(1e12, 1e12), Settings(repeats=1), *both))
        assert len(captured) == 4 and all(graph.kernels > 20 for graph in captured)
    assert [row["name"] for row in found] == ["graphs-ibau-inner", "graphs-ibau-outer"]
    assert all("eager calls against replays" in row["note"] for row in found)


def test_work_of_an_update() -> None:
    """A product of (2, 3) with (3, 4), read and written once; a view and what it is of count once."""
    left, right = torch.ones(2, 3), torch.ones(4, 3)
    work = peaks.count(lambda: torch.mm(left, right.t()).add_(1.0))
    assert work == (2 * 2 * 3 * 4, 4 * ((6 + 12 + 8) + (8 + 8)), 2)
    assert work.shares(peaks.Peaks(flop=96.0, bytes=336.0), 0.5) == {"matrix_share": 1.0, "copy_share": 1.0}


def test_peaks_are_what_is_done_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "_SIDE", {"cpu": 10})
    monkeypatch.setattr(peaks, "_BYTES", {"cpu": 1000})
    monkeypatch.setattr(peaks, "seconds", lambda run: 2.0)
    found = peaks.measure(torch.device("cpu"))
    assert found == (peaks._CALLS * 2 * 10**3 / 2, peaks._CALLS * 2 * 1000 / 2)
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simclr", "--json", "nowhere/rows.json"], "folder nowhere does not exist"),
        (["data", "--encoder", "small_cifar"], "--encoder"),
        (["mimic", "--method", "mimic"], "only bench scaling reads it"),
        (["mimic", "--encoder", "resnet19_cifar"], "resnet18_cifar"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["simclr", "--repeats", "0"], ["nothing"]])
def test_bad_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2
