"""Signals: what Ctrl-C, a scheduler or a terminal that closes asks of a run, and what its folder then holds."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dist_defend.engine import checkpoint
from dist_defend.engine.signals import INTERRUPTED, PREEMPTED
from tests.e2e.test_kill import _server, await_lines, end, experiment, finish, live, outcome, signal_all, start
from tests.runs import make_experiment, metrics, options_of


def told(config: Path) -> str:
    return Path(f"{config}.log").read_text()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Where an undisturbed run on one rank ends."""
    config, run = experiment(tmp_path_factory.mktemp("undisturbed"), "simclr", 4, "run")
    finish(config, 1)
    return outcome(run)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGXCPU"])
def test_a_signal_saves_and_the_same_command_goes_on(name: str, tmp_path: Path, expected: Any) -> None:
    config, run = experiment(tmp_path, "simclr", 4, "stopped")
    processes = start(config, 1)
    await_lines(run, 3, processes)
    signal_all(processes, signal.Signals[name])
    assert end(processes) == [INTERRUPTED if name == "SIGINT" else PREEMPTED], told(config)
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None and 3 <= int(newest.name[5:]) == len(metrics(run)) < 8
    last = told(config).splitlines()[-1]
    assert last == (
        f"signal received: saved step {int(newest.name[5:])} to {newest}; the same command goes on from there"
    )
    assert "Traceback" not in told(config)
    finish(config, 1)
    assert outcome(run) == expected


def test_ctrl_c_reaches_all_ranks_and_all_save(tmp_path: Path) -> None:
    config, run = experiment(tmp_path, "simclr", 4, "undisturbed")
    finish(config, 2)
    whole = outcome(run)
    for told_to in (slice(None), slice(1, 2)):  # a terminal's goes to the whole group; one rank's is enough
        config, run = experiment(tmp_path, "simclr", 4, f"stopped {told_to.start}")
        processes = start(config, 2)
        await_lines(run, 3, processes)
        signal_all(processes[told_to], signal.SIGINT)
        assert end(processes) == [INTERRUPTED] * 2, told(config)
        assert told(config).count("signal received: saved step") == 1
        finish(config, 2)
        assert outcome(run) == whole


def live_slowly(step: int, *arguments: Any) -> None:
    """The life of a rank that makes that update (counted from 0) for a minute."""
    from dist_defend.engine.step import GradientStep

    update = GradientStep.__call__

    def slow(self: GradientStep, batch: Any, at: Any) -> Any:
        if at.done(self.steps_per_epoch) == step:
            Path(str(arguments[0]) + ".slow").write_text("")
            until = time.monotonic() + 60
            while time.monotonic() < until:
                time.sleep(0.01)
        return update(self, batch, at)

    GradientStep.__call__ = slow  # type: ignore[method-assign]
    live(*arguments)


def live_signalled(number: int, place: str, *arguments: Any) -> None:
    """The life of a rank that gets the signal when it calls ``module:name`` (a function, or Class.method)."""
    import importlib

    module, _, name = place.partition(":")
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real = getattr(owner, last)

    def signalled(*rest: Any, **options: Any) -> Any:
        os.kill(os.getpid(), number)
        return real(*rest, **options)

    setattr(owner, last, signalled)
    live(*arguments)


def start_as(life: Any, first: tuple[Any, ...], config: Path) -> list[Any]:
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    process = _server.Process(target=life, args=(*first, str(config), f"{config}.log", environment))
    process.start()
    return [process]


def test_ctrl_c_twice_stops_at_once_and_breaks_nothing(tmp_path: Path, expected: Any) -> None:
    config, run = experiment(tmp_path, "simclr", 4, "stopped")
    processes = start_as(live_slowly, (3,), config)
    deadline = time.monotonic() + 60
    while not Path(f"{config}.slow").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    signal_all(processes, signal.SIGINT)
    while "Ctrl-C once more stops at once" not in told(config):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    signal_all(processes, signal.SIGINT)
    assert end(processes) == [INTERRUPTED]
    assert told(config).splitlines()[-1] == "stopped at once; the same command goes on from the newest checkpoint"
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None and newest.name == "step_000000003"
    finish(config, 1)
    assert outcome(run) == expected


@pytest.mark.parametrize(
    "place",
    [
        "dist_defend.config:load_experiment",  # while the file is read
        "dist_defend.engine.context:Context.dataset",  # while data are opened
        "dist_defend.engine.run:RunFolder.finish",  # while the result is written
    ],
)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_outside_of_training_ends_with_one_line(name: str, place: str, tmp_path: Path, expected: Any) -> None:
    config, run = experiment(tmp_path, "simclr", 4, "stopped")
    processes = start_as(live_signalled, (signal.Signals[name], place), config)
    assert end(processes) == [INTERRUPTED if name == "SIGINT" else PREEMPTED], told(config)
    lines = told(config).splitlines()
    assert lines[-1].startswith(f"stopped by {name}; the same command starts again") and "Traceback" not in told(config)
    assert not (run / "result.json").exists()
    assert len(lines) == 1 or place.endswith("finish")
    finish(config, 1)
    assert outcome(run) == expected


def live_told_late(place: str, *arguments: Any) -> None:
    """The life of a rank whose own signal comes when the ranks have agreed to end, and this one is on its way out."""
    rank = arguments[-1]["RANK"]
    if rank == "1":
        live_signalled(signal.SIGTERM, place, *arguments)
    else:
        live(*arguments)


@pytest.mark.parametrize("place", ["dist_defend.engine.run:RunFolder.close", "dist_defend.engine.dist:stop"])
def test_a_ranks_own_signal_may_come_late(place: str, tmp_path: Path) -> None:
    config, run = experiment(tmp_path, "simclr", 4, "stopped")
    processes = start(config, 2, live_told_late, place)
    await_lines(run, 3, processes)
    processes[0].terminate()
    assert end(processes) == [PREEMPTED] * 2, told(config)
    assert "Traceback" not in told(config) and "starts again" not in told(config)


TOLD_AGAIN = """
import atexit, os, signal, sys
from dist_defend import lifeline
number = signal.Signals[sys.argv[1]]
again = lambda: os.kill(os.getpid(), number)
answer = lifeline.answer
lifeline.answer = lambda *status: (again(), answer(*status))[1]  # the run has ended, the process has not
atexit.register(again)
from dist_defend.__main__ import main
sys.argv = ["dist-defend", "run", sys.argv[2]]
sys.exit(main())
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP", "SIGXCPU"])
def test_a_process_that_is_told_again_while_it_ends_still_says_that_it_saved(name: str, tmp_path: Path) -> None:
    """As ranks are by Slurm, which tells every process of a step, and by the launcher."""
    config, run = experiment(tmp_path, "simclr", 1000, "stopped")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with Path(f"{config}.log").open("wb") as log:
        command = [sys.executable, "-c", TOLD_AGAIN, name, str(config)]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    deadline = time.monotonic() + 60
    while not checkpoint.newest(run / "checkpoints"):
        assert process.poll() is None and time.monotonic() < deadline, told(config)
        time.sleep(0.01)
    process.send_signal(signal.Signals[name])
    assert process.wait(60) == PREEMPTED, told(config)
    assert told(config).count("signal received: saved step") == 1 and "Traceback" not in told(config)


def test_a_hangup_that_nohup_ignores_stays_ignored(tmp_path: Path, expected: Any) -> None:
    config, run = experiment(tmp_path, "simclr", 4, "nohup")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = ["nohup", sys.executable, "-m", "dist_defend", "run", str(config)]
    with Path(f"{config}.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            started = Path(f"/proc/{process.pid}/cmdline")
            while not started.read_bytes().startswith(sys.executable.encode()):  # nohup itself ignores it late
                time.sleep(0.01)
            while process.poll() is None:
                process.send_signal(signal.SIGHUP)
                time.sleep(0.1)
            assert process.returncode == 0, told(config)
        finally:
            process.kill()
    assert outcome(run) == expected


def test_ctrl_c_while_python_imports_is_one_line(tmp_path: Path) -> None:
    """A command of another kind, and a run before it has read its configuration."""
    config = make_experiment(tmp_path, "simclr", options_of("simclr", tmp_path))
    code = (
        "import importlib, os, signal, sys\n"
        "real = importlib.import_module\n"
        "importlib.import_module = lambda name: (os.kill(os.getpid(), signal.SIGINT), real(name))[1]\n"
        "from dist_defend.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    for arguments in (["doctor"], ["data", "info", str(tmp_path)], ["run", str(config)]):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == INTERRUPTED, done.stderr
        assert done.stderr.count("\n") == 1 and "stopped by" in done.stderr
    assert not (tmp_path / "run" / "result.json").exists()
