"""A table of the page, and the same as CSV and as LaTeX (booktabs)."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dist_defend import screen

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "Δ": r"$\Delta$", "–": "--", "−": "$-$",
    "×": r"$\times$", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


class Head(NamedTuple):
    """A column. meaning: what a reader sees who points at its name."""

    text: str
    meaning: str = ""
    is_number: bool = True


class Cell(NamedTuple):
    """text: as it is shown; what it is sorted by, if that is not the text; a second, softer text; a link."""

    text: str
    value: float | None = None
    more: str = ""
    bar: tuple[str, float] | None = None  # colour (good, bad) and percent of the cell's width
    link: str = ""


class Row(NamedTuple):
    """The first cell names the row. mark: broken, weak, or nothing."""

    cells: Sequence[Cell]
    mark: str = ""


@dataclass(frozen=True)
class Sheet:
    """Rows in groups, each with a title, which may be empty. name: of its files."""

    name: str
    head: Sequence[Head]
    groups: Sequence[tuple[str, Sequence[Row]]]
    caption: str = ""

    def to_csv(self) -> str:
        """A first column for the groups' titles, if there are any."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        for row in self._texts():
            writer.writerow([screen.cell(text) for text in row])
        return out.getvalue()

    def to_latex(self) -> str:
        r"""A tabular for ``\usepackage{booktabs}``; groups are set apart by a rule."""
        columns = "".join("r" if head.is_number else "l" for head in self.head)
        out = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _latex_line([head.text for head in self.head])]
        for title, rows in self.groups:
            out.append(r"\midrule")
            if title:
                out.append(rf"\multicolumn{{{len(self.head)}}}{{l}}{{\textit{{{latex(title)}}}}} \\")
            out += [_latex_line(_texts_of(row)) for row in rows]
        return "\n".join([*out, r"\bottomrule", r"\end{tabular}", ""])

    def _texts(self) -> Iterator[list[str]]:
        has_groups = any(title for title, _ in self.groups)
        yield [*["group"] * has_groups, *(head.text for head in self.head)]
        for title, rows in self.groups:
            for row in rows:
                yield [*[title] * has_groups, *_texts_of(row)]


def plain_sheet(name: str, table: Sequence[Sequence[str]], caption: str = "") -> Sheet:
    """A sheet of a header and rows of text."""
    rows = [Row([Cell(text) for text in row]) for row in table[1:]]
    return Sheet(name, [Head(text, is_number=False) for text in table[0]], [("", rows)], caption)


def latex(text: str) -> str:
    """The text as LaTeX shows it."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _texts_of(row: Row) -> list[str]:
    return [f"{cell.text} ({cell.more})" if cell.more else cell.text for cell in row.cells]


def _latex_line(texts: Sequence[str]) -> str:
    return " & ".join(map(latex, texts)) + r" \\"
