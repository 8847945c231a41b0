"""Text from files, fit for a terminal: nothing in it can move the cursor, clear the screen or turn the writing."""

import contextlib
from collections.abc import Iterator

from dist_defend.errors import UserError

_MOST_LINE = 1500  # characters


def printable(text: object, most: int | None = None, keep: str = "") -> str:
    r"""The text with all that does not print escaped (``\x1b``, ``\n``); letters of any language stay.

    most: cut after so many characters, with "...". keep: characters that stay ("\n" for a text of several lines).
    """
    line = str(text)
    if most is not None and len(line) > most:
        line = line[:most] + "..."
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in line)


def one_line(text: object) -> str:
    """A message as one printable line; of a very long one the middle is left out, as its end holds the remedy."""
    line = printable(text)
    return line if len(line) <= _MOST_LINE else f"{line[: _MOST_LINE * 2 // 3]} ... {line[-_MOST_LINE // 3 :]}"


@contextlib.contextmanager
def printable_errors() -> Iterator[None]:
    """A UserError from within comes out as one printable line, whatever names of files and keys it quotes."""
    try:
        yield
    except UserError as error:
        raise UserError(one_line(error)) from error
