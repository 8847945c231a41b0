"""The points of a sweep on this machine, so many at a time, each on a GPU of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from dist_defend import lifeline
from dist_defend.sweep import several
from dist_defend.sweep.grid import Point, Sweep

STOPPED, INTERRUPTED = lifeline.STOPPED  # as dist-defend run: the same command goes on


def command(sweep: Sweep, point: Point) -> list[str]:
    """What runs a point."""
    file = f"{sweep.folder}/points/{point.key}.yaml"
    ranks = point.experiment.world_size or 1
    if ranks == 1:
        return [sys.executable, "-m", "dist_defend", "run", file]
    return [sys.executable, "-m", "dist_defend", "launch", file, "--ranks", str(ranks)]


def run(
    sweep: Sweep, points: Sequence[Point], at_a_time: int | None, command: Callable[[Sweep, Point], list[str]] = command
) -> int:
    """Run them, parents before what comes after them; returns 0, 1 if some failed, 75 if a signal ended it, 130 SIGINT.

    at_a_time: None is one per GPU, or one. More than GPUs share them in turn; without GPUs they share the cores.
    The points save before it returns; a second SIGINT kills them. They end with this process, however it ends.
    """
    gpus = _gpus()
    slots = list(range(at_a_time or len(gpus) or 1))
    runner = _Runner(sweep, points, gpus, slots, command)
    with lifeline.handled(runner.stop):
        return runner.run()


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
        self.running: dict[int, tuple[subprocess.Popen[bytes], list[Point]]] = {}  # by slot
        self.failed = 0
        self.signals: list[int] = []

    def run(self) -> int:
        (self.sweep.folder / "logs").mkdir(parents=True, exist_ok=True)
        while self.running or (self.queue and not self.signals):
            while self.free and not self.signals and (points := self._next()):
                self._start(points, self.free.pop(0))
            time.sleep(0.05)
            for slot, (process, points) in list(self.running.items()):
                if process.poll() is not None:
                    del self.running[slot]
                    self.free.append(slot)
                    self._end(points, slot, process.returncode)
        if not self.signals:
            return min(1, self.failed)
        print("stopped: what ran has saved, `sweep resubmit --local` goes on", flush=True)
        return INTERRUPTED if self.signals[0] == signal.SIGINT else STOPPED

    def stop(self, number: int, frame: object) -> None:
        """Ask every running point to save; no more are started."""
        self.signals.append(number)
        is_urgent = self.signals.count(signal.SIGINT) > 1
        for process, _ in self.running.values():
            process.send_signal(signal.SIGKILL if is_urgent else signal.SIGTERM)

    def _next(self) -> list[Point]:
        """The first whose parent is done, and what shares its process. One whose parent failed is left out."""
        busy = {point.key for _, points in self.running.values() for point in points}
        busy |= {point.key for point in self.queue}
        for point in list(self.queue):
            if self._is_ready(point):
                chosen = self._together(point)
                self.queue = [other for other in self.queue if other not in chosen]
                return chosen
            if point.parent is not None and point.parent.key not in busy:
                self.queue.remove(point)
                busy.discard(point.key)
                self._tell(point, f"left out: {point.parent.key} of stage {point.parent.stage} has no result")
        return []

    def _is_ready(self, point: Point) -> bool:
        return point.parent is None or self.sweep.is_done(point.parent)

    def _together(self, first: Point) -> list[Point]:
        """With what the stage's points_per_job adds, as long as no other place would stay empty."""
        most = self.sweep.config.stages[first.stage].points_per_job
        if most == 1:
            return [first]
        ready = [point for point in self.queue if point.stage == first.stage and self._is_ready(point)]
        return ready[: min(most, -(-len(ready) // self.places))]

    def _start(self, points: list[Point], slot: int) -> None:
        environment = os.environ | {"PYTHONSAFEPATH": "1"}  # as Slurm's jobs have it
        environment[lifeline.STARTER] = str(os.getpid())
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        else:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.places)))
        log, program = self._log(points[0]), self.command(self.sweep, points[0])
        if len(points) > 1:
            self._tried(slot).unlink(missing_ok=True)
            log = self.sweep.folder / "logs" / f"local_{slot}.log"
            program = several.command(self.sweep.folder, str(self._tried(slot)), [point.key for point in points])
        with log.open("ab") as file:
            options = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file, "env": environment}
            # A session of its own: the terminal's Ctrl-C reaches the runner alone, which passes it on.
            process = subprocess.Popen(program, start_new_session=True, **options)  # type: ignore[call-overload]
        self.running[slot] = process, points
        if self.signals:  # it came in between
            process.send_signal(signal.SIGTERM)

    def _end(self, points: list[Point], slot: int, status: int) -> None:
        if len(points) == 1:
            self._end_one(points[0], status)
            return
        tried = self._tried(slot).read_text(encoding="ascii").split() if self._tried(slot).exists() else []
        self._tried(slot).unlink(missing_ok=True)
        begun = [point for point in points if point.key in tried] or points  # or it did not come as far as the first
        for point in points:
            if self.sweep.is_done(point):
                self._tell(point, "done")
            elif point in begun and (own := several.exit_status(self._log(point))) is not None:
                self.failed += 1
                self._tell(point, f"exit {own}, see {self._log(point)}")
            elif point in begun:
                self._end_one(point, status or 1)
        # Those behind one that was killed:
        self.queue = [p for p in points if p not in begun and not self.sweep.is_done(p)] + self.queue

    def _end_one(self, point: Point, status: int) -> None:
        self.failed += status != 0
        with self._log(point).open("a") as log:
            log.write(f"local: exit {status}\n")
        self._tell(point, "done" if status == 0 else f"exit {status}, see {self._log(point)}")

    def _tried(self, slot: int) -> Path:
        return self.sweep.folder / "logs" / f"local_{slot}.tried"

    def _log(self, point: Point) -> Path:
        return self.sweep.folder / "logs" / f"{point.key}.log"

    def _tell(self, point: Point, what: str) -> None:
        left = len(self.queue) + sum(len(points) for _, points in self.running.values())
        print(f"{self.total - left}/{self.total} {point.stage} {point.key} ({point.name}): {what}", flush=True)


def _gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    return [str(number) for number in range(torch.cuda.device_count())]
