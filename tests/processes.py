"""Processes of a test, told apart from all others by a mark in their environment."""

import os
import time
import uuid
from pathlib import Path

MARK = "DIST_DEFEND_TEST_MARK"


def new_mark() -> dict[str, str]:
    """A variable for the first process; whatever it starts inherits it."""
    return {MARK: uuid.uuid4().hex}


def marked(mark: dict[str, str]) -> dict[int, str]:
    """Process id -> command, of all that live and carry the mark."""
    wanted = f"{MARK}={mark[MARK]}".encode()
    found = {}
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and wanted in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it is gone, or somebody else's
            continue
    return found


def await_none(mark: dict[str, str], seconds: float = 20.0) -> dict[int, str]:
    """What is still there after so long; {} as soon as nothing is."""
    deadline = time.monotonic() + seconds
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def kill_all(mark: dict[str, str]) -> None:
    """For the end of a test, however it ends."""
    while left := marked(mark):
        for number in left:
            try:
                os.kill(number, 9)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
