"""What a sweep file says, as a real Slurm understands it; points that share a job; tasks that no launcher started."""

import json
import os
import sys
from pathlib import Path

import pytest

from dist_defend.cli import main
from dist_defend.sweep.grid import load_sweep
from tests.slurm.cluster import Cluster
from tests.slurm.points import await_, classifier, drain, outcome, steps, write_sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def submit(file: Path, *options: str) -> None:
    assert main(["sweep", "submit", str(file), "--no-collect", *options]) == 0


def job_of(folder: Path, number: int = 0) -> str:
    record = json.loads((folder / "sweep" / "submissions" / f"{number:04d}.json").read_text())
    return str(record["job"])


def shown(cluster: Cluster, job: str) -> dict[str, str]:
    text = cluster.run("scontrol", "show", "job", "-o", job).splitlines()[0]
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


@pytest.mark.parametrize(
    ("written", "understood"),
    [
        ("24:00:00", "1-00:00:00"),
        ("4:30:00", "04:30:00"),
        ("30:00", "00:30:00"),
        ("90", "01:30:00"),
        ("1-12", "1-12:00:00"),
        ("1-12:30", "1-12:30:00"),
    ],
)
def test_times_lists_and_texts(written: str, understood: str, cluster: Cluster, tmp_path: Path) -> None:
    config = classifier(tmp_path)
    options = f"{{time: {written}, hold: true, comment: 0100, exclude: [n2], cpus_per_task: 3, nice: 007, gres: null}}"
    text = f"output: {tmp_path}/sweep\nconfig: {config}\nslurm: {options}\n"
    (tmp_path / "sweep.yaml").write_text(text)
    submit(tmp_path / "sweep.yaml")
    job = shown(cluster, job_of(tmp_path))
    assert job["TimeLimit"] == understood and job["Comment"] == "0100" and job["ExcNodeList"] == "n2"
    assert job["CPUs/Task"] == "3" and job["Nice"] == "7" and job["JobState"] == "PENDING"


def test_a_banner_around_sbatch_and_setup_lines(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    banner = 'echo "Welcome. 3 of 4096 nodes are down"\necho "Quota: 17"\n'
    real = cluster.run("sh", "-c", "command -v sbatch").strip()
    (tmp_path / "bin" / "sbatch").write_text(f'#!/bin/sh\n{banner}{real} "$@" || exit\n{banner}')
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    stage = {"config": str(classifier(tmp_path)), "setup": ["echo second $FIRST"]}
    file = write_sweep(tmp_path, {"setup": ["export FIRST=one"], "stages": {"only": stage}})
    submit(file)
    drain(cluster)
    job = job_of(tmp_path)
    assert cluster.states(job) == {"0": ("COMPLETED", 0, 0)}
    log = (tmp_path / "sweep" / "logs" / f"{job}_0.log").read_text()
    assert "second one" in log.splitlines() and log.index("second one") < log.index("guard: point")


def test_a_sweep_that_a_job_submits(cluster: Cluster, tmp_path: Path) -> None:
    """The job around it has four tasks of two CPUs; its points have one of one, and Slurm's defaults otherwise."""
    file = write_sweep(tmp_path, {"config": str(classifier(tmp_path)), "slurm": {"hold": True}})
    command = f"{sys.executable} -m dist_defend sweep submit {file} --no-collect"
    options = ("--ntasks=4", "--cpus-per-task=2", "--mem-per-cpu=100", "--time=9", f"--output={tmp_path}/outer.log")
    outer = cluster.run("sbatch", "--parsable", *options, f"--wrap={command}", cwd=Path(__file__).parents[2]).strip()
    assert cluster.wait(outer) == {"N/A": ("COMPLETED", 0, 0)}, (tmp_path / "outer.log").read_text()
    job = shown(cluster, job_of(tmp_path))
    assert (job["NumTasks"], job["CPUs/Task"]) == ("1", "1") and job.get("MinMemoryCPU", "0") == "0"


def test_tasks_that_no_launcher_started(cluster: Cluster, tmp_path: Path) -> None:
    command = f"{sys.executable} -m dist_defend run {classifier(tmp_path)} >>{tmp_path}/told 2>&1"
    told = tmp_path / "told"
    options = ("-n", "2", "--time=5")
    cluster.run("srun", *options, "sh", "-c", command, cwd=Path(__file__).parents[2], timeout=240, check=False)
    lines = told.read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: srun has started 2 tasks (SLURM_NTASKS)")
    assert "`srun --ntasks=1 dist-defend launch CONFIG --ranks 2`" in lines[0]
    assert "`srun --ntasks=1 dist-defend run CONFIG`" in lines[0]
    assert not (tmp_path / "run").exists()


def test_points_that_share_a_job(cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One fails, one is cut short near the time limit; the job goes on with that one, and then with the one behind."""
    config = classifier(tmp_path, checkpoint_every=1)
    long = {"classifier.update.epochs": 150}
    explicit = [{"seed": 1}, {"classifier.data.path": str(tmp_path / "absent")}, long, {"seed": 2}, {"seed": 3}]
    file = write_sweep(tmp_path, {"config": str(config), "explicit": explicit, "points_per_job": 4})
    submit(file)
    sweep, job = load_sweep(file), job_of(tmp_path)
    runs = [sweep.run_folder(point) for point in sweep.points]
    await_(lambda: steps(runs[2]) >= 2 and sweep.is_done(sweep.points[4]), "the third point trains, the last is done")
    capsys.readouterr()
    assert main(["sweep", "status", str(file)]) == 0
    assert "1 running, 1 waiting, 1 failed" in capsys.readouterr().out
    assert main(["sweep", "resubmit", str(file)]) == 0 and "nothing to run" in capsys.readouterr().out
    first = (runs[0] / "result.json").stat().st_mtime_ns
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_0")
    drain(cluster)
    assert cluster.states(job) == {"0": ("FAILED", 1, 1), "1": ("COMPLETED", 0, 0)}
    assert [sweep.is_done(point) for point in sweep.points] == [True, False, True, True, True]
    assert (runs[0] / "result.json").stat().st_mtime_ns == first
    logs = tmp_path / "sweep" / "logs"
    assert "resumed at step" in (logs / f"{sweep.points[2].key}.log").read_text()
    told = (logs / f"{job}_0.log").read_text()
    assert told.count("cut short with exit 75: requeued") == 1 and told.count(f"{sweep.points[0].key} begins") == 1

    (tmp_path / "absent").symlink_to(tmp_path / "inputs" / "data")
    assert main(["sweep", "resubmit", str(file), "--no-collect"]) == 0
    drain(cluster)
    assert all(map(sweep.is_done, sweep.points))
    alone = tmp_path / "alone" / sweep.points[4].key  # a result tells its folder's name
    command = ("python", "-m", "dist_defend", "run", str(config), "seed=3", f"output={alone}")
    cluster.run("srun", "--time=5", *command, cwd=Path(__file__).parents[2], timeout=240)
    assert outcome(runs[4]) == outcome(alone)
