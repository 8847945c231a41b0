"""What ties a process to the one that started it: it ends when its starter does, and tells it what became of it.

``dist-defend launch`` and local sweeps start their processes with ``python -m dist_defend`` and these variables.
"""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

STARTER = "DIST_DEFEND_STARTER"  # the starter's process id
ANSWER = "DIST_DEFEND_ANSWER"  # a file for the exit status of a rank that was told to stop, and did
STOPPED = (75, 130)  # exit statuses of a run that has saved: after a signal, after Ctrl-C
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def handled(handler: Callable[[int, Any], object]) -> Iterator[None]:
    """Have it called for each signal that asks for an end; not for those that are ignored, as HUP is under nohup.

    What is set to something else meanwhile is left so at the end.
    """
    wanted = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in wanted}
    try:
        yield
    finally:
        for number, old in before.items():
            if old is not None and signal.getsignal(number) is handler:  # None: not Python's own
                signal.signal(number, old)


@contextlib.contextmanager
def environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Within, these variables are set, for this process and those that it starts; at the end all are as before."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


def follow() -> Path | None:
    """End with the starter, however that ends, if there is one; returns the file for ``answer``.

    The kernel sends KILL when the starter's thread that made this process is gone. Linux only; elsewhere nothing is
    done. The variables are taken out of the environment: they mean this process, not those that it starts.
    """
    starter, answer = os.environ.pop(STARTER, ""), os.environ.pop(ANSWER, "")
    if answer:  # of a rank before a restart: this one has not been told to stop yet
        Path(answer).unlink(missing_ok=True)
    if starter.isdigit() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(starter):  # it was gone before the kernel was asked
            sys.exit(1)
    return Path(answer) if answer else None


def answer(status: int, file: Path | None) -> int:
    """What to exit with. A rank that saved and stopped succeeds: torchrun would take 75 for a fault and start it again.

    The starter finds the status in the file.
    """
    if file is None or status not in STOPPED:
        return status
    file.write_text(str(status), encoding="ascii")
    return 0
