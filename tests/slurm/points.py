"""Experiments of a few seconds, most of which is Python's start, and what is read off their run folders."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.runs import make_data, make_experiment, metrics, options_of, untimed
from tests.slurm.cluster import Cluster


def classifier(folder: Path, epochs: int = 1, **trainer: Any) -> Path:
    """An experiment file of two updates an epoch."""
    options = options_of("classifier", folder / "inputs")
    options["update"]["epochs"] = epochs
    return make_experiment(folder, "classifier", options, trainer={"log_every": 1, "trackers": [], **trainer})


def defence(folder: Path) -> Path:
    """RNP with two updates, on the data of ``classifier``; the model is for a sweep to set."""
    data, test = make_data(folder / "inputs" / "data"), make_data(folder / "inputs" / "test", 13, seed=1)
    options = {"model": "set by the sweep", "data": {"path": data, "max_samples": 8}, "test": {"path": test}}
    return make_experiment(folder, "rnp", {**options, "unlearning_epochs": 1, "recovering_epochs": 1})


def write_sweep(folder: Path, content: dict[str, Any]) -> Path:
    """folder/sweep.yaml, whose points go to folder/sweep."""
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"output": str(folder / "sweep"), **content}, sort_keys=False))
    return path


def drain(cluster: Cluster, watch: Callable[[list[str]], None] = lambda states: None, timeout: float = 480.0) -> None:
    """Wait until the queue is empty; ``watch`` sees the states of what is in it all the while."""
    deadline = time.monotonic() + timeout
    while states := cluster.run("squeue", "-h", "-r", "--me", "-o", "%T").split():
        assert time.monotonic() < deadline, cluster.run("squeue", "-l")
        watch(states)
        time.sleep(0.3)


def await_(is_so: Callable[[], bool], what: str, timeout: float = 240.0) -> None:
    """Poll until it is so."""
    deadline = time.monotonic() + timeout
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def steps(run: Path) -> int:
    """How far a run's log has come."""
    return len(metrics(run)) if (run / "metrics.jsonl").exists() else 0


def outcome(run: Path) -> tuple[str, list[dict[str, Any]], Any]:
    """Digest of the final weights, what was logged without the times, what was counted."""
    rows = untimed(run)
    weights = hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest()
    return weights, rows, json.loads((run / "result.json").read_text()).get("rows")
