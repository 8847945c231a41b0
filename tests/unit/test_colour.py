"""Colours on a real pseudo-terminal: where it has them, what they mean, none with NO_COLOR or a pipe, a bell never."""

import io
import os
import pty
import select
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from dist_defend import terminal

SPEAK = """
import logging, sys
from dist_defend import cli, terminal
log = logging.getLogger("dist_defend.x")
with terminal.guarded():
    terminal.hold_log(logging.INFO)
    log.info("held before it is known that nothing is wrong")
    terminal.release_log()
    log.info("ibau on noise: acc 95.00 -> 93.10 %% of 100, asr 99.00 -> %.2f %% of 90", float(sys.argv[1]))
    log.warning("look \\x1b[31m\\x07here")
    terminal.end_log()
    cli._tell("error: no such file: name another")
"""


def on_terminal(*command: str, **environment: str) -> tuple[str, int]:
    """What a command writes on a terminal of its own, and its exit status."""
    ours, theirs = pty.openpty()
    known = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST  # newlines as they are
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=known | environment) as process:
        os.close(theirs)
        written = b""
        while select.select([ours], [], [], 120)[0]:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            written += part
        os.close(ours)
    return written.decode(), process.returncode


def spoken(asr: float, **environment: str) -> str:
    written, status = on_terminal(sys.executable, "-c", SPEAK, str(asr), **environment)
    assert status == 0, written
    return written


PLAIN = (
    "held before it is known that nothing is wrong\n"
    "ibau on noise: acc 95.00 -> 93.10 % of 100, asr 99.00 -> 1.20 % of 90\n"
    "look \\x1b[31m\\x07here\n"
    "error: no such file: name another\n"
)


def test_a_terminal_shows_rates_warnings_and_errors_in_colour() -> None:
    written = spoken(1.2, TERM="xterm")
    assert written == (
        "held before it is known that nothing is wrong\n"
        "ibau on noise: acc \x1b[2m95.00\x1b[0m -> \x1b[1m93.10\x1b[0m % of 100, "
        "asr \x1b[2m99.00\x1b[0m -> \x1b[32m1.20\x1b[0m % of 90\n"
        "\x1b[33mlook \\x1b[31m\\x07here\x1b[0m\n"
        "\x1b[31merror:\x1b[0m no such file: name another\n"
    )
    assert "\x07" not in written


@pytest.mark.parametrize("environment", [{"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb"}, {}])
def test_none_where_the_user_or_the_terminal_wants_none(environment: dict[str, str]) -> None:
    assert spoken(1.2, **environment) == PLAIN


def test_none_in_a_pipe() -> None:
    command = [sys.executable, "-c", SPEAK, "1.2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"TERM": "xterm"})
    assert (done.stdout, done.stderr) == ("", PLAIN)


@pytest.mark.parametrize(
    ("line", "colours"),
    [
        ("x, before: acc 93.10 % of 100, asr 99.58 % of 90", {"93.10": "bold", "99.58": "red"}),
        ("ibau epoch 1/2 step 6: acc 85.11 asr 2.4333 asr_all 10.1", {"85.11": "bold", "2.4333": "green"}),
        ("asr 10.00 % of 90", {"10.00": "green"}),
        ("asr 10.01 -> 49.99 % of 9", {"10.01": "faint", "49.99": "yellow"}),
        ("asr 50 % of 9", {"50": "red"}),
        ("acc_before 1.0 basr 2.0, asr x, step 40", {}),
    ],
)
def test_what_a_colour_means(line: str, colours: dict[str, str]) -> None:
    pieces = list(terminal.shaded(line))
    assert "".join(text for text, _ in pieces) == line
    assert {text: colour for text, colour in pieces if colour} == colours


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("value", "has"), [("", True), ("0", False), ("1", False)])
def test_no_color_counts_unless_it_is_empty(value: str, has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As no-color.org has it: whatever the value, but an empty one."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", value)
    assert terminal.has_colour(Screen()) is has
    assert not terminal.has_colour(io.StringIO())


def test_text_of_files_stays_escaped_in_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Screen()
    terminal.put(terminal.Guarded(screen), "a\x1b[2Jb", "red")
    assert screen.getvalue() == "\x1b[31ma\\x1b[2Jb\x1b[0m"


def test_the_bar_tells_rates_and_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "140")
    bar = terminal.Progress("ibau", 0, 4, ["loss"])
    bar.step()
    assert bar.show({"acc": 91.234, "asr": 3.21, "ra": 80.0}) and bar.show({"loss": 0.5})
    bar.close()
    last = screen.getvalue().rstrip().split("\r")[-1]
    assert last.startswith("ibau:  25%|") and "| 1/4 [" in last and " left, " in last
    assert last.endswith(", acc 91.23, asr 3.21, loss 0.5]")


def test_the_states_of_runs_have_colours(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text('{"method": "ibau", "rows": []}')
    command = (sys.executable, "-m", "dist_defend", "runs", str(tmp_path))
    written, status = on_terminal(*command, TERM="xterm")
    assert status == 0 and written.startswith("\x1b[32mfinished\x1b[0m  ") and "\x07" not in written
