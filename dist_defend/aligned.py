"""Tables of text for a terminal: columns stand below each other, and a table that is too wide comes in parts."""

import itertools
import shutil
from collections.abc import Sequence
from typing import Any

_GAP = "  "
_LEAST = 12  # letters that a name keeps at least


def width_of(stream: Any) -> int | None:
    """Letters in a line of the stream's terminal; None where it is none, and lines may have any length."""
    return shutil.get_terminal_size().columns if stream.isatty() else None


def aligned(
    table: Sequence[Sequence[str]],
    names: int,
    width: int | None = None,
    *,
    numbers: bool = True,
    by_first: bool = False,
) -> str:
    """A header and rows. The first ``names`` columns say what a row is; numbers: the others end at the right.

    Where the lines are longer than ``width``, columns that do not fit follow in parts of their own below, each of which
    begins with the names; names that are too long then lose their beginning. by_first: a blank line stands wherever the
    first column changes.
    """
    cut = [_cut(row, names, _most(table, names, width)) for row in table]
    widths = [max(map(len, column)) for column in zip(*cut, strict=True)]
    changes = {n for n, (one, other) in enumerate(itertools.pairwise(table), 1) if one[0] != other[0]}
    out = []
    for part in _parts(widths, names, width):
        for number, row in enumerate(cut):
            if by_first and number in changes:
                out.append("")
            told = [f"{row[i]:>{widths[i]}}" if numbers and i >= names else f"{row[i]:<{widths[i]}}" for i in part]
            out.append(_GAP.join(told).rstrip())
        out.append("")
    return "\n".join(out[:-1])


def _parts(widths: Sequence[int], names: int, width: int | None) -> list[list[int]]:
    """Columns of each part: the names, then as many of the others as fit, at least one."""
    own = list(range(names))
    parts: list[list[int]] = [[*own]]
    for column in range(names, len(widths)):
        wanted = [*parts[-1], column]
        if width is not None and len(parts[-1]) > names and _length(widths, wanted) > width:
            wanted = [*own, column]
            parts.append(wanted)
        parts[-1] = wanted
    return parts


def _length(widths: Sequence[int], columns: Sequence[int]) -> int:
    return sum(widths[i] for i in columns) + len(_GAP) * (len(columns) - 1)


def _most(table: Sequence[Sequence[str]], names: int, width: int | None) -> int | None:
    """Letters that a name may have, so that the widest other column fits beside all names; None: any number."""
    if width is None or not names:
        return None
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    room = width - max(widths[names:], default=0) - len(_GAP) * names
    most = max(widths[:names])
    while most > _LEAST and sum(min(own, most) for own in widths[:names]) > room:
        most -= 1
    return most


def _cut(row: Sequence[str], names: int, most: int | None) -> list[str]:
    if most is None:
        return list(row)
    return [f"...{text[3 - most :]}" if i < names and len(text) > most else text for i, text in enumerate(row)]
