"""Lists of pictures: a text file with a path and a label per line, as SSL-Backdoor and many others write."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from dist_defend.data.class_order import label_notes, labels_of_words
from dist_defend.data.pictures import is_picture
from dist_defend.data.reading import Keys, PictureSource
from dist_defend.data.splits import files_by_split
from dist_defend.errors import UserError
from dist_defend.files import read_regular

LIST_ENDINGS = (".txt", ".csv", ".tsv", ".lst", ".list")
_MOST_BYTES = 256 << 20
_LINE = re.compile(
    r"""(?:"(?P<double>[^"]+)"|'(?P<single>[^']+)'|(?P<plain>.+?))(?:\s*[,\t]\s*|\s+)(?P<label>[^\s,]+)"""
)


@dataclass(frozen=True, slots=True)
class _Entry:
    line: int
    file: str
    word: str | None  # the label as text


def list_splits(place: Path, keys: Keys) -> list[str]:
    """The splits of a list, or of a folder of lists."""
    return list(_lists(place))


def open_list(place: Path, split: str, keys: Keys) -> PictureSource:
    """One split. Labels are the numbers in the list; other words are names of classes, in string order.

    A path is absolute or relative to the list's folder; it may be quoted, and may hold spaces. A line that is a path
    alone has no label. Empty lines, lines that begin with # and a first line of headings are passed over. UserError,
    with the number of the line, for a file that is not there.
    """
    entries, words, notes = {}, {}, []
    for name, file in _lists(place).items():
        entries[name], told = _read(Path(file), must_exist=name == split)
        words[name] = [entry.word for entry in entries[name]]
        notes += told if name == split else []
    classes, labels = labels_of_words(words, place)
    notes += label_notes(classes, labels, split)
    return PictureSource([entry.file for entry in entries[split]], labels[split], classes, notes)


def _lists(place: Path) -> dict[str, str]:
    return files_by_split(place, LIST_ENDINGS, "list", "train.txt, test.txt")


def _read(file: Path, must_exist: bool) -> tuple[list[_Entry], list[str]]:
    """The lines of a list, and what to tell."""
    try:
        lines = read_regular(file, _MOST_BYTES).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a text file that can be read; expected a path and a label per line") from error
    entries, notes = [], []
    for number, text in enumerate(lines, 1):
        if text.strip() and not text.lstrip().startswith("#"):
            entries.append(_entry(file.parent, number, text.strip()))
    if entries and not is_picture(entries[0].file) and not os.path.isfile(entries[0].file):
        notes.append(f"line {entries[0].line} is taken for headings")
        entries = entries[1:]
    if not entries:
        raise UserError(f"{file}: names no pictures; expected a path and a label per line")
    if must_exist and (missing := [entry for entry in entries if not os.path.isfile(entry.file)]):
        first = missing[0]
        raise UserError(
            f"{file}: line {first.line}: there is no file {first.file} ({len(missing)} of {len(entries)} are missing); "
            f"paths are absolute or begin at {file.parent}"
        )
    return entries, notes


def _entry(folder: Path, number: int, text: str) -> _Entry:
    path, word = _parts(text)
    file = os.path.join(folder, path)
    if "\\" in path and not os.path.isfile(file):
        file = os.path.join(folder, path.replace("\\", "/"))
    return _Entry(number, file, word)


def _parts(text: str) -> tuple[str, str | None]:
    """Path and label; the label is the last word, unless the line ends as a picture's name does."""
    bare = text.strip("\"', \t")
    if is_picture(bare):
        return bare, None
    match = _LINE.fullmatch(text)
    if match is None:
        return bare, None
    return (match["double"] or match["single"] or match["plain"]).rstrip(", \t"), match["label"].strip("\"'")
