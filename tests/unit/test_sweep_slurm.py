"""Arrays from points, and states from what Slurm's commands print. The real Slurm is in tests/slurm."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_defend.config import Experiment
from dist_defend.errors import UserError
from dist_defend.sweep import progress, slurm
from dist_defend.sweep.file import StageConfig, SweepConfig
from dist_defend.sweep.grid import Point, Sweep


def make_sweep(folder: Path, roots: int, columns: int = 0) -> Sweep:
    """Stage a with so many points, and b with so many after each."""
    points: list[Point] = []
    for root in range(roots):
        experiment = Experiment("classifier", str(folder / "points" / f"a{root}"), options={})
        points.append(Point("a", f"a{root}", experiment, {}, None, root, ()))
    for parent in list(points) if columns else []:
        for column in range(columns):
            key = f"b{parent.root}-{column}"
            experiment = Experiment("rnp", str(folder / "points" / key), options={})
            points.append(Point("b", key, experiment, {}, parent, parent.root, (column,)))
    stages = {"a": StageConfig(), "b": StageConfig(after="a")} if columns else {"a": StageConfig()}
    return Sweep(folder / "sweep.yaml", SweepConfig(str(folder), stages), tuple(points))


def finish(sweep: Sweep, *keys: str) -> None:
    for point in sweep.points:
        if point.key in keys:
            sweep.run_folder(point).mkdir(parents=True)
            (sweep.run_folder(point) / "result.json").write_text("{}")


def shape(blocks: list[slurm.Block]) -> list[tuple[Any, ...]]:
    return [
        (b.stage, b.column, b.chunk, b.after.stage if isinstance(b.after, slurm.Block) else b.after, list(b.points))
        for b in blocks
    ]


def test_a_stage_is_cut_at_the_largest_index(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, 5)
    assert shape(slurm.blocks(sweep, sweep.points, {}, max_array=2)) == [
        ("a", (), 0, None, [0, 1]), ("a", (), 1, None, [0, 1]), ("a", (), 2, None, [0]),
    ]  # fmt: skip


def test_columns_follow_index_by_index(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, 3, columns=2)
    blocks = slurm.blocks(sweep, sweep.points, {}, max_array=100)
    assert shape(blocks) == [
        ("a", (), 0, None, [0, 1, 2]), ("b", (0,), 0, "a", [0, 1, 2]), ("b", (1,), 0, "a", [0, 1, 2]),
    ]  # fmt: skip
    assert [[point.key for point in own] for own in blocks[2].points.values()] == [["b0-1"], ["b1-1"], ["b2-1"]]


def test_a_point_waits_for_what_its_parent_is_part_of(tmp_path: Path) -> None:
    """Nothing where the parent is done, the running array where it is in one, the new array where it goes again."""
    sweep = make_sweep(tmp_path, 3, columns=1)
    finish(sweep, "a0")
    tasks = {"a1": slurm.Task("77", 1, "RUNNING", True)}
    chosen = [point for point in sweep.points if point.key not in ("a0", "a1")]
    assert shape(slurm.blocks(sweep, chosen, tasks, max_array=100)) == [
        ("a", (), 0, None, [2]), ("b", (0,), 0, None, [0]), ("b", (0,), 0, "77", [1]), ("b", (0,), 0, "a", [2]),
    ]  # fmt: skip


def test_indices_are_written_short() -> None:
    assert slurm.ranges([7, 0, 2, 1, 5, 8]) == "0-2,5,7-8"
    assert slurm.ranges([3]) == "3"


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder at the head of PATH for commands that print what they are told to."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    return tmp_path / "bin"


def prints(folder: Path, command: str, text: str, status: int = 0) -> None:
    (folder / command).write_text(f"#!/bin/sh\nprintf '{text}'\nexit {status}\n")
    (folder / command).chmod(0o755)


def submitted(sweep: Sweep, job: str) -> None:
    (sweep.folder / "submissions").mkdir(exist_ok=True)
    (sweep.folder / "logs").mkdir(exist_ok=True)
    record = {"job": job, "stage": "a", "points": {str(point.root): point.key for point in sweep.points}}
    (sweep.folder / "submissions" / f"{int(job):04d}.json").write_text(json.dumps(record))


def test_states_with_and_without_accounting(tmp_path: Path, fake_slurm: Path) -> None:
    sweep = make_sweep(tmp_path, 6)
    submitted(sweep, "8")
    finish(sweep, "a0")
    queue = "8  2  RUNNING\n8  3  PENDING\n8  4  FAILED\n9  1  RUNNING"
    prints(fake_slurm, "squeue", queue)
    prints(fake_slurm, "sacct", "Slurm accounting storage is disabled", 1)
    (tmp_path / "logs" / "8_4.log").write_text("error: no such thing\nsrun: error: n1\nguard: exit 2\n")
    without = {key: (own.state, own.reason) for key, own in progress.survey(sweep)[0].items()}
    assert without == {
        "a0": ("done", ""), "a1": ("missing", ""), "a2": ("running", ""), "a3": ("waiting", ""),
        "a4": ("failed", "error: no such thing"), "a5": ("missing", ""),
    }  # fmt: skip
    prints(
        fake_slurm,
        "sacct",
        "8_0|COMPLETED\n8_1|TIMEOUT\n8_2|RUNNING\n8_[3]|PENDING\n8_5|CANCELLED by 0",
    )
    with_it = {key: (own.state, own.reason) for key, own in progress.survey(sweep)[0].items()}
    assert with_it == without | {"a1": ("failed", "Slurm says TIMEOUT"), "a5": ("failed", "Slurm says CANCELLED")}


def test_the_queue_knows_better_than_accounting(tmp_path: Path, fake_slurm: Path) -> None:
    sweep = make_sweep(tmp_path, 1)
    submitted(sweep, "8")
    prints(fake_slurm, "sacct", "8_0|PREEMPTED")
    prints(fake_slurm, "squeue", "8  0  PENDING")
    assert progress.survey(sweep)[0]["a0"].state == "waiting"
    prints(fake_slurm, "squeue", "")
    assert progress.survey(sweep)[0]["a0"].state == "failed"


def test_the_newest_submission_counts(tmp_path: Path, fake_slurm: Path) -> None:
    sweep = make_sweep(tmp_path, 2)
    submitted(sweep, "8")
    submitted(sweep, "12")
    prints(fake_slurm, "sacct", "", 1)
    prints(fake_slurm, "squeue", "8 0 FAILED\n8 1 FAILED\n12 0 RUNNING\n12 1 FAILED")
    assert [own.state for own in progress.survey(sweep)[0].values()] == ["running", "failed"]


def test_a_finished_sweep_asks_nobody(tmp_path: Path, fake_slurm: Path) -> None:
    """Slurm may be gone by then, or down."""
    sweep = make_sweep(tmp_path, 2)
    submitted(sweep, "8")
    for command in ("sacct", "squeue"):
        prints(fake_slurm, command, "Unable to contact slurm controller", 1)
    finish(sweep, "a0")
    with pytest.raises(UserError, match="squeue"):
        progress.survey(sweep)
    finish(sweep, "a1")
    assert [own.state for own in progress.survey(sweep)[0].values()] == ["done", "done"]


def test_what_is_submitted_again(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, 4, columns=1)
    states: dict[str, progress.State] = {"a0": "done", "a1": "failed", "a2": "missing", "a3": "running"}
    states |= {"b0-0": "failed", "b1-0": "missing", "b2-0": "missing", "b3-0": "waiting"}
    known = {key: progress.Progress(state) for key, state in states.items()}
    chosen, blocked = progress.to_submit(sweep, known, again=False)
    assert [point.key for point in chosen] == ["a2", "b2-0"] and [point.key for point in blocked] == ["b1-0"]
    chosen, blocked = progress.to_submit(sweep, known, again=True)
    assert [point.key for point in chosen] == ["a1", "a2", "b0-0", "b1-0", "b2-0"] and not blocked


def test_options_that_are_the_sweeps_own(tmp_path: Path, capsys: pytest.CaptureFixture[str], fake_slurm: Path) -> None:
    from dist_defend.cli import main

    prints(fake_slurm, "scontrol", "MaxArraySize            = 1001")
    prints(fake_slurm, "sbatch", "error: invalid partition", 1)
    options = {"data": {"path": "d"}, "test": {"path": "t"}}
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"method": "classifier", "output": "x", "classifier": options}))
    file = tmp_path / "sweep.yaml"
    for name, told in (("array", "key 'slurm.array' is the sweep's own"), ("partition", "sbatch: exit 1")):
        content = {"output": str(tmp_path / "out"), "config": str(config), "slurm": {name: "1"}}
        file.write_text(yaml.safe_dump(content))
        assert main(["sweep", "submit", str(file)]) == 2
        assert told in capsys.readouterr().err
    assert not list((tmp_path / "out" / "submissions").glob("*.json"))


def guarded(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    known = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "123456", **environment}
    command = [sys.executable, str(slurm.GUARD), *arguments]
    return subprocess.run(command, check=False, env=known, capture_output=True, text=True, timeout=60)


def test_the_guard_gives_each_job_a_port_and_its_cores() -> None:
    done = guarded({"SLURM_CPUS_PER_TASK": "3"}, "sh", "-c", "echo $MASTER_ADDR $MASTER_PORT $SRUN_CPUS_PER_TASK")
    assert (done.stdout, done.returncode) == ("127.0.0.1 23456 3\n", 0)


def test_the_guard_runs_the_point_of_its_index(tmp_path: Path) -> None:
    file = tmp_path / "0000.json"
    file.write_text(json.dumps({"points": {"0": "aaa", "7": "bbb"}, "command": ["sh", "-c", "echo {key}; exit 3"]}))
    done = guarded({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_JOB_ID": "9"}, "--points", str(file))
    assert done.returncode == 3 and "\nbbb\n" in done.stdout and done.stdout.endswith("guard: exit 3\n")


def test_the_guard_counts_restarts(fake_slurm: Path) -> None:
    prints(fake_slurm, "scontrol", "JobId=123456 JobState=RUNNING PreemptTime=None")
    assert guarded({"SLURM_RESTART_COUNT": "3"}, "--restarts=2", "true").returncode == 75
    assert guarded({"SLURM_RESTART_COUNT": "2"}, "--restarts=2", "true").returncode == 0
    last = guarded({"SLURM_RESTART_COUNT": "2"}, "--restarts=2", "sh", "-c", "exit 75")
    assert last.returncode == 75 and "not requeued" in last.stdout


def test_the_guard_leaves_cancelled_and_failed_jobs_alone(fake_slurm: Path) -> None:
    prints(fake_slurm, "scontrol", "JobId=123456 JobState=CANCELLED PreemptTime=None")
    assert "requeued" not in guarded({}, "sh", "-c", "exit 75").stdout
    prints(fake_slurm, "scontrol", "JobId=123456 JobState=RUNNING PreemptTime=None")
    failed = guarded({}, "sh", "-c", "exit 2")
    assert failed.returncode == 2 and "requeued" not in failed.stdout
