"""Several points of a sweep one after another in one process, for points shorter than their start.

Usage: python -m dist_defend several FOLDER TRIED KEY...    for sweeps alone: dist-defend's help does not name it

What a point prints goes to logs/KEY.log, which ends with its exit status. Points that have a result are passed over.
TRIED is a file that lists what this job has begun; these are passed over too. So where a point kills the process, the
same command goes on behind it. After a point that failed in an unforeseen way the process starts afresh: nothing left
in memory or on the device reaches the next point.
Exit status: 0; 1 if a point has no result in the end; 75 or 130 after a signal, when the running point has saved.
"""

import gc
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from dist_defend import lifeline

WORD = "several"
_FORESEEN = (0, 2)  # done; bad input, found before anything was built


def command(folder: Path, tried: str, keys: Sequence[str]) -> list[str]:
    """What runs these points of the sweep in the folder."""
    return [sys.executable, "-m", "dist_defend", WORD, str(folder), tried, *keys]


def main(argv: Sequence[str], run: Callable[[list[str]], int]) -> int:
    """Run them; returns the exit status. run: arguments of ``dist-defend`` -> exit status."""
    folder, tried, keys = Path(argv[0]), Path(argv[1]), argv[2:]
    begun = tried.read_text(encoding="ascii").split() if tried.exists() else []
    for number, key in enumerate(keys, 1):
        if key in begun or _is_done(folder, key):
            continue
        with tried.open("a", encoding="ascii") as file:
            file.write(f"{key}\n")
        print(f"points: {number}/{len(keys)} {key} begins, {time.strftime('%F %T')}", flush=True)
        status = _run(folder, key, run)
        print(f"points: {number}/{len(keys)} {key}: {f'exit {status}' if status else 'done'}", flush=True)
        if status in lifeline.STOPPED:
            return status
        if status not in _FORESEEN:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return 0 if all(_is_done(folder, key) for key in keys) else 1


def exit_status(log: Path) -> int | None:
    """What a point's log ends with; None where the point was killed, or is running."""
    lines = log.read_bytes()[-200:].splitlines() if log.exists() else []
    found = re.fullmatch(rb"points: exit (-?\d+)", lines[-1]) if lines else None
    return int(found[1]) if found else None


def _is_done(folder: Path, key: str) -> bool:
    return (folder / "points" / key / "result.json").exists()


def _run(folder: Path, key: str, run: Callable[[list[str]], int]) -> int:
    """The exit status of `dist-defend run`; everything that it prints, from C too, goes to the point's log."""
    environment = dict(os.environ)
    kept = _redirect(folder / "logs" / f"{key}.log")
    try:
        status = run(["run", f"{folder}/points/{key}.yaml"])
    except KeyboardInterrupt:
        status = 130
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except Exception:
        traceback.print_exc()
        status = 1
    finally:
        print(f"\npoints: exit {status}")
        _restore(kept)
    os.environ.clear()
    os.environ.update(environment)
    _free_memory()
    return status


def _redirect(log: Path) -> tuple[int, int]:
    """Send both streams to the file; returns what they were."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    return kept


def _restore(kept: tuple[int, int]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for stream, number in enumerate(kept, 1):
        os.dup2(number, stream)
        os.close(number)


def _free_memory() -> None:
    """Give the next point an empty device, and a peak of its own."""
    import torch

    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
