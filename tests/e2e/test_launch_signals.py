"""Signals to `dist-defend launch`, and its death: what becomes of the ranks. Real processes throughout."""

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_defend.cli import PREEMPTED
from tests.processes import await_none, kill_all, marked, new_mark
from tests.runs import make_experiment, metrics, options_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PATIENCE = 240.0

WATCHED = """
import pathlib, subprocess, sys
from dist_defend import launch
folder = pathlib.Path(sys.argv[1])
child = '''
import pathlib, signal, sys, time
seen = []
def note(number, frame):
    seen.append(signal.Signals(number).name)
    pathlib.Path(sys.argv[1]).write_text(" ".join(seen))
for number in (2, 15, 1, 10, 24):
    signal.signal(number, note)
pathlib.Path(sys.argv[1]).write_text("ready")
while len(seen) < int(sys.argv[3]):
    time.sleep(0.01)
sys.exit(int(sys.argv[2]))
'''
def run():
    arguments = [[str(folder / str(n)), str(n), sys.argv[2]] for n in (0, 3)]
    children = [subprocess.Popen([sys.executable, "-c", child, *own]) for own in arguments]
    return max([each.wait() for each in children])
sys.exit(launch._watch(run))
"""


@pytest.fixture
def mark() -> Iterator[dict[str, str]]:
    own = new_mark()
    yield own
    kill_all(own)


def await_(is_so: object, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    assert callable(is_so)
    while not is_so():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


@pytest.mark.parametrize("prefix", [[], ["nohup"]])
def test_every_signal_reaches_every_child_once(prefix: list[str], tmp_path: Path, mark: dict[str, str]) -> None:
    """But for one that this process was started to ignore."""
    log, names = tmp_path / "log", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU"]
    heard = [name for name in names if not prefix or name != "SIGHUP"]
    with log.open("wb") as out:
        command = [*prefix, sys.executable, "-c", WATCHED, str(tmp_path), str(len(heard))]
        process = subprocess.Popen(command, env=os.environ | mark, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def both_say(told: str) -> bool:
        return text(tmp_path / "0") == text(tmp_path / "3") == told

    await_(functools.partial(both_say, "ready"), process, log)
    for name in names:
        process.send_signal(getattr(signal, name))
        if name in heard[:-1]:
            so_far = " ".join(heard[: heard.index(name) + 1])
            await_(functools.partial(both_say, so_far), process, log)
    assert process.wait(PATIENCE) == 3, log.read_text()
    assert text(tmp_path / "0") == text(tmp_path / "3") == " ".join(heard)
    assert await_none(mark) == {}


class Launched:
    """`launch` with two ranks that have trained for a few steps."""

    def __init__(self, folder: Path, mark: dict[str, str], *options: str) -> None:
        options_ = options_of("simclr", folder / "inputs")
        options_["update"]["epochs"] = 100_000
        config = make_experiment(folder, "simclr", options_, trainer={"log_every": 1, "trackers": []})
        self.run, self.log = folder / "run", folder / "log"
        command = [sys.executable, "-m", "dist_defend", "launch", str(config), *options]
        with self.log.open("wb") as out:
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | mark
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        rows = self.run / "metrics.jsonl"
        await_(lambda: rows.exists() and rows.read_bytes().count(b"\n") >= 3, self.process, self.log)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SIGTERM", ("--ranks", "2", "--max-restarts", "3")),
        ("SIGUSR1", ("--ranks", "2")),
        ("SIGTERM", ("--ranks", "1")),
        ("SIGINT", ("--ranks", "2")),
        ("SIGHUP", ("--ranks", "2")),
        ("SIGXCPU", ("--ranks", "2")),
    ],
)
def test_ranks_save_before_launch_ends(
    name: str, options: tuple[str, ...], tmp_path: Path, mark: dict[str, str]
) -> None:
    """Status 75, or 130 after Ctrl-C, which restarts of failed ranks do not get in the way of."""
    launched = Launched(tmp_path, mark, *options)
    launched.process.send_signal(getattr(signal, name))
    expected = 130 if name == "SIGINT" else PREEMPTED
    assert launched.process.wait(PATIENCE) == expected, launched.log.read_text()
    assert await_none(mark) == {}
    told = launched.log.read_text()
    assert told.count("signal received: saved step") == 1 and "Traceback" not in told
    (*_, newest) = sorted((launched.run / "checkpoints").glob("step_*"))
    assert int(newest.name[5:]) == len(metrics(launched.run))


def test_no_rank_outlives_launch(tmp_path: Path, mark: dict[str, str]) -> None:
    launched = Launched(tmp_path, mark, "--ranks", "2")
    assert len(marked(mark)) >= 3
    launched.process.send_signal(signal.SIGKILL)
    assert launched.process.wait(PATIENCE) != 0
    assert await_none(mark) == {}


def test_a_rank_that_finds_a_fault_gives_launch_its_status(tmp_path: Path, mark: dict[str, str]) -> None:
    options = options_of("simclr", tmp_path / "inputs")
    options["data"]["path"] = str(tmp_path / "absent")
    config = make_experiment(tmp_path, "simclr", options)
    command = [sys.executable, "-m", "dist_defend", "launch", str(config), "--ranks", "2"]
    done = subprocess.run(command, env=os.environ | mark, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1 and "Traceback" not in done.stderr
    assert await_none(mark) == {}
