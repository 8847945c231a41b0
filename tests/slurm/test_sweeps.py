"""Sweeps on a real Slurm."""

import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from dist_defend.cli import main
from dist_defend.sweep.grid import load_sweep
from tests.slurm.cluster import Cluster
from tests.slurm.points import await_, classifier, defence, drain, steps, write_sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def sweep(action: str, file: Path, *options: str) -> None:
    assert main(["sweep", action, str(file), *options]) == 0


def test_an_array_whose_failed_points_are_submitted_again(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = classifier(tmp_path)
    folders = [tmp_path / "inputs" / f"data{number}" for number in range(8)]
    for folder in folders[:-1]:  # the last is not there yet
        folder.symlink_to(tmp_path / "inputs" / "data")
    grid = {"product": {"classifier.data.path": [str(folder) for folder in folders]}, "seeds": [1, 2, 3]}
    file = write_sweep(tmp_path, {"config": str(config), "throttle": 4, **grid})
    sweep("submit", file, "--no-collect")
    running: list[int] = []
    drain(cluster, lambda states: running.append(Counter(states)["RUNNING"]))
    assert 1 < max(running) <= 4

    capsys.readouterr()
    sweep("status", file)
    told = capsys.readouterr().out
    assert "21 done, 3 failed" in told
    assert told.count("data7: cannot read") == 3 or told.count(str(folders[-1])) >= 3
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sweep/points/*/result.json")}
    sweep("submit", file)
    assert "nothing to run" in capsys.readouterr().out

    folders[-1].symlink_to(tmp_path / "inputs" / "data")
    sweep("resubmit", file, "--no-collect")
    assert "running 3 points" in capsys.readouterr().out
    drain(cluster)
    late = {
        point.key
        for point in load_sweep(file).points
        if point.labels["points.classifier.data.path"] == str(folders[-1])
    }
    second = json.loads((tmp_path / "sweep" / "submissions" / "0001.json").read_text())
    assert set(second["points"].values()) == late
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sweep/points/*/result.json")}
    assert len(after) == 24 and {path: after[path] for path in done} == done
    sweep("collect", file)
    assert "24 of 24 points" in capsys.readouterr().out
    table = pd.read_parquet(tmp_path / "sweep" / "results.parquet")
    assert table["key"].nunique() == 24 and set(table["state"]) == {"done"}


def test_a_pipeline_collects_around_a_failed_index(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison, unlearn = classifier(tmp_path), defence(tmp_path)
    absent = str(tmp_path / "absent")
    model = {"rnp.model": "${poison.output}/model", "seed": "${poison.seed}"}
    stages = {
        "poison": {
            "config": str(poison),
            "zip": {"seed": [1, 2], "classifier.data.path": [str(tmp_path / "inputs" / "data"), absent]},
        },
        "defend": {"after": "poison", "config": str(unlearn), "set": model, "product": {"rnp.alpha": [0.2, 0.4]}},
    }
    file = write_sweep(tmp_path, {"stages": stages})
    sweep("submit", file)
    told = capsys.readouterr().out
    assert told.count("aftercorr:") == 2
    drain(cluster)
    (collect,) = (tmp_path / "sweep" / "logs").glob("collect_*.log")
    log = collect.read_text()
    points = {point.key: point for point in load_sweep(file).points}
    failed = [key for key, point in points.items() if point.root == 1]
    assert "3 of 6 points" in log and all(f"missing {points[key].stage} {key}" in log for key in failed)
    sweep("status", file)
    told = capsys.readouterr().out
    assert "poison: 1 done, 1 failed" in told and "defend: 2 done, 2 failed" in told
    assert absent in told and told.count("Slurm says CANCELLED") == 2
    board = pd.read_csv(tmp_path / "sweep" / "leaderboard.csv")
    assert sorted(board["stage"]) == ["defend", "defend", "poison"]


def test_a_node_crashes_in_the_middle_of_an_array(cluster: Cluster, tmp_path: Path) -> None:
    config = classifier(tmp_path, epochs=40, checkpoint_every=1)
    file = write_sweep(tmp_path, {"config": str(config), "seeds": [1, 2, 3], "slurm": {"gres": "gpu:4"}})
    sweep("submit", file, "--no-collect")
    points = load_sweep(file).points
    runs = [load_sweep(file).run_folder(point) for point in points]
    await_(lambda: all(steps(run) >= 2 for run in runs), "the points train")
    nodes = {line.split()[0]: line.split()[1] for line in cluster.run("squeue", "-h", "-r", "-o", "%K %N").splitlines()}
    assert Counter(nodes.values()) == {"n1": 2, "n2": 1}
    cluster.crash("n2")
    await_(lambda: "n2" in cluster.run("sinfo", "-h", "-N", "-t", "down", "-o", "%N"), "the node is known to be down")
    cluster.revive("n2")
    drain(cluster)
    job = json.loads((tmp_path / "sweep" / "submissions" / "0000.json").read_text())["job"]
    expected = {index: ("COMPLETED", 0, int(node == "n2")) for index, node in nodes.items()}
    assert cluster.states(job) == expected
    lost = next(index for index, node in nodes.items() if node == "n2")
    assert "resumed at step" in (tmp_path / "sweep" / "logs" / f"{job}_{lost}.log").read_text()
    sweep("collect", file)
    assert len(pd.read_csv(tmp_path / "sweep" / "results.csv")) == 3


def test_more_points_than_an_array_holds_and_cancelling_them(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, unlearn = classifier(tmp_path), defence(tmp_path)
    stages = {
        "poison": {"config": str(config), "seeds": list(range(40))},
        "defend": {"after": "poison", "config": str(unlearn), "set": {"rnp.model": "${poison.output}/model"}},
    }
    file = write_sweep(tmp_path, {"stages": stages, "slurm": {"hold": True}, "throttle": 5})
    sweep("submit", file)
    told = capsys.readouterr().out
    sizes = [len(json.loads(path.read_text())["points"]) for path in sorted(tmp_path.glob("sweep/submissions/*.json"))]
    assert sizes == [33, 7, 33, 7, 0]
    jobs = [line.split()[1].strip(",:") for line in told.splitlines() if line.startswith("job ")]
    assert len(cluster.run("squeue", "-h", "-r", "--me").splitlines()) == 81
    shown = [cluster.run("scontrol", "show", "job", job) for job in jobs]
    assert f"Dependency=afterany:{jobs[0]}" in shown[1] and f"Dependency=aftercorr:{jobs[1]}" in shown[3].replace(
        "_*", ""
    )
    assert all("ArrayTaskThrottle=5" in text for text in shown[:4])
    sweep("status", file)
    assert "poison: 40 waiting" in capsys.readouterr().out
    sweep("resubmit", file)
    assert "nothing to run" in capsys.readouterr().out
    sweep("cancel", file)
    assert "cancelled 5 jobs" in capsys.readouterr().out
    drain(cluster)
    sweep("status", file)
    assert "poison: 40 failed" in capsys.readouterr().out


def test_a_point_of_two_ranks_on_two_nodes(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cluster.has_hosts:  # all nodes are this machine, and their names mean nothing to it
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    config = classifier(tmp_path)
    content = {"config": str(config), "set": {"world_size": 2}, "slurm": {"nodes": 2}}
    file = write_sweep(tmp_path, content)
    sweep("submit", file, "--no-collect")
    drain(cluster)
    (log,) = (tmp_path / "sweep" / "logs").iterdir()
    run = load_sweep(file).run_folder(load_sweep(file).points[0])
    assert (run / "result.json").exists(), log.read_text()
    assert json.loads((run / "result.json").read_text())["world_size"] == 2
