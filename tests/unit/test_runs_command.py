"""dist-defend runs: states as folders and locks tell them, of real processes where it counts."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dist_defend import runs_command
from dist_defend.cli import main
from dist_defend.lock import FolderLock
from dist_defend.runs_command import look
from tests.runs import make_experiment, options_of
from tests.unit.test_lock import HOLDER


def run_folder(folder: Path, **files: Any) -> Path:
    """With config.json and these files; a dict becomes JSON."""
    folder.mkdir(parents=True)
    for name, content in {"config.json": {}, **{f.replace("__", "."): c for f, c in files.items()}}.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_a_run_is_running_while_its_process_lives_and_cut_off_once_it_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "run", metrics__jsonl='{"step": 7, "stage": "ibau", "acc": 91.5, "asr": 3}\n')
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            found = look(folder)
            assert found.state == "running" and found.told.startswith(f"process {holder.pid} on ")
            assert "; stage ibau, step 7, acc 91.50 at step 7, asr 3.00 at step 7, last sign " in found.told
        finally:
            holder.send_signal(signal.SIGKILL)
    found = look(folder)
    assert found.state == "cut off" and "told nothing" in found.told and "the same command goes on" in found.told
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("\n1 runs: 1 cut off\n")


def test_a_finished_run_tells_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counted = {"acc": (9, 10), "asr": (1, 8), "asr_all": (2, 10), "ra": (7, 8)}
    row = {name: {"correct": correct, "n": n} for name, (correct, n) in counted.items()}
    result = {
        "method": "ibau",
        "rows": [{"kind": "ibau", "task": "noise\x1b[2J", "seed": 1, **row}],
        "metrics": {"acc_before": 95.0, "asr_before": 100.0},
        "wall_seconds": 3723.4,
    }
    run_folder(tmp_path / "b", result__json=result)
    run_folder(tmp_path / "a" / "c", result__json={"method": "simclr", "rows": []})
    assert main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["finished", f"{tmp_path}/a/c", "simclr"]
    wanted = "ibau, noise\\x1b[2J: acc 95.00 -> 90.00 % of 10, asr 100.00 -> 12.50 % of 8, 1 h 2 min"
    assert lines[1].split(maxsplit=2)[1:] == [f"{tmp_path}/b", wanted]
    assert lines[2:] == ["", "2 runs: 2 finished"]


def test_how_a_run_ended_is_written_down_and_forgotten_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_experiment(tmp_path, "simclr", options_of("simclr", tmp_path))

    states = []

    def fail(*_: Any) -> None:
        states.append(look(tmp_path / "run").state)
        raise RuntimeError("no\nluck")

    with monkeypatch.context() as patch:
        patch.setattr("dist_defend.engine.trainer.Trainer._log", fail)
        assert main(["run", str(config)]) == 1
    found = look(tmp_path / "run")
    assert states == ["running"] and (found.state, found.told) == ("failed", "RuntimeError: no luck")
    with monkeypatch.context() as patch:
        patch.setattr("dist_defend.engine.trainer.Trainer._log", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert main(["run", str(config)]) == 75
    found = look(tmp_path / "run")
    assert found.state == "stopped" and found.told.startswith("signal received: saved step 1 to ")
    assert main(["run", str(config)]) == 0
    assert look(tmp_path / "run").state == "finished" and not (tmp_path / "run" / "end.json").exists()


def test_a_second_start_does_not_write_into_the_firsts_folder(tmp_path: Path) -> None:
    config = make_experiment(tmp_path, "simclr", options_of("simclr", tmp_path))
    (tmp_path / "run").mkdir()
    lock = FolderLock(tmp_path / "run")
    lock.take()
    assert main(["run", str(config)]) == 2
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [".lock"]
    lock.release()


def test_what_cannot_be_seen_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = {"host": "elsewhere", "pid": 5, "started": "2026-01-01 00:00:00", "job": None}
    folder = run_folder(tmp_path / "run", __lock=holder)
    assert (folder / ".lock").is_file()
    found = look(folder)
    assert found.state == "unknown" and "was on elsewhere" in found.told and "not seen from here" in found.told

    def no_locks(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    found = look(folder)
    assert found.state == "unknown" and "no locks" in found.told


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result__json", {"rows": [{"kind": "x"}]}),
        ("result__json", "not json"),
        ("end__json", {"state": "glorious", "told": "x"}),
        ("end__json", {"state": "failed"}),
    ],
)
def test_a_damaged_folder_is_told_beside_the_others(
    name: str, content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder(tmp_path / "bad", **{name: content})
    run_folder(tmp_path / "good", end__json={"state": "failed", "told": "a\x1b[31m line"})
    assert main(["runs", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "2 runs: 1 failed, 1 damaged" in told and "a\\x1b[31m line" in told


def test_a_tail_begins_with_a_whole_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_command, "_TAIL", 200)
    lines = [json.dumps({"step": n, "stage": "ibau", "acc": 50.0 + n}) for n in range(30)]
    folder = run_folder(tmp_path / "run", metrics__jsonl="\n".join(lines) + '\n{"step": 3')
    assert "stage ibau, step 29, acc 79.00 at step 29" in look(folder).told


def test_a_look_does_not_keep_a_run_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder(tmp_path / "run", __lock="")
    with (tmp_path / "run" / ".lock").open() as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(reader, fcntl.LOCK_UN))
        lock = FolderLock(tmp_path / "run")
        lock.take()
        assert lock.look()[0] is True
        lock.release()


def test_no_folder_and_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs below {tmp_path}\n"
    assert main(["runs", str(tmp_path / "none")]) == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.2, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (90000, "1 d 1 h")]
)
def test_spans(seconds: float, told: str) -> None:
    assert runs_command._span(seconds) == told
