"""The one exception that means: the user can put this right."""

from dist_defend.screen import printable

_MOST, _END = 1500, 300  # characters of a line; of its end, which has the remedy


class UserError(Exception):
    """Bad input: one printable line that names key or file and remedy; the command line prints it and exits with 2.

    What a file brings into the line is escaped and cut here, so that no caller has to.
    """

    def __init__(self, line: object) -> None:
        told = printable(line)
        super().__init__(told if len(told) <= _MOST else f"{told[: _MOST - _END]} ... {told[-_END:]}")
