"""What a signal means to a run: stop at once while nothing is at stake, else at the next step, once it is saved.

No torch here: a run listens before it imports that.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from dist_defend.lifeline import ENDING, handled

PREEMPTED = 75  # EX_TEMPFAIL: start the same command again
INTERRUPTED = 130  # 128 + SIGINT, what shells say of a program that Ctrl-C ended


class Stopped(BaseException):
    """A signal ended the run; nothing is lost. BaseException: what mends errors must not take it for one."""

    def __init__(self, told: str, is_interrupt: bool) -> None:
        super().__init__(told)
        self.status = INTERRUPTED if is_interrupt else PREEMPTED


class _Listener:
    """The signals of this process. number: the one that came while it was only to be noted."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.is_noting = False
        self.is_on = False
        self.is_program = False
        self.process = 0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Note the signal, or raise Stopped; end at once for a second Ctrl-C."""
        is_own = os.getpid() == self.process  # not that of a loader's worker, forked from us
        is_second = number == self.number == signal.SIGINT
        if is_second:
            if is_own:
                _say("stopped at once; the same command goes on from the newest checkpoint")
            os._exit(INTERRUPTED)
        is_first = self.number is None
        if self.number != signal.SIGINT:
            self.number = number
        if is_own and not self.is_noting:
            if is_first:
                raise stopped(number)
            return  # it is ending already
        if is_own and number == signal.SIGINT:
            _say("stopping: the next step is saved first; Ctrl-C once more stops at once")


_listener = _Listener()


def program() -> None:
    """This process is one command's: when that is stopped, the process ends, and further signals do not kill it.

    Ranks are often told twice: by Slurm, which signals all processes of a step, and by ``dist-defend launch``. The
    second would come while Python ends, and the status would say that the rank was killed instead of that it saved.
    """
    _listener.is_program = True


def stopped(number: int) -> Stopped:
    """While a run is built or its result made."""
    told = f"stopped by {signal.Signals(number).name}; the same command starts again, from the newest checkpoint if any"
    return Stopped(told, number == signal.SIGINT)


@contextmanager
def stoppable() -> Iterator[None]:
    """Within, one of lifeline's signals raises Stopped; those that are ignored stay so. Main thread only."""
    if _listener.is_on or threading.current_thread() is not threading.main_thread():
        yield
        return
    _listener.number, _listener.process = None, os.getpid()
    with handled(_listener.on_signal):
        _listener.is_on = True
        try:
            yield
        except Stopped:
            if _listener.is_program:
                for number in set(ENDING) - {signal.SIGINT}:  # Ctrl-C still ends what hangs
                    signal.signal(number, signal.SIG_IGN)
            raise
        finally:
            _listener.is_on, _listener.number = False, None


@contextmanager
def noted() -> Iterator[None]:
    """Within, a signal is only noted, for ``pending``; a second Ctrl-C ends the process at once, with status 130."""
    with stoppable():
        _listener.is_noting = True
        try:
            yield
        finally:
            _listener.is_noting = False


def pending() -> int | None:
    """The signal that was noted."""
    return _listener.number


def agree() -> None:
    """The run ends for another rank's signal: this rank's own, which may come later, must not cut the end short."""
    _listener.number = _listener.number or signal.SIGTERM


def _say(line: str) -> None:
    """Past Python's buffers, in which the signal may have come; once per machine."""
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        with suppress(OSError):  # nobody reads
            os.write(2, f"\n{line}\n".encode())
