"""What the commands write on a terminal: text from files acts on none, no terminal is too poor, errors come first.

``guarded`` stands around a whole command. What means to move the cursor or to colour writes to ``unguarded(stream)``.
On a terminal a run shows a ``Progress`` bar, and log lines stand above it; warnings, failures and what came of a
backdoor have colours there.
"""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from dist_defend.bounds import OPEN_ASR, REMOVED_ASR
from dist_defend.screen import printable

_LOGGER = "dist_defend"
COLOURS = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "bold": "1", "faint": "2"}  # of ECMA-48's SGR
_RESET = (
    "\x1b[0m"  # colorama, which numba starts, writes it at the end of a process: dropped, since escaped it would show
)
_RATE = re.compile(r"\b(acc|asr) (?:(\d+(?:\.\d+)?) -> )?(\d+(?:\.\d+)?)(?=[ ,]|$)")  # as counts.told has them


class Guarded:
    r"""A text stream that escapes all that does not print, but ``\n`` and ``\t``, and what its encoding lacks."""

    def __init__(self, stream: TextIO, at_first: Callable[[], None] | None = None) -> None:
        """at_first: called before the first text is written."""
        self.stream, self._at_first = stream, at_first

    def write(self, text: str) -> int:
        """Returns the length of ``text``, as any stream."""
        if self._at_first is not None:
            first, self._at_first = self._at_first, None
            first()
        if text == _RESET:
            return len(text)
        shown = printable(text, keep="\n\t")
        encoding = self.stream.encoding or "utf-8"
        self.stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Each by ``write``."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def unguarded(stream: Any) -> Any:
    """The stream below the guard, if there is one: for progress bars and colours, with text of our own."""
    return stream.stream if isinstance(stream, Guarded) else stream


def has_colour(stream: Any) -> bool:
    """Whether text on the stream may be coloured: a terminal that can, whose user has not set NO_COLOR."""
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "") not in ("", "dumb")


def put(stream: Any, text: str, colour: str = "") -> None:
    """Write the text, which the guard escapes as ever, in one of COLOURS where the stream has colour."""
    if not colour or not has_colour(stream):
        stream.write(text)
        return
    unguarded(stream).write(f"\x1b[{COLOURS[colour]}m")
    stream.write(text)
    unguarded(stream).write(_RESET)


def shaded(text: str) -> Iterator[tuple[str, str]]:
    """The text in pieces, each with its colour or "": rates before a defence faint, ACC bold, ASR by what it means.

    An ASR is green up to REMOVED_ASR percent, red from OPEN_ASR on, yellow between.
    """
    at = 0
    for found in _RATE.finditer(text):
        name, before, value = found.groups()
        if before:
            yield text[at : found.start(2)], ""
            yield before, "faint"
            at = found.end(2)
        yield text[at : found.start(3)], ""
        asr = "green" if float(value) <= REMOVED_ASR else "red" if float(value) >= OPEN_ASR else "yellow"
        yield value, "bold" if name == "acc" else asr
        at = found.end(3)
    yield text[at:], ""


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Standard output and error are guarded meanwhile. A first result on the output lets the log go, too."""
    before = sys.stdout, sys.stderr
    sys.stdout = Guarded(unguarded(sys.stdout), release_log)
    sys.stderr = Guarded(unguarded(sys.stderr))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class LineFormatter(logging.Formatter):
    """Each record is one printable line; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """What ``format`` begins with."""
        return printable(super().formatMessage(record))


class HeldLog(logging.StreamHandler):  # type: ignore[type-arg]  # it has no [] in Python 3.10
    """Log lines on standard error that wait until it is known that the input is not refused.

    An error on bad input is one line, so what was told before it, which the error makes pointless, is dropped.
    """

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(LineFormatter("%(message)s"))
        self.held: list[logging.LogRecord] | None = []

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, or keep it."""
        if self.held is None:
            bars = sys.modules.get("tqdm")
            with contextlib.nullcontext() if bars is None else bars.tqdm.external_write_mode(unguarded(sys.stderr)):
                self._show(record)
        else:
            self.held.append(record)

    def let_go(self) -> None:
        """Write what was held, and from now on all at once."""
        held, self.held = self.held or [], None
        for record in held:
            self._show(record)

    def _show(self, record: logging.LogRecord) -> None:
        """A line, warnings and errors in one colour, others with their rates in colours."""
        if not has_colour(self.stream):
            super().emit(record)
            return
        text = self.format(record)
        is_warning, is_error = record.levelno >= logging.WARNING, record.levelno >= logging.ERROR
        for piece, colour in [(text, "red" if is_error else "yellow")] if is_warning else shaded(text):
            put(self.stream, piece, colour)
        self.stream.write(self.terminator)
        self.flush()


_BAR = "{desc}: {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left, {rate_fmt}{postfix}]"
_MEASURED = ("acc", "asr")


class Progress:
    """A bar on standard error that counts steps and shows scalars, rates as measured and the time that is left.

    Nothing where standard error is no terminal.
    """

    def __init__(self, name: str, begun: int, total: int, shown: Sequence[str]) -> None:
        """begun, total: steps. shown: names of the scalars, in this order."""
        from tqdm import tqdm

        self._latest = dict.fromkeys((*_MEASURED, *shown), "")
        self._bar = tqdm(
            total=total,
            initial=begun,
            desc=printable(name),
            file=unguarded(sys.stderr),
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            bar_format=_BAR,
        )

    def step(self) -> None:
        """One step more."""
        self._bar.update()

    def show(self, scalars: Mapping[str, float]) -> bool:
        """Show the newest value of each at the bar's end. False where there is no bar."""
        known = self._latest.keys() & scalars.keys()
        self._latest.update({name: f"{printable(name)} {scalars[name]:.4g}" for name in known})
        self._bar.set_postfix_str(", ".join(filter(None, self._latest.values())))
        return not self._bar.disable

    def close(self) -> None:
        """Leave the bar as it is; lines follow below."""
        self._bar.close()


def hold_log(level: int = logging.WARNING) -> None:
    """The project's log goes to standard error, held; it replaces an earlier command's, whose stream may be closed.

    Within ``forwarded`` it goes on to the program's own handlers.
    """
    logger = logging.getLogger(_LOGGER)
    end_log()
    logger.setLevel(level)
    if not any(isinstance(handler, _Forward) for handler in logger.handlers):
        logger.addHandler(HeldLog())


class _Forward(logging.Handler):
    """Hands records to the handlers of the program around us."""

    def emit(self, record: logging.LogRecord) -> None:
        """Python's own rules from the root on: a program without handlers sees warnings on standard error."""
        logging.getLogger().callHandlers(record)


@contextlib.contextmanager
def forwarded() -> Iterator[None]:
    """For a program that uses the package: within, the log goes to its handlers, from the level that it has set.

    A run's own log file has all lines all the same. Level and handlers are as before at the end.
    """
    logger = logging.getLogger(_LOGGER)
    before = logger.level, logger.propagate
    handler = _Forward(logger.getEffectiveLevel())
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def release_log() -> None:
    """The input is not refused any more: log lines are written from now on."""
    for handler in _held():
        handler.let_go()


def end_log() -> None:
    """No log on standard error any more; what was held is dropped."""
    logger = logging.getLogger(_LOGGER)
    for handler in _held():
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def _held() -> list[HeldLog]:
    return [handler for handler in logging.getLogger(_LOGGER).handlers if isinstance(handler, HeldLog)]
