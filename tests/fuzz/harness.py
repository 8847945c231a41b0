"""Feeds broken files to what reads them: each is read or refused by one printable line, in bounded time and memory.

A surface is a function ``(random, folder) -> read``: it writes one input into the empty folder, drawing what is wrong
with it from ``random``, and returns what reads it. Input n of a surface is the same on every machine. By hand:

    python -m tests.fuzz.harness tests.fuzz.test_import:archive,shards --count 5000      # of each; or --only 417
"""

import argparse
import contextlib
import faulthandler
import importlib
import io
import itertools
import json
import logging
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from dist_defend.errors import UserError

Surface = Callable[[random.Random, Path], Callable[[], object]]
ROOT = Path(__file__).parents[2]
CPU_SECONDS, SECONDS = 10, 120  # for one input; the second only ends what waits for ever
MEBIBYTES = 256  # beside four times the size of the input
MOST_LINE = 2000  # characters of the line that refuses


def bad_outcomes(surfaces: str, count: int) -> list[str]:
    """Read inputs 0 to count - 1 of each surface (``module:function,function``) in a process of their own.

    What went wrong, a text each.
    """
    bad: list[str] = []
    start = 0
    with tempfile.TemporaryDirectory() as folder:
        while True:
            at = Path(folder) / "at"
            command = [sys.executable, "-m", "tests.fuzz.harness", surfaces]
            command += ["--start", str(start), "--count", str(count), "--at", str(at)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            bad += [json.loads(line) for line in done.stdout.splitlines() if line.startswith('"')]
            if done.returncode in (0, 1):
                return bad
            how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit {done.returncode}"
            place, _, told = at.read_text().partition(" ") if at.exists() else (str(start), "", "before any input")
            bad.append(f"{told}: {how}\n{done.stderr[-2000:]}")
            start = int(place) + 1


def outcome(surface: Surface, name: str, number: int) -> str | None:
    """What is wrong with how input ``number`` was read, None for nothing."""
    folder = Path(tempfile.mkdtemp())
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger("dist_defend").addHandler(handler)
    try:
        read = surface(random.Random(f"{name}/{number}"), folder)
        most = 4 * sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) + (MEBIBYTES << 20)
        before = _reset_peak()
        told = io.StringIO()
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # nothing handles them: they end the process
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                read()
        except UserError as error:
            line = str(error)
            if not line.isprintable() or len(line) > MOST_LINE:
                return f"refused by no printable line: {line[:MOST_LINE]!r}"
        except Exception:
            return traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        used = _peak() - before
        if before and used > most:
            return f"took {used >> 20} MiB of memory, {most >> 20} are allowed"
        text = told.getvalue() + log.getvalue()
        if any(not (c.isprintable() or c in "\n\t") for c in text):
            return f"control characters on the terminal: {text[:MOST_LINE]!r}"
        return None
    finally:
        logging.getLogger("dist_defend").removeHandler(handler)
        shutil.rmtree(folder, ignore_errors=True)


def _reset_peak() -> int:
    """Make the peak of resident memory the present one; bytes, 0 where the kernel cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return _peak()


def _peak() -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) << 10


def main() -> int:
    """Print each bad outcome as a JSON string; 1 if there was one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("surfaces", help="module:function,function,...")
    parser.add_argument("--start", type=int, default=0, help="pass over so many inputs of all")
    parser.add_argument("--count", type=int, default=5000, help="inputs of each surface")
    parser.add_argument("--only", type=int, help="this one input")
    parser.add_argument("--at", help="file that tells the input being read")
    args = parser.parse_args()
    faulthandler.enable()
    module, _, names = args.surfaces.partition(":")
    numbers = range(args.count) if args.only is None else [args.only]
    num_bad = 0
    for place, (name, number) in enumerate(itertools.product(names.split(","), numbers)):
        if place < args.start:
            continue
        told = f"{module}:{name} --only {number}"
        if args.at:
            Path(args.at).write_text(f"{place} {told}")
        wrong = outcome(getattr(importlib.import_module(module), name), name, number)
        if wrong is not None:
            num_bad += 1
            print(json.dumps(f"{told}: {wrong}"), flush=True)
    print(f"{num_bad} bad outcomes", file=sys.stderr)
    return 1 if num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
