"""The one exception that means: the user can put this right."""

from collections.abc import Sequence
from difflib import get_close_matches

from dist_defend.screen import printable

_MOST, _END = 1500, 300  # characters of a line; of its end, which has the remedy


class UserError(Exception):
    """Bad input: one printable line that names key or file and remedy; the command line prints it and exits with 2.

    What a file brings into the line is escaped and cut here, so that no caller has to.
    """

    def __init__(self, line: object) -> None:
        told = printable(line)
        super().__init__(told if len(told) <= _MOST else f"{told[: _MOST - _END]} ... {told[-_END:]}")


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """A question for a line, with a blank behind it, on the nearest of the known names; empty where none is near."""
    near = get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'? " if near else ""


def no_model(library: str, name: str, known: Sequence[str]) -> UserError:
    """The line on a model that a library of models has not."""
    near = get_close_matches(name, known, n=3)
    return UserError(f"{library} has no model '{name}'" + (f": did you mean {', '.join(near)}?" if near else ""))
