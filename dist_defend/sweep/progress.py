"""What has become of each point: its own result is the truth, Slurm's word and the logs explain the rest."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dist_defend.config import dump
from dist_defend.files import write_atomic
from dist_defend.lifeline import STOPPED
from dist_defend.sweep import several, slurm
from dist_defend.sweep.grid import Point, Sweep

State = Literal["done", "running", "waiting", "failed", "missing"]
STATES: tuple[State, ...] = ("done", "running", "waiting", "failed", "missing")
_NOISE = ("guard:", "local:", "points:", "srun:", "slurmstepd:", "slurmd", "Traceback", "  ")
_ENDS = ("guard: exit", "local: exit", "points: exit", "guard: restarted", "guard: cut")
_TAIL = 8192  # bytes of a log that are looked at


@dataclass(frozen=True)
class Progress:
    """A point's state; for a failed one the reason, and its log where there is one."""

    state: State
    reason: str = ""
    log: Path | None = None
    is_taken: bool = False  # its job has other points and is not over: it may yet try this one again


def survey(sweep: Sweep) -> tuple[dict[str, Progress], dict[str, slurm.Task]]:
    """Point key -> progress, and point key -> its newest array task. UserError if Slurm does not answer."""
    tasks = slurm.last_tasks(sweep)
    return {point.key: _progress(sweep, point, tasks.get(point.key)) for point in sweep.points}, tasks


def to_submit(sweep: Sweep, progress: dict[str, Progress], again: bool) -> tuple[list[Point], list[Point]]:
    """(points to submit, points that cannot run before an earlier stage's failed point is run again).

    Those that were never tried; with ``again`` also those that failed. What is done, runs or waits is left alone.
    """
    wanted = {"missing", "failed"} if again else {"missing"}
    chosen: dict[str, Point] = {}
    blocked = []
    for point in sweep.points:
        if progress[point.key].state not in wanted or progress[point.key].is_taken:
            continue
        parent = point.parent
        if parent is None or parent.key in chosen or progress[parent.key].state in ("done", "running", "waiting"):
            chosen[point.key] = point
        else:
            blocked.append(point)
    return list(chosen.values()), blocked


def write_points(sweep: Sweep, points: Sequence[Point]) -> None:
    """manifest.json with all points of the sweep, and points/<key>.yaml, the whole experiment, of each of these."""
    folder = sweep.folder / "points"
    folder.mkdir(parents=True, exist_ok=True)
    manifest = [
        {"key": p.key, "stage": p.stage, "labels": p.labels, "parent": p.parent and p.parent.key} for p in sweep.points
    ]
    write_atomic(sweep.folder / "manifest.json", json.dumps(manifest, indent=1))
    for point in points:
        write_atomic(
            folder / f"{point.key}.yaml", f"# {point.stage}: {' '.join(point.name.split())}\n{dump(point.experiment)}"
        )


def _progress(sweep: Sweep, point: Point, task: slurm.Task | None) -> Progress:
    if sweep.is_done(point):
        return Progress("done")
    logs = [sweep.folder / "logs" / f"{point.key}.log"]
    if task is not None and task.shared_since is not None and logs[0].exists():
        is_begun = logs[0].stat().st_mtime >= task.shared_since
        logs = logs if is_begun else []
    else:
        is_begun = False
    if task is not None and task.is_active:
        if task.state in slurm.WAITING or (task.shared_since is not None and not is_begun):
            return Progress("waiting")
        status = several.exit_status(logs[0]) if is_begun else None
        if status is None or status in STOPPED:
            return Progress("running" if status is None else "waiting")
        return Progress("failed", _reason(logs[0], None), logs[0], is_taken=True)
    if task is not None and not is_begun:
        logs.append(sweep.folder / "logs" / f"{task.job}_{task.index}.log")
    logs = sorted((log for log in logs if log.exists()), key=lambda log: log.stat().st_mtime)
    if logs:
        return Progress("failed", _reason(logs[-1], task), logs[-1])
    if task is not None and task.state is not None:
        return Progress("failed", f"Slurm says {task.state}")
    return Progress("missing")


def _reason(log: Path, task: slurm.Task | None) -> str:
    """One line."""
    told = log.read_bytes()[-_TAIL:].decode(errors="replace").splitlines()
    has_end = any(line.startswith(_ENDS) for line in told[-3:])
    if task is not None and task.state not in (None, "FAILED", "COMPLETED"):
        was_cut = task.shared_since is not None and not has_end  # while this one of its points ran
        if was_cut or log.stem == f"{task.job}_{task.index}":
            return f"Slurm says {task.state}"
    if not has_end:
        return "its log has no end: killed, or still running on this machine"
    words = [line for line in told if line.strip() and not line.startswith(_NOISE)]
    return words[-1] if words else told[-1]
