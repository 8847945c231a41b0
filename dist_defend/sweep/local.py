"""The points of a sweep on this machine, so many at a time, each on a GPU of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dist_defend.sweep.grid import Point, Sweep

STOPPED = 75  # as dist-defend run: the same command goes on


def command(sweep: Sweep, point: Point) -> list[str]:
    """What runs a point."""
    run = ["-m", "dist_defend", "run", f"{sweep.folder}/points/{point.key}.yaml"]
    ranks = point.experiment.world_size or 1
    if ranks == 1:
        return [sys.executable, *run]
    port = 20000 + int(point.key[:8], 16) % 10000
    launch = ["--nproc_per_node", str(ranks), "--master_addr", "127.0.0.1", "--master_port", str(port)]
    return [sys.executable, "-m", "torch.distributed.run", *launch, *run]


def run(
    sweep: Sweep,
    points: Sequence[Point],
    at_a_time: int | None,
    command: Callable[[Sweep, Point], list[str]] = command,
) -> int:
    """Run them, parents before what comes after them; returns 0, 1 if some failed, 75 if SIGINT or SIGTERM ended it.

    at_a_time: None is one per GPU, or one. More than GPUs share them in turn; without GPUs they share the cores.
    """
    gpus = _gpus()
    slots = list(range(at_a_time or len(gpus) or 1))
    runner = _Runner(sweep, points, gpus, slots, command)
    handlers = {number: signal.signal(number, runner.stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return runner.run()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _Runner:
    def __init__(
        self,
        sweep: Sweep,
        points: Sequence[Point],
        gpus: list[str],
        slots: list[int],
        command: Callable[[Sweep, Point], list[str]],
    ) -> None:
        self.command = command
        self.sweep, self.gpus, self.free, self.places = sweep, gpus, slots, len(slots)
        self.queue, self.total = list(points), len(points)
        self.running: dict[int, tuple[subprocess.Popen[bytes], Point]] = {}  # by slot
        self.failed = 0
        self.is_stopping = False

    def run(self) -> int:
        (self.sweep.folder / "logs").mkdir(parents=True, exist_ok=True)
        while self.running or (self.queue and not self.is_stopping):
            while self.free and not self.is_stopping and (point := self._next()):
                self._start(point, self.free.pop(0))
            time.sleep(0.05)
            for slot, (process, point) in list(self.running.items()):
                if process.poll() is not None:
                    del self.running[slot]
                    self.free.append(slot)
                    self._end(point, process.returncode)
        return STOPPED if self.is_stopping else min(1, self.failed)

    def stop(self, number: int, frame: object) -> None:
        """Ask every running point to save; no more are started."""
        self.is_stopping = True
        for process, _ in self.running.values():
            process.send_signal(signal.SIGTERM)

    def _next(self) -> Point | None:
        """The first whose parent is done. One whose parent failed is left out."""
        busy = {point.key for _, point in self.running.values()} | {point.key for point in self.queue}
        for point in list(self.queue):
            if point.parent is None or self.sweep.is_done(point.parent):
                self.queue.remove(point)
                return point
            if point.parent.key not in busy:
                self.queue.remove(point)
                busy.discard(point.key)
                self._tell(point, f"left out: {point.parent.key} of stage {point.parent.stage} has no result")
        return None

    def _start(self, point: Point, slot: int) -> None:
        environment = os.environ | {"PYTHONSAFEPATH": "1"}  # as Slurm's jobs have it
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        else:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.places)))
        with self._log(point).open("ab") as log:
            options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "env": environment}
            # A session of its own: the terminal's Ctrl-C reaches the runner alone, which passes it on.
            process = subprocess.Popen(self.command(self.sweep, point), start_new_session=True, **options)  # type: ignore[call-overload]
        self.running[slot] = process, point

    def _end(self, point: Point, status: int) -> None:
        self.failed += status != 0
        with self._log(point).open("a") as log:
            log.write(f"local: exit {status}\n")
        self._tell(point, "done" if status == 0 else f"exit {status}, see {self._log(point)}")

    def _log(self, point: Point) -> Path:
        return self.sweep.folder / "logs" / f"{point.key}.log"

    def _tell(self, point: Point, what: str) -> None:
        left = len(self.queue) + len(self.running)
        print(f"{self.total - left}/{self.total} {point.stage} {point.key} ({point.name}): {what}", flush=True)


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    return [str(number) for number in range(torch.cuda.device_count())]
