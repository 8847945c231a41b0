"""Text from files, fit for a terminal, a Markdown page and a spreadsheet: nothing in it can act there."""

import re

_MARKDOWN = re.compile(r"([\\`*\[\]~|#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")  # a_b is no emphasis


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


def markdown(text: object) -> str:
    """The text as Markdown that shows it: no markup, no HTML, no link, one line."""
    line = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", line).replace("://", ":\\//")


def cell(value: object) -> object:
    """A cell of a CSV file that no spreadsheet takes for a formula: a text like that gets ' in front; numbers stay."""
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")) or _is_number(value):
        return value
    return f"'{value}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text == text.strip()
