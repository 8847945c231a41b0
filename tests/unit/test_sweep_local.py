"""Sweeps on this machine, with stand-ins for the experiments: a process that writes what it was given."""

import itertools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dist_defend.config import Experiment
from dist_defend.sweep import local, progress
from dist_defend.sweep.file import StageConfig, SweepConfig
from dist_defend.sweep.grid import Point, Sweep

PROGRAM = """
import json, os, pathlib, signal, sys, time
folder, seconds, status = pathlib.Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
folder.mkdir(parents=True, exist_ok=True)
started = time.monotonic()
(folder / "started").touch()
time.sleep(seconds)
seen = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
if status == 0:
    (folder / "result.json").write_text(json.dumps({"started": started, "ended": time.monotonic(), **seen}))
print("error: the reason")
sys.exit(status)
"""


def sweep_of(folder: Path, keys: list[str], parents: dict[str, str] | None = None) -> Sweep:
    points: dict[str, Point] = {}
    for root, key in enumerate(keys):
        experiment = Experiment("classifier", str(folder / "points" / key), options={})
        parent = points.get((parents or {}).get(key, ""))
        points[key] = Point("b" if parent else "a", key, experiment, {}, parent, root, ())
    stages = {"a": StageConfig(), "b": StageConfig(after="a")}
    (folder / "program.py").write_text(PROGRAM)
    return Sweep(folder / "sweep.yaml", SweepConfig(str(folder), stages), tuple(points.values()))


def run(sweep: Sweep, at_a_time: int | None, seconds: float = 0.0, statuses: dict[str, int] | None = None) -> int:
    def command(sweep: Sweep, point: Point) -> list[str]:
        program = [sys.executable, str(sweep.folder / "program.py"), str(sweep.run_folder(point))]
        return [*program, str(seconds), str((statuses or {}).get(point.key, 0))]

    return local.run(sweep, sweep.points, at_a_time, command)


def results(sweep: Sweep) -> dict[str, dict[str, Any]]:
    done = [point for point in sweep.points if sweep.is_done(point)]
    return {point.key: json.loads((sweep.run_folder(point) / "result.json").read_text()) for point in done}


@pytest.fixture(autouse=True)
def no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def most_at_once(sweep: Sweep) -> int:
    times: list[tuple[float, float]] = [(row["started"], row["ended"]) for row in results(sweep).values()]
    return max(sum(start <= moment < end for start, end in times) for moment, _ in times)


def test_so_many_at_a_time(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, list("abcdef"))
    assert run(sweep, 2, seconds=0.3) == 0
    assert len(results(sweep)) == 6 and most_at_once(sweep) == 2


def test_one_per_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7,GPU-8f")
    sweep = sweep_of(tmp_path, list("abcdefgh"))
    assert run(sweep, None, seconds=0.2) == 0
    devices: dict[str, list[tuple[float, float]]] = {}
    for row in results(sweep).values():
        devices.setdefault(row["CUDA_VISIBLE_DEVICES"], []).append((row["started"], row["ended"]))
    assert set(devices) == {"5", "7", "GPU-8f"}
    for times in devices.values():
        ordered = sorted(times)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ordered))


def test_without_gpus_the_cores_are_shared(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, ["a"])
    assert run(sweep, 2) == 0
    assert int(results(sweep)["a"]["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_what_comes_after_a_failed_point_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parents = {"b1": "a1", "b2": "a2", "c2": "b2"}
    sweep = sweep_of(tmp_path, ["a1", "a2", "b1", "b2", "c2"], parents)
    assert run(sweep, 4, statuses={"a2": 2}) == 1
    assert set(results(sweep)) == {"a1", "b1"}
    told = capsys.readouterr().out
    assert "a2 (a): exit 2" in told and "b2 (b): left out" in told and "c2 (b): left out" in told
    known, _ = progress.survey(sweep)
    assert {key: own.state for key, own in known.items()} == {
        "a1": "done", "a2": "failed", "b1": "done", "b2": "missing", "c2": "missing",
    }  # fmt: skip
    assert known["a2"].reason == "error: the reason"


def test_a_later_stage_starts_when_its_own_parent_is_done(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, ["a1", "a2", "b1"], {"b1": "a1"})
    assert run(sweep, 1, seconds=0.1) == 0
    rows = results(sweep)
    assert rows["a1"]["ended"] <= rows["b1"]["started"]


def test_a_signal_lets_the_points_save(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, list("abc"))

    def stop() -> None:
        while not all((sweep.run_folder(point) / "started").exists() for point in sweep.points[:2]):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert run(sweep, 2, seconds=60) == 75
    thread.join()
    logs = {file.stem: file.read_text() for file in (tmp_path / "logs").iterdir()}
    assert set(logs) == {"a", "b"} and all("local: exit 75" in text for text in logs.values())


def test_a_point_that_was_killed_has_no_end_in_its_log(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, ["a"])
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.log").write_text("step 3\n")
    known, _ = progress.survey(sweep)
    assert known["a"].state == "failed" and "killed, or still running" in known["a"].reason


def test_ranks_of_a_point(tmp_path: Path) -> None:
    point = Point("a", "0123456789ab", Experiment("simclr", "x", world_size=2, options={}), {}, None, 0, ())
    sweep = Sweep(tmp_path / "s.yaml", SweepConfig("out", {"a": StageConfig()}), (point,))
    command = local.command(sweep, point)
    assert command[:4] == [sys.executable, "-m", "dist_defend", "launch"]
    assert command[4:] == ["out/points/0123456789ab.yaml", "--ranks", "2"]
