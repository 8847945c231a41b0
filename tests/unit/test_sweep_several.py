"""points_per_job: which points share a job, what the job is told, and what is known of them while it runs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dist_defend.cli import main
from dist_defend.config import Experiment
from dist_defend.errors import UserError
from dist_defend.sweep import progress, several, slurm
from dist_defend.sweep.file import StageConfig, SweepConfig
from dist_defend.sweep.grid import Point, Sweep, load_sweep


def make_sweep(folder: Path, roots: int, columns: int = 0, first: int = 1, later: int = 1) -> Sweep:
    """Stage a with so many points, and b with so many after each; how many of each stage share a job."""
    points: list[Point] = []
    for root in range(roots):
        experiment = Experiment("classifier", str(folder / "points" / f"a{root}"), options={})
        points.append(Point("a", f"a{root}", experiment, {}, None, root, ()))
    for parent in list(points):
        for column in range(columns):
            key = f"b{parent.root}-{column}"
            experiment = Experiment("rnp", str(folder / "points" / key), options={})
            points.append(Point("b", key, experiment, {}, parent, parent.root, (column,)))
    stages = {"a": StageConfig(points_per_job=first)}
    if columns:
        stages["b"] = StageConfig(after="a", points_per_job=later)
    return Sweep(folder / "sweep.yaml", SweepConfig(str(folder), stages), tuple(points))


def shape(blocks: list[slurm.Block]) -> list[tuple[str, object, dict[int, str]]]:
    """Stage, the stage or job it waits for, and the keys of each index."""
    after = [b.after.stage if isinstance(b.after, slurm.Block) else b.after for b in blocks]
    keys = [{index: " ".join(p.key for p in own) for index, own in b.points.items()} for b in blocks]
    return [(b.stage, *pair) for b, *pair in zip(blocks, after, keys, strict=True)]  # type: ignore[misc]


def test_neighbours_share_a_task(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, 5, first=2)
    assert shape(slurm.blocks(sweep, sweep.points, {}, 100)) == [("a", None, {0: "a0 a1", 1: "a2 a3", 2: "a4"})]


def test_tasks_and_not_points_fill_an_array(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, 7, first=2)
    assert shape(slurm.blocks(sweep, sweep.points, {}, 3)) == [
        ("a", None, {0: "a0 a1", 1: "a2 a3", 2: "a4 a5"}), ("a", None, {0: "a6"}),
    ]  # fmt: skip


def test_what_was_done_leaves_its_place_empty(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, 5, first=2)
    chosen = [sweep.points[number] for number in (0, 3, 4)]
    assert shape(slurm.blocks(sweep, chosen, {}, 100)) == [("a", None, {0: "a0", 1: "a3", 2: "a4"})]


def test_a_later_stages_tasks_have_several_columns_of_one_root(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, 2, columns=3, first=1, later=2)
    assert shape(slurm.blocks(sweep, sweep.points, {}, 100)) == [
        ("a", None, {0: "a0", 1: "a1"}),
        ("b", "a", {0: "b0-0 b0-1", 1: "b1-0 b1-1"}),
        ("b", "a", {0: "b0-2", 1: "b1-2"}),
    ]


def test_a_later_stages_tasks_have_the_roots_of_the_first(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, 3, columns=2, first=2, later=4)
    assert shape(slurm.blocks(sweep, sweep.points, {}, 100)) == [
        ("a", None, {0: "a0 a1", 1: "a2"}),
        ("b", "a", {0: "b0-0 b0-1 b1-0 b1-1", 1: "b2-0 b2-1"}),
    ]


def test_a_point_that_waits_has_its_parents_index(tmp_path: Path) -> None:
    """Also where that one was submitted under another number, before the file had other seeds or points_per_job."""
    sweep = make_sweep(tmp_path, 3, columns=1)
    tasks = {"a0": slurm.Task("7", 2, "RUNNING", True), "a1": slurm.Task("7", 0, "PENDING", True)}
    chosen = [point for point in sweep.points if point.stage == "b" and point.root < 2]
    assert shape(slurm.blocks(sweep, chosen, tasks, 100)) == [("b", "7", {2: "b0-0", 0: "b1-0"})]
    tasks = dict.fromkeys(("a0", "a1"), slurm.Task("7", 0, "RUNNING", True, 0.0))
    assert shape(slurm.blocks(sweep, chosen, tasks, 100)) == [("b", "7", {0: "b0-0 b1-0"})]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an experiment, and a Slurm that takes everything for job 101."""
    programs = {"sbatch": "echo 101", "squeue": "true", "sacct": "exit 1", "scontrol": "echo MaxArraySize = 1001"}
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    options = {"data": {"path": "d"}, "test": {"path": "t"}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"method": "classifier", "output": "x", "classifier": options}))
    return tmp_path


def sweep_file(site: Path, text: str) -> str:
    (site / "s.yaml").write_text(f"output: {site}/out\n{text}".replace("CONFIG", f"{site}/c.yaml"))
    return str(site / "s.yaml")


def test_what_is_submitted(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sweep_file(site, "config: CONFIG\nseeds: [1, 2, 3]\npoints_per_job: 2\n")
    keys = [point.key for point in load_sweep(file).points]
    assert main(["sweep", "plan", file]) == 0
    assert "stage points: 2 points at most share a job" in capsys.readouterr().out
    assert main(["sweep", "submit", file, "--no-collect"]) == 0
    assert "job 101: 3 points of stage points in 2 jobs" in capsys.readouterr().out
    record = json.loads((site / "out" / "submissions" / "0000.json").read_text())
    assert record["points"] == {"0": keys[:2], "1": keys[2:]}
    assert record["command"][-5:] == ["dist_defend", "several", f"{site}/out", "{tried}", "{keys}"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("config: CONFIG\nseeds: [1]\npoints_per_job: 0\n", "points_per_job' is 0; it must be at least 1"),
        ("config: CONFIG\nset: {world_size: 2}\npoints_per_job: 2\n", "asks for 2 ranks (world_size)"),
        (
            "stages: {a: {config: CONFIG, points_per_job: 4}, b: {after: a, config: CONFIG, seeds: [5]}}\n",
            "stage 'b', key 'points_per_job': 1 is no multiple of the 4 of stage 'a'",
        ),
    ],
)
def test_what_cannot_share_a_job_is_told_before_anything_is_written(
    text: str, told: str, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sweep_file(site, text)
    for options in (["plan", file], ["submit", file], ["submit", file, "--local"]):
        assert main(["sweep", *options]) == 2
        assert told in capsys.readouterr().err
    assert not (site / "out").exists()


def test_points_of_several_ranks_do_not_join_a_job_of_several_points(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, 2, columns=1)
    ranks = [p for p in sweep.points if p.stage == "b"]
    for point in ranks:
        object.__setattr__(point.experiment, "world_size", 2)
    tasks = dict.fromkeys(("a0", "a1"), slurm.Task("7", 0, "RUNNING", True, 0.0))
    with pytest.raises(UserError, match="submit when it is over"):
        slurm.submit(sweep, ranks, tasks, with_collect=False)


def guarded(file: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    known = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "9", **environment}
    command = [sys.executable, str(slurm.GUARD), "--restarts=2", "--points", str(file)]
    return subprocess.run(command, env=known, capture_output=True, text=True, timeout=60, check=False)


CRASHING = """
tried=$1; shift
for key; do
    grep -qs $key $tried && continue
    echo $key >>$tried
    echo runs $key
    [ $key != bad ] || kill -KILL $$
done
exit 1
"""


def test_the_guard_goes_on_behind_a_point_that_kills_the_process(site: Path) -> None:
    (site / "bin" / "scontrol").write_text("#!/bin/sh\necho JobState=RUNNING PreemptTime=None\n")
    file, tried = site / "0003.json", site / "0003_4.tried"
    tried.write_text("good\n")  # of an earlier life
    command = ["sh", "-c", CRASHING, "points", "{tried}", "{keys}"]
    file.write_text(json.dumps({"points": {"4": ["good", "bad", "other"]}, "command": command}))
    done = guarded(file, {"SLURM_ARRAY_TASK_ID": "4"})
    assert [line for line in done.stdout.splitlines() if line.startswith("runs")] == [
        "runs good",
        "runs bad",
        "runs other",
    ]
    assert done.returncode == 1 and done.stdout.endswith("guard: exit 1\n")
    assert "going on with the next" in done.stdout


@pytest.mark.parametrize("state", ["CANCELLED", "RUNNING"])
def test_the_guard_does_not_go_on_for_ever(state: str, site: Path) -> None:
    """Not in a cancelled job, and not where the process ends before it has begun another point."""
    (site / "bin" / "scontrol").write_text(f"#!/bin/sh\necho JobState={state} PreemptTime=None\n")
    first = "echo one >>$1;" if state == "CANCELLED" else ""
    command = ["sh", "-c", f"echo runs; {first} kill -KILL $$", "points", "{tried}", "{keys}"]
    file = site / "0003.json"
    file.write_text(json.dumps({"points": {"4": ["one", "two"]}, "command": command}))
    done = guarded(file, {"SLURM_ARRAY_TASK_ID": "4"})
    assert done.stdout.count("runs") == 1 and done.returncode == 128 + signal.SIGKILL


def test_states_of_points_that_share_a_job(site: Path) -> None:
    sweep = make_sweep(site, 6, first=6)
    (site / "submissions").mkdir()
    (site / "logs").mkdir()
    old = site / "logs" / "a4.log"
    old.write_text("error: of an earlier submission\npoints: exit 2\n")
    os.utime(old, (1e9, 1e9))
    record = {"job": "8", "stage": "a", "points": {"0": [point.key for point in sweep.points]}}
    (site / "submissions" / "0000.json").write_text(json.dumps(record))
    sweep.run_folder(sweep.points[0]).mkdir(parents=True)
    (sweep.run_folder(sweep.points[0]) / "result.json").write_text("{}")
    (site / "logs" / "a1.log").write_text("error: bad input\n\npoints: exit 2\n")
    (site / "logs" / "a2.log").write_text("step 3\n")
    (site / "logs" / "a3.log").write_text("saved\n\npoints: exit 75\n")  # by a signal, in an earlier life
    (site / "logs" / "8_0.log").write_text("points: 2/6 a1: exit 2\nsrun: error\nguard: exit 137\n")
    states = {
        "PENDING": ["done", *["waiting"] * 5],
        "RUNNING": ["done", "failed", "running", "waiting", "waiting", "waiting"],
        "TIMEOUT": ["done", *["failed"] * 5],
    }
    for state, expected in states.items():
        (site / "bin" / "squeue").write_text(f"#!/bin/sh\necho 8 0 {state}\n")
        known, _ = progress.survey(sweep)
        assert [own.state for own in known.values()] == expected, state
        if state == "RUNNING":
            assert progress.to_submit(sweep, known, again=True)[0] == []
            assert known["a1"].reason == "error: bad input"
    reasons = {key: own.reason for key, own in known.items()}
    assert reasons["a1"] == "error: bad input" and reasons["a3"] == "saved"
    assert reasons["a2"] == reasons["a4"] == reasons["a5"] == "Slurm says TIMEOUT"
    assert [p.key for p in progress.to_submit(sweep, known, again=True)[0]] == ["a1", "a2", "a3", "a4", "a5"]


@pytest.mark.parametrize("text", ["", "[]", '{"job": 8}', '{"job": "x", "stage": "a", "points": {}}', '{"job": "8"'])
def test_a_damaged_submission_is_one_line(text: str, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sweep_file(site, "config: CONFIG\nseeds: [1]\n")
    (site / "out" / "submissions").mkdir(parents=True)
    (site / "out" / "submissions" / "0000.json").write_text(text)
    for action in ("status", "cancel"):
        status = main(["sweep", action, file])
        told = capsys.readouterr().err
        assert status == (2 if text else 0)  # an empty one is a submission that was killed before it was written
        assert told.count("\n") == status // 2 and (not text or "0000.json" in told)


def test_the_status_in_a_log(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    for text, status in {
        "a\n\npoints: exit 2\n": 2,
        "points: exit -9\n": -9,
        "points: exit 2\nmore": None,
        "": None,
    }.items():
        log.write_text(text)
        assert several.exit_status(log) == status
    assert several.exit_status(tmp_path / "absent") is None
