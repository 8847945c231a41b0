"""Runs that are killed at any moment and started again until they are done end where an undisturbed run ends.

The processes are forked from a server that has imported everything, so that a life costs a fraction of a second.
"""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from dist_defend.cli import PREEMPTED, main
from tests.runs import make_experiment, metrics, options_of, untimed

KILLS = 12
PATIENCE = 60.0  # seconds without any progress
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    ["dist_defend.experiment", "dist_defend.methods.defend.mimic", "dist_defend.methods.pretrain.simclr"]
)


def live(config: str, log: str, environment: dict[str, str]) -> None:
    """The life of one rank: what `python -m dist_defend run CONFIG` does, told to a file; notes every batch it sees."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from dist_defend.engine.step import GradientStep

    update = GradientStep.__call__

    def noted(self: GradientStep, batch: Any, at: Any) -> Any:
        with Path(f"{log}.{environment.get('RANK', '0')}").open("a") as file:
            file.write(json.dumps(batch.index.tolist()) + "\n")
        return update(self, batch, at)

    GradientStep.__call__ = noted  # type: ignore[method-assign]
    raise SystemExit(main(["run", config]))


def start(config: Path, ranks: int, life: Any = live, *first: Any) -> list[BaseProcess]:
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        process = _server.Process(target=life, args=(*first, str(config), str(config) + ".log", environment | own))
        process.start()
        processes.append(process)
    return processes


def end(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(PATIENCE)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def await_lines(run: Path, count: int, processes: list[BaseProcess]) -> None:
    """Wait until metrics.jsonl has changed so many times, or a process has ended."""
    path, size, changes, since = run / "metrics.jsonl", -1, -1, time.monotonic()
    while changes < count and all(process.is_alive() for process in processes):
        assert time.monotonic() - since < PATIENCE, "no progress"
        now = path.stat().st_size if path.exists() else 0
        if now != size:
            size, changes, since = now, changes + 1, time.monotonic()
        time.sleep(0.002)


def signal_all(processes: list[BaseProcess], which: int) -> None:
    for process in processes:
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, which)


def outcome(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """Digest of the final weights, and what was logged without the times."""
    rows = untimed(run)
    return hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest(), rows


def experiment(folder: Path, method: str, epochs: int, name: str) -> tuple[Path, Path]:
    """An experiment with a checkpoint after every step, and its run folder."""
    options = options_of(method, folder / "inputs")
    options["update"]["epochs"] = epochs
    trainer = {"log_every": 1, "checkpoint_every": 1, "trackers": []}
    config = make_experiment(folder / name, method, options, trainer=trainer)
    return config, folder / name / "run"


def finish(config: Path, ranks: int) -> None:
    """Run to the end without a disturbance."""
    log = Path(str(config) + ".log")
    assert end(start(config, ranks)) == [0] * ranks, log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "epochs", "ranks"), [("mimic", 28, 1), ("simclr", 30, 2)])
def test_killed_at_random_and_restarted(method: str, epochs: int, ranks: int, tmp_path: Path) -> None:
    config, run = experiment(tmp_path, method, epochs, "undisturbed")
    finish(config, ranks)
    expected = outcome(run)
    config, run = experiment(tmp_path, method, epochs, "killed")
    draw, kills, torn = random.Random(7), 0, 0
    while kills < KILLS:
        processes = start(config, ranks)
        await_lines(run, draw.choice([0, 1, 1, 2, 3]), processes)
        time.sleep(draw.uniform(0, 0.06))
        draw.shuffle(processes)
        signal_all(processes, signal.SIGKILL)
        codes = end(processes)
        assert codes != [0] * ranks, "the run was over before it was killed often enough"
        assert -signal.SIGKILL in codes, Path(str(config) + ".log").read_text()
        kills += 1
        torn += bool(list(run.glob("checkpoints/.writing_*")))
        assert not (run / "result.json").exists()
    finish(config, ranks)
    assert torn > 0, "no kill hit a checkpoint while it was written"
    assert outcome(run) == expected


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_and_the_same_command_resumes(ranks: int, tmp_path: Path) -> None:
    config, run = experiment(tmp_path, "simclr", 4, "undisturbed")
    finish(config, ranks)
    expected = outcome(run)
    config, run = experiment(tmp_path, "simclr", 4, "stopped")
    processes = start(config, ranks)
    await_lines(run, 3, processes)
    signal_all(processes[-1:], signal.SIGTERM)  # one rank is told; all of them stop
    assert end(processes) == [PREEMPTED] * ranks
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    assert 3 <= int(newest.name[5:]) == len(metrics(run)) < 8
    tensors = newest / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    finish(config, ranks)
    assert f"checkpoint {newest} is not used: tensors.safetensors" in Path(str(config) + ".log").read_text()
    assert outcome(run) == expected


def batches_seen(config: Path, rank: int = 0) -> list[list[int]]:
    path = Path(f"{config}.log.{rank}")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_resume_on_another_number_of_ranks_keeps_the_order(tmp_path: Path) -> None:
    config, _ = experiment(tmp_path, "simclr", 4, "undisturbed")
    finish(config, 1)
    expected = batches_seen(config)
    assert len(expected) == 8
    config, run = experiment(tmp_path, "simclr", 4, "moved")
    processes = start(config, 2)
    await_lines(run, 3, processes)
    signal_all(processes, signal.SIGTERM)
    assert end(processes) == [PREEMPTED] * 2
    together = [a + b for a, b in zip(batches_seen(config, 0), batches_seen(config, 1), strict=True)]
    assert together == expected[: len(together)]
    finish(config, 1)
    alone = batches_seen(config)[len(together) :]
    assert together + alone == expected
    assert [row["step"] for row in metrics(run)] == list(range(1, 9))
