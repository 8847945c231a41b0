"""dist-defend runs [DIR]: what each run folder below it is doing, as far as its own files tell.

A run is running while a process holds its folder's lock, which the kernel gives back however that process ends. What
cannot be seen from here is said to be unknown.
"""

import argparse
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_defend.counts import Count, told
from dist_defend.engine.run import END
from dist_defend.errors import UserError
from dist_defend.lock import FolderLock
from dist_defend.results import read_inside, read_metrics, read_result
from dist_defend.screen import printable
from dist_defend.strict_json import parse_json
from dist_defend.terminal import put

STATES = {  # in the order in which they are shown: colour
    "running": "blue",
    "failed": "red",
    "cut off": "red",
    "damaged": "red",
    "unknown": "yellow",
    "stopped": "yellow",
    "finished": "green",
}
_AGAIN = "the same command goes on"
_TAIL = 1 << 16  # bytes of metrics.jsonl: its newest lines
_MOST_BYTES = 1 << 20
_LEFT_OUT = ("checkpoints", "model", "dist_defend", "wandb")  # folders of a run, which hold no others


@dataclass(frozen=True)
class Look:
    """What a run folder tells. state: one of STATES. told: a line."""

    folder: Path
    state: str
    told: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill the command's parser."""
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Print a line for each run and how many there are of each state; 0. UserError for a folder that is not there."""
    if not os.path.isdir(args.folder):
        raise UserError(f"{args.folder} is not a folder: name one that holds runs (key 'output' of their files)")
    looks = sorted(map(look, run_folders(args.folder)), key=lambda one: (list(STATES).index(one.state), one.folder))
    if not looks:
        print(f"no runs below {args.folder}")
        return 0
    wide = max(len(printable(one.folder)) for one in looks)
    for one in looks:
        put(sys.stdout, one.state.ljust(8), STATES[one.state])
        print(f"  {printable(one.folder).ljust(wide)}  {printable(one.told)}")
    counts = Counter(one.state for one in looks)
    print(f"\n{len(looks)} runs: " + ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]))
    return 0


def run_folders(top: Path) -> Iterator[Path]:
    """Each folder that a run has begun to write, ``top`` too; links are not followed."""
    for at, inner, files in os.walk(top):
        if "config.json" in files or "result.json" in files:
            yield Path(at)
            inner[:] = [name for name in inner if name not in _LEFT_OUT]
        inner[:] = sorted(name for name in inner if not name.startswith("."))


def look(folder: Path) -> Look:
    """What the folder's files and its lock tell. Nothing is written."""
    is_held, holder = FolderLock(folder).look()
    try:
        if (folder / "result.json").exists() and not is_held:
            return Look(folder, "finished", _outcome(folder))
        last = _newest(folder)
        if is_held:
            where = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
            job = f", job {holder['job']}" if "job" in holder else ""
            return Look(folder, "running", f"{where}{job}; {last}")
        end = _end(folder)
        if end is not None:
            return Look(folder, end["state"], end["told"])
    except UserError as error:
        return Look(folder, "damaged", str(error))
    if is_held is None:
        return Look(folder, "unknown", f"the file system has no locks, so nobody can tell whether it runs; {last}")
    if holder and holder["host"] != socket.gethostname():
        seen = f"its last process was on {holder['host']}; whether that still runs is not seen from here"
        return Look(folder, "unknown", f"{seen}; {last}")
    return Look(folder, "cut off", f"its process is gone and told nothing (killed, or the machine); {last}; {_AGAIN}")


def _outcome(folder: Path) -> str:
    """What result.json counts, of a defence before and after, and the seconds."""
    result = read_result(folder / "result.json", "delete it and start the run again")
    rows, metrics = result["rows"], result["metrics"]
    before = {name: metrics[f"{name}_before"] for name in ("acc", "asr") if f"{name}_before" in metrics}
    parts = [f"{result['method']}"] if "method" in result else []
    if len(rows) == 1 or (rows and before):
        counts = {name: Count(**rows[0][name]) for name in ("acc", "asr")}
        parts.append(f"{rows[0]['task']}: {told(counts, before)}")
    elif rows:
        parts.append(f"{len(rows)} rows: dist-defend report shows them")
    if "wall_seconds" in result:
        parts.append(_span(result["wall_seconds"]))
    return ", ".join(parts)


def _newest(folder: Path) -> str:
    """Where the run stood when it last wrote, what it measured last, and how long ago that was."""
    file = folder / "metrics.jsonl"
    lines = read_metrics(_tail(file), str(file), "delete the folder and start again")[0]
    parts = []
    if lines:
        newest = lines[-1]
        measured: dict[str, Any] = next((line for line in reversed(lines) if "acc" in line), {})
        parts.append(f"stage {newest['stage']}, step {newest['step']}")
        parts += [
            f"{name} {measured[name]:.2f} at step {measured['step']}" for name in ("acc", "asr") if name in measured
        ]
    signs = [(folder / name).lstat().st_mtime for name in ("metrics.jsonl", "log.txt") if (folder / name).is_file()]
    parts.append(f"last sign {_span(time.time() - max(signs))} ago" if signs else "no sign of it yet")
    return ", ".join(parts)


def _tail(file: Path) -> bytes:
    """The newest whole lines of a file that grows; nothing of one that is not there, or none of the folder's own."""
    if not file.is_file() or file.is_symlink():
        return b""
    with file.open("rb") as opened:
        begin = max(0, opened.seek(0, os.SEEK_END) - _TAIL)
        opened.seek(begin)
        content = opened.read(_TAIL)
    return content if begin == 0 else content.partition(b"\n")[2]


def _end(folder: Path) -> dict[str, Any] | None:
    """What end.json tells; None without one."""
    content = read_inside(folder / END, _MOST_BYTES)
    if content is None:
        return None
    end = parse_json(content, folder / END, "delete it")
    if (
        not isinstance(end, dict)
        or end.get("state") not in ("stopped", "failed")
        or not isinstance(end.get("told"), str)
    ):
        raise UserError(f"{folder / END} tells no end (keys state, told): delete it")
    return end


def _span(seconds: float) -> str:
    """So many seconds, in the two largest units that matter."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    first = next((n for n, (count, _) in enumerate(units) if count), len(units) - 1)
    return " ".join(f"{count:.0f} {unit}" for count, unit in units[first : first + 2])
