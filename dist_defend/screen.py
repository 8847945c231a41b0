"""Text from files, fit for a terminal: nothing in it can move the cursor, clear the screen or turn the writing."""


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
