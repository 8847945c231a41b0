"""Fewer ranks than before, a rank that dies under torchrun, a full disk: the run goes on, or says why it does not."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dist_defend.cli import PREEMPTED, main
from dist_defend.engine import checkpoint
from tests.e2e.test_kill import _server, batches_seen, end, live, outcome
from tests.e2e.test_kill import start as start_ranks
from tests.runs import make_classifier, make_data, make_experiment, metrics, options_of

STEPS = 12  # 4 epochs of 3 batches


def experiment(folder: Path, name: str, **changes: Any) -> tuple[Path, Path]:
    options = options_of("simclr", folder / "inputs")
    options["data"]["max_samples"] = 24
    options["update"] |= {"batch_size": 8, "epochs": 4}
    trainer = {"log_every": 1, "checkpoint_every": 1, "trackers": []}
    config = make_experiment(folder / name, "simclr", options, **{"trainer": trainer, **changes})
    return config, folder / name / "run"


def live_until(step: int, *arguments: Any) -> None:
    """The life of a rank that is told to stop while it makes that update (counted from 0)."""
    from dist_defend.engine.step import GradientStep

    update = GradientStep.__call__

    def warned(self: GradientStep, batch: Any, at: Any) -> Any:
        if at.done(self.steps_per_epoch) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, batch, at)

    GradientStep.__call__ = warned  # type: ignore[method-assign]
    live(*arguments)


class StopsAt:
    """tests.e2e.test_kill's way to start ranks, with a life that ends after so many updates."""

    def __init__(self, step: int) -> None:
        self.step = step

    def Process(self, target: Any, args: Any) -> Any:
        return _server.Process(target=live_until, args=(self.step, *args))


@pytest.mark.slow
def test_four_ranks_then_two_then_one_in_the_middle_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, whole = experiment(tmp_path, "undisturbed", precision="fp64")
    assert end(start_ranks(config, 1)) == [0]
    expected = batches_seen(config)
    assert len(expected) == STEPS
    config, run = experiment(tmp_path, "shrinking", precision="fp64")
    seen: list[list[int]] = []
    for ranks, stop_after in ((4, 2), (2, 7)):  # updates done: 2 and 7, the first batches of epochs are 0, 3, 6, 9
        with monkeypatch.context() as patch:
            patch.setattr("tests.e2e.test_kill._server", StopsAt(stop_after - 1))
            processes = start_ranks(config, ranks)
        assert end(processes) == [PREEMPTED] * ranks, Path(f"{config}.log").read_text()
        shares = [batches_seen(config, rank) for rank in range(ranks)]
        seen += [list(chain(*parts)) for parts in zip(*shares, strict=True)][-(stop_after - len(seen)) :]
        for rank in range(ranks):
            Path(f"{config}.log.{rank}").unlink()
    assert end(start_ranks(config, 1)) == [0]
    assert seen + batches_seen(config) == expected
    mine, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, whole))
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-9, atol=1e-11)
    assert [row["step"] for row in metrics(run)] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_the_launcher_starts_all_ranks_again_when_one_is_killed(tmp_path: Path) -> None:
    config, run = experiment(tmp_path, "undisturbed")
    assert end(start_ranks(config, 2)) == [0, 0]
    expected = outcome(run)
    config, run = experiment(tmp_path, "killed")
    command = [sys.executable, "-m", "dist_defend", "launch", str(config), "--ranks", "2", "--max-restarts", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            kill_a_rank(launcher.pid, run / "metrics.jsonl")
            assert launcher.wait(timeout=240) == 0, (tmp_path / "log").read_text()
        finally:
            for process in [*psutil.Process().children(recursive=True)]:
                if process.pid == launcher.pid or launcher.pid in [p.pid for p in process.parents()]:
                    process.kill()
            launcher.wait()
    assert "resumed at step" in (tmp_path / "log").read_text()
    assert outcome(run) == expected


def kill_a_rank(launcher: int, rows: Path) -> None:
    """SIGKILL rank 1, a descendant of the launcher, once a few lines are written."""
    deadline = time.monotonic() + 240
    while not rows.exists() or rows.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < deadline and psutil.Process(launcher).status() != psutil.STATUS_ZOMBIE
        time.sleep(0.01)
    for process in psutil.Process(launcher).children(recursive=True):
        if process.environ().get("RANK") == "1":
            process.kill()
            return
    raise AssertionError("rank 1 was over before it was killed")


def live_with_little_room(limit: int, *arguments: Any) -> None:
    """The life of a rank whose files may have so many bytes at most: the kernel refuses the rest, as a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    live(*arguments)


class LittleRoom:
    def __init__(self, limit: int) -> None:
        self.limit = limit

    def Process(self, target: Any, args: Any) -> Any:
        return _server.Process(target=live_with_little_room, args=(self.limit, *args))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_ends_the_run_with_one_line_on_every_rank(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = experiment(tmp_path, "full")
    with monkeypatch.context() as patch:
        patch.setattr("tests.e2e.test_kill._server", LittleRoom(1 << 20))
        processes = start_ranks(config, ranks)
    assert end(processes) == [1] * ranks
    told = Path(f"{config}.log").read_text()
    assert "failed: cannot write the checkpoint of step 1 to" in told
    assert "start the same command, which goes on from the start" in told
    assert "Traceback" not in told
    assert list((run / "checkpoints").iterdir()) == []
    assert main(["run", str(config)]) == 0
    assert json.loads((run / "result.json").read_text())["world_size"] == 1


def test_a_failed_save_names_what_is_left(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"a": torch.zeros(3)})
    blocked = tmp_path / f".writing_{os.getpid()}"
    blocked.write_text("a file where the folder should be")
    with pytest.raises(checkpoint.SaveError, match=r"step 2 .* goes on from step_000000001"):
        checkpoint.save(tmp_path, 2, {"a": torch.zeros(3)})
    assert checkpoint.newest(tmp_path) == tmp_path / "step_000000001"


@pytest.mark.parametrize("method", ["simclr", "badencoder", "mimic", "probe", "classifier", "kd", "ood", "ibau", "rnp"])
def test_killed_between_the_last_step_and_the_result(method: str, tmp_path: Path) -> None:
    """The last checkpoint holds all that the result is made of."""
    attack = {"trigger": {"name": "badnets"}, "target_class": 1}
    if method in ("ibau", "rnp"):
        data, test = (
            {"path": make_data(tmp_path / "data"), "max_samples": 12},
            {"path": make_data(tmp_path / "test", 9)},
        )
        options: dict[str, Any] = {"data": data, "test": test, "attack": attack}
        options["model"] = make_classifier(tmp_path / "model")
        few = {"unlearning_epochs": 1, "recovering_epochs": 2, "recovering_lr": 5.0, "not_unlearned": "use_last"}
        options |= {"rounds": 1} if method == "ibau" else {"batch_size": 8, "clean_threshold": 0.0, **few}
    else:
        options = options_of(method, tmp_path / "inputs")
    config, run = make_experiment(tmp_path, method, options), tmp_path / "run"
    assert main(["run", str(config)]) == 0
    expected = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    shutil.rmtree(run / "model", ignore_errors=True)
    assert main(["run", str(config)]) == 0
    found = json.loads((run / "result.json").read_text())
    same = [key for key in ("model_sha256", "rows", "metrics") if key in expected]
    assert same and {key: found[key] for key in same} == {key: expected[key] for key in same}
