"""Sweeps on this machine as real processes: signals, death, the lock, and points that share a process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_defend.cli import main
from dist_defend.sweep import several
from dist_defend.sweep.grid import Sweep, load_sweep
from tests.processes import await_none, kill_all, marked, new_mark
from tests.runs import make_experiment, metrics, options_of, untimed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PATIENCE = 240.0
LONG = 100_000  # epochs


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    own = new_mark()
    yield own
    kill_all(own)


def experiment(folder: Path, method: str = "simclr", **changes: Any) -> str:
    options = options_of(method, folder / "inputs" / method)
    return str(make_experiment(folder, method, options, **changes))


def sweep_file(folder: Path, content: dict[str, Any], name: str = "sweep") -> str:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"output": str(folder / name), **content}))
    return str(file)


class Running:
    """`sweep submit --local` as a process of its own."""

    def __init__(self, file: str, mark: dict[str, str], places: int) -> None:
        self.sweep = load_sweep(file)
        self.log = Path(f"{file}.log")
        command = [sys.executable, "-m", "dist_defend", "sweep", "submit", file, "--local", f"-j{places}"]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, env=os.environ | mark, stdout=out, stderr=out)

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not is_so():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def trains(self, number: int) -> bool:
        rows = self.sweep.run_folder(self.sweep.points[number]) / "metrics.jsonl"
        return rows.exists() and rows.read_bytes().count(b"\n") >= 2


def has_saved(sweep: Sweep, number: int) -> bool:
    run = sweep.run_folder(sweep.points[number])
    newest = sorted((run / "checkpoints").glob("step_*"))[-1:]
    return bool(newest) and int(newest[0].name[5:]) == len(metrics(run))


@pytest.mark.parametrize(
    ("name", "places", "status"), [("SIGTERM", 2, 75), ("SIGINT", 1, 130), ("SIGHUP", 1, 75), ("SIGKILL", 2, -9)]
)
def test_points_end_with_their_sweep(
    name: str, places: int, status: int, tmp_path: Path, mark: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"config": experiment(tmp_path), "set": {"simclr.update.epochs": LONG}, "seeds": [1, 2]}
    running = Running(sweep_file(tmp_path, content), mark, places)
    running.wait_for(lambda: all(running.trains(number) for number in range(places)))
    file = str(running.sweep.path)
    for action in (["submit", file], ["resubmit", file, "--local"], ["cancel", file]):
        assert main(["sweep", *action]) == 2
        assert f"is in use by process {running.process.pid} on " in capsys.readouterr().err
    assert main(["sweep", "plan", file]) == 0 and len(marked(mark)) > places
    running.process.send_signal(getattr(signal, name))
    assert running.process.wait(PATIENCE) == status, running.log.read_text()
    assert await_none(mark) == {}
    if name != "SIGKILL":
        assert all(has_saved(running.sweep, number) for number in range(places))
        assert "`sweep resubmit --local` goes on" in running.log.read_text()
    assert main(["sweep", "cancel", file]) == 0  # the lock is free again


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_the_ranks_of_a_point_end_with_their_sweep(name: str, tmp_path: Path, mark: dict[str, str]) -> None:
    content = {"config": experiment(tmp_path), "set": {"simclr.update.epochs": LONG, "world_size": 2}}
    running = Running(sweep_file(tmp_path, content), mark, 1)
    running.wait_for(lambda: running.trains(0))
    assert len(marked(mark)) >= 4
    running.process.send_signal(getattr(signal, name))
    assert running.process.wait(PATIENCE) == (75 if name == "SIGTERM" else -9)
    assert await_none(mark) == {}
    assert name == "SIGKILL" or has_saved(running.sweep, 0)


def test_points_of_one_process_stop_together_and_go_on(tmp_path: Path, mark: dict[str, str]) -> None:
    """A fault, one that is stopped, one behind it; then the middle one is killed, and the last one has its turn."""
    config = experiment(tmp_path)
    absent = {"simclr.data.path": str(tmp_path / "absent")}
    explicit = [absent, {"simclr.update.epochs": LONG}, {"simclr.update.epochs": 1}]
    file = sweep_file(tmp_path, {"config": config, "explicit": explicit, "points_per_job": 3})
    running = Running(file, mark, 1)
    running.wait_for(lambda: running.trains(1))
    logs = [running.sweep.folder / "logs" / f"{point.key}.log" for point in running.sweep.points]
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(PATIENCE) == 75, running.log.read_text()
    assert await_none(mark) == {}
    assert has_saved(running.sweep, 1) and not logs[2].exists()
    assert [several.exit_status(log) for log in logs[:2]] == [2, 75]

    command = [sys.executable, "-m", "dist_defend", "sweep", "resubmit", file, "--local", "-j1"]
    with running.log.open("ab") as out:
        running.process = subprocess.Popen(command, env=os.environ | mark, stdout=out, stderr=out)
    running.wait_for(lambda: b"resumed at step" in logs[1].read_bytes())
    (together,) = (pid for pid, command in marked(mark).items() if "-m dist_defend several" in command)
    os.kill(together, signal.SIGKILL)
    assert running.process.wait(PATIENCE) == 1, running.log.read_text()
    done = [running.sweep.is_done(point) for point in running.sweep.points]
    assert done == [False, False, True]
    assert logs[1].read_text().endswith("local: exit -9\n") and several.exit_status(logs[0]) == 2
    assert running.log.read_text().count("exit 2, see") == 2


def numbers(sweep: Sweep, number: int) -> tuple[Any, ...]:
    """What a point computed: result without its costs and its folder (config_sha256), log without times, weights."""
    run = sweep.run_folder(sweep.points[number])
    costs = ("wall_seconds", "device_seconds", "work_seconds", "lives", "peak_memory_bytes", "config_sha256")
    result = {k: v for k, v in json.loads((run / "result.json").read_text()).items() if k not in costs}
    rows = untimed(run)
    weights = {file.name: file.read_bytes() for file in sorted((run / "model").glob("*.safetensors"))}
    return result, rows, weights


@pytest.mark.timeout(1100)
def test_points_of_one_process_equal_those_of_their_own(tmp_path: Path, mark: dict[str, str]) -> None:
    """Bit for bit, whatever ran before in the process: another precision, another method, another seed, a fault."""
    explicit = [
        {"config": experiment(tmp_path, "classifier"), "precision": "bf16"},
        {"config": experiment(tmp_path, "simclr"), "simclr.data.path": str(tmp_path / "absent")},
        {"config": experiment(tmp_path, "simclr"), "precision": "fp64", "seed": 3},
        {"config": experiment(tmp_path, "classifier"), "seed": 4},
    ]
    sweeps = []
    for together, chosen, places, status in ((4, explicit, 1, 1), (1, explicit[2:], 2, 0)):
        file = sweep_file(tmp_path, {"explicit": chosen, "points_per_job": together}, f"by{together}")
        running = Running(file, mark, places)
        assert running.process.wait(2 * PATIENCE) == status, running.log.read_text()
        sweeps.append(running.sweep)
    for number in (0, 1):
        shared, alone = numbers(sweeps[0], number + 2), numbers(sweeps[1], number)
        assert shared == alone and len(alone[1]) > 0 and len(alone[2]) > 0
    log = (sweeps[0].folder / "logs" / f"{sweeps[0].points[3].key}.log").read_text()
    assert log.count("finished") == 1 and log.endswith("points: exit 0\n")
    assert (sweeps[0].folder / "logs" / "local_0.log").read_text().count("begins") == 4
