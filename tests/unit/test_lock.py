"""One writer in a run folder, and tasks that nobody told to be ranks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dist_defend.cli import main
from dist_defend.errors import UserError
from dist_defend.lock import FolderLock
from tests.runs import make_experiment, options_of

HOLDER = """
import pathlib, sys, time
from dist_defend.lock import FolderLock
lock = FolderLock(pathlib.Path(sys.argv[1]))
lock.take()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_writer_is_told_of_the_first_and_a_dead_ones_folder_is_free(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_experiment(tmp_path, "simclr", options_of("simclr", tmp_path))
    (tmp_path / "run").mkdir()
    environment = os.environ | {"SLURM_JOB_ID": "77"}
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            assert main(["run", str(config)]) == 2
            told = capsys.readouterr().err.splitlines()[-1]
            assert f"is in use by process {holder.pid} on " in told and ", job 77, since " in told
            assert not (tmp_path / "run" / "config.yaml").exists()
        finally:
            holder.send_signal(signal.SIGKILL)
    assert main(["run", str(config)]) == 0
    assert (tmp_path / "run" / "result.json").exists()


def test_a_lock_is_given_back_and_says_who_has_it(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.take()
    with pytest.raises(UserError, match=f"process {os.getpid()} on "):
        second.take()
    first.release()
    second.take()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    second.release()
    (tmp_path / ".lock").write_text("not json")
    first.take()
    first.release()


@pytest.mark.parametrize(
    ("variables", "starter"),
    [
        ({"SLURM_JOB_ID": "5", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "srun"),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "srun"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "mpirun"),
    ],
)
def test_tasks_without_a_launcher(
    variables: dict[str, str],
    starter: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_LOCALID", "0")
    config = make_experiment(tmp_path, "simclr", options_of("simclr", tmp_path))
    assert main(["run", str(config)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {starter} has started 2 tasks") and told.count("\n") == 1
    assert "dist-defend launch CONFIG --ranks 2" in told and "srun --ntasks=1 dist-defend run CONFIG" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_NTASKS": "4"},  # a shell of salloc
        {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --ntasks=1
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_one_task_is_one_rank(variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = make_experiment(tmp_path, "simclr", options_of("simclr", tmp_path))
    assert main(["run", str(config), "--dry-run"]) == 0
