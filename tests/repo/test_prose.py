"""Sentences of the documents: at most 25 words on average of a page, none of more than 40.

Counted are paragraphs, items of lists, quotes and cells of tables; not headings, code, and where links lead. Cells are
held to the limit of 40 alone, since most of them are no sentences. tests/repo/prose.json names the pages that are not
there yet, with their mean and the number of their long sentences. These numbers may only fall:
`python tests/repo/test_prose.py` lowers them, and with names of pages it prints their long sentences.
"""

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
RATCHET = Path(__file__).with_name("prose.json")
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), ROOT / "slurm/README.md"])
MEAN, MOST = 25.0, 40
ITEM = re.compile(r"\s*(?:[-*+]|\d+[.)])\s+")
# A full stop, question or exclamation mark ends a sentence where something other than a small letter follows.
END = re.compile(r"(?<=[.!?])[)\"'*_]*\s+(?=[\"'(*_\[]*[A-Z0-9~+-]|CODE)")
ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|et al|cf|vs|Eq|Eqs|Fig|Sec|Tab|approx)\.|^\d+\.)$")


class Counted(NamedTuple):
    mean: float  # words per sentence of paragraphs and lists
    long: int  # sentences and cells of more than MOST words


def texts(page: str) -> tuple[list[str], list[str]]:
    """(paragraphs and items of lists, cells of tables) of a page in Markdown. Code and headings are left out."""
    blocks: list[str] = []
    cells: list[str] = []
    lines: list[str] = []
    fence, is_after_blank, is_in_list = "", True, False

    def end() -> None:
        if lines:
            blocks.append(" ".join(lines))
            lines.clear()

    for line in page.splitlines():
        text = line.strip()
        if fence:
            fence = "" if text.startswith(fence) else fence
        elif text.startswith(("```", "~~~")):
            end()
            fence = text[:3]
        elif not text or text.startswith("#"):
            end()
            is_in_list = is_in_list and not text
        elif text.startswith("|"):
            end()
            cells += [cell.strip() for cell in re.split(r"(?<!\\)\|", text)[1:-1]]
        elif line.startswith("    ") and not is_in_list and not lines:
            pass  # code by indentation, which also follows a heading or other code directly
        else:
            if ITEM.match(line):
                end()
                is_in_list = True
                text = line[len(ITEM.match(line)[0]) :]  # type: ignore[index]
            elif is_after_blank and not line.startswith(" "):
                is_in_list = False
            lines.append(text.removeprefix("> "))
        is_after_blank = not text
    end()
    return blocks, cells


def sentences(text: str) -> list[str]:
    """A text's sentences. A link is its words, code is one word."""
    plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "CODE", text))
    found: list[str] = []
    for part in END.split(plain):
        if found and ABBREVIATION.search(found[-1]):
            found[-1] += f" {part}"
        else:
            found.append(part)
    return found


def words(sentence: str) -> int:
    return sum(re.search(r"\w", word) is not None for word in sentence.split())


def long_ones(page: str) -> list[str]:
    blocks, cells = texts(page)
    return [s for text in [*blocks, *cells] for s in sentences(text) if words(s) > MOST]


def counted(page: str) -> Counted:
    counts = [words(s) for text in texts(page)[0] for s in sentences(text)]
    own = [count for count in counts if count]
    return Counted(round(sum(own) / max(1, len(own)), 1), len(long_ones(page)))


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def ratchet() -> dict[str, Counted]:
    return {name: Counted(*numbers) for name, numbers in json.loads(RATCHET.read_text(encoding="utf-8")).items()}


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_sentences_are_short(file: Path) -> None:
    page = file.read_text(encoding="utf-8")
    limit = ratchet().get(name_of(file), Counted(MEAN, 0))
    own = counted(page)
    assert own.long <= limit.long, "\n".join(long_ones(page))
    assert own.mean <= max(limit.mean, MEAN)


def test_the_ratchet_has_no_slack() -> None:
    names = {name_of(file) for file in PAGES}
    for name, limit in ratchet().items():
        assert name in names and (limit.mean > MEAN or limit.long > 0), f"{name} needs no exception"
        own = counted((ROOT / name).read_text(encoding="utf-8"))
        assert own.long == limit.long, f"python tests/repo/test_prose.py lowers the number of {name}"


LONG = "word " * 41 + "end."


@pytest.mark.parametrize(
    ("page", "wanted"),
    [
        ("One two three. Four five.", Counted(2.5, 0)),
        ("One two\nthree. `a. b` goes on. See [two words](x.md#a-b) now.", Counted(3.3, 0)),
        ("Han et al. 2025 say so. It is 0.5 px, e.g. Here.", Counted(6.0, 0)),
        ("1. One two.\n2. Three four five six.", Counted(3.0, 0)),
        (f"# {LONG}\n\n    {LONG}\n\n```\n{LONG}\n```\n\nOne.", Counted(1.0, 0)),
        (f"| a | {LONG} |\n\nOne.", Counted(1.0, 1)),
        (f"- {LONG}", Counted(42.0, 1)),
        (f"- One.\n\n    {LONG}", Counted(21.5, 1)),  # a paragraph of an item, no code
        (f"> {LONG}", Counted(42.0, 1)),
        ("word; " * 41, Counted(41.0, 1)),  # a semicolon ends nothing
        ("One two (three. Four). Five.", Counted(1.7, 0)),
    ],
)
def test_what_is_counted(page: str, wanted: Counted) -> None:
    assert counted(page) == wanted


if __name__ == "__main__":
    old = ratchet() if RATCHET.is_file() else {}
    new = {name_of(file): counted(file.read_text(encoding="utf-8")) for file in PAGES}
    if len(sys.argv) > 1:  # pages by name: their long sentences and cells
        print("\n\n".join(s for name in sys.argv[1:] for s in long_ones((ROOT / name).read_text(encoding="utf-8"))))
    else:
        over = {name: own for name, own in new.items() if own.mean > MEAN or own.long}
        kept = {name: [min(own.mean, old[name].mean), min(own.long, old[name].long)] if name in old else [*own]
                for name, own in over.items() if not old or name in old}  # fmt: skip
        lines = ",\n".join(f'  "{name}": {json.dumps(numbers)}' for name, numbers in kept.items())
        RATCHET.write_text(f"{{\n{lines}\n}}\n" if kept else "{}\n", encoding="utf-8")
