"""Names of splits, and of files and folders that belong to an editor or a system and not to a data set."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dist_defend.errors import UserError

SPLITS = ("train", "val", "test", "unlabeled")
_NAMES = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validate", "validation", "dev"),
    "test": ("test", "testing", "tst"),
    "unlabeled": ("unlabeled", "unlabelled", "unsupervised", "trainunlabeled", "trainunlabelled"),
}
_SPLIT_OF = {
    name + ending: split for split, names in _NAMES.items() for name in names for ending in ("", "set", "data")
}
_PASSED_OVER = {"__macosx", "__pycache__", "@eadir", "#recycle", "lost+found", "$recycle.bin",
                "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}  # fmt: skip
_SHOWN = 10


def split_of(name: str) -> str | None:
    """The split that a folder's or file's name means, in any case, with or without _ and -; None for another name."""
    return _SPLIT_OF.get(re.sub(r"[\s_-]+", "", name.lower()))


def split_in(stem: str) -> str | None:
    """The split of a file that has exactly one split's name among the words of its own: imagenet_train-000012."""
    whole = split_of(stem)
    found = {split_of(word) for word in re.split(r"[^a-z]+", stem.lower())} - {None}
    if "unlabeled" in found:
        return "unlabeled"
    return whole or (found.pop() if len(found) == 1 else None)


def is_passed_over(name: str) -> bool:
    """Hidden names, and those that editors, file servers and archivers leave behind."""
    return name.startswith(".") or name.endswith("~") or name.lower() in _PASSED_OVER


def one_per_split(place: object, found: Iterable[tuple[str, str]], remedy: str) -> dict[str, str]:
    """Split -> name, in the order of SPLITS, of (split, name). UserError for two names of one split."""
    names: dict[str, str] = {}
    for split, name in sorted(found):
        if split in names:
            raise UserError(f"{place}: holds both {names[split]} and {name}; {remedy}")
        names[split] = name
    return {split: names[split] for split in SPLITS if split in names}


def files_by_split(place: Path, endings: Sequence[str], what: str, example: str) -> dict[str, str]:
    """Split -> file of these endings, in the order of SPLITS; a single file is the split that its name tells, or train.

    UserError, which calls a file ``what``, for a folder in which none is named after a split, and for two of one split.
    """
    if place.is_file():
        return {split_in(place.stem) or "train": str(place)}
    files = sorted(f.name for f in place.iterdir() if f.suffix.lower() in endings and not is_passed_over(f.name))
    named = [(split, name) for name in files if (split := split_in(Path(name).stem)) is not None]
    if not named:
        there = f"it has {listed(files)}" if files else f"no {', '.join(endings)} in it"
        raise UserError(f"{place}: no {what} is named after a split ({example}); {there}; give one as --path")
    names = one_per_split(place, named, "give one file as --path")
    return {split: str(place / name) for split, name in names.items()}


def listed(names: Iterable[object]) -> str:
    """The first ten, and how many more there are."""
    every = [str(name) for name in names]
    rest = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + rest
