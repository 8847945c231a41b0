"""Folders of one data set that take the places of older ones together, whoever is killed at whatever moment.

Beside a place ``train`` lie, while it is prepared: ``.train.lock``, ``.train.new`` (what is being written), and for an
instant ``.train.before`` (what was there). When all new folders are whole, a list of their names is renamed in as
``.train.together``. From then on whoever comes next, a writer or a reader, finishes the replacement; before, the old
folders are untouched.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from dist_defend.errors import UserError
from dist_defend.files import fsync_path, recover_folder, replace_folder
from dist_defend.lock import FolderLock
from dist_defend.strict_json import read_json

_REMEDY = "wait for it, end it, or choose another folder (--out)"


@contextlib.contextmanager
def new_folders(places: Sequence[Path]) -> Iterator[list[Path]]:
    """A folder to fill for each place, which lie beside one another; all take their places on success, none on failure.

    Locks the places, finishes what a killed writer began, and removes what it left. UserError while another process
    has one of them.
    """
    places = [Path(os.path.realpath(place)) for place in places]
    (parent,) = {place.parent for place in places}
    parent.mkdir(parents=True, exist_ok=True)
    with _locked(places):
        for place in places:
            _recover(place, held=places)
            _sweep(place)
        folders = [_new(place) for place in places]
        try:
            for folder in folders:
                folder.mkdir()
            yield folders
            for folder in folders:
                for path in (*folder.iterdir(), folder):
                    fsync_path(path)
            begun = folders[0] / "together"
            begun.write_text(json.dumps([place.name for place in places]), encoding="utf-8")
            fsync_path(begun)
            journal = begun.rename(_journal(places[0]))  # from here on the new folders count
        except BaseException:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        fsync_path(parent)
        _finish(journal, places)


def settle(place: Path) -> None:
    """Finish the replacement of a folder if its writer was killed within it; for readers, who call it at each opening.

    UserError while a living writer is within it, or where it cannot be finished.
    """
    place = Path(os.path.realpath(place))
    if os.path.exists(place) and not os.path.exists(f"{place.parent}/.{place.name}.new"):
        return
    try:
        with _locked([place]):
            _recover(place, held=[place])
    except (OSError, UserError) as error:
        if not place.parent.is_dir() or _together(place) is None:
            return  # nobody writes there, or somebody does who has not come to the replacement: the old folder counts
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{place}: its replacement was cut off and cannot be finished ({error.strerror}); open it once where "
            f"{place.parent} can be written, or prepare it again"
        ) from error


def _new(place: Path) -> Path:
    return place.with_name(f".{place.name}.new")


def _journal(place: Path) -> Path:
    return place.with_name(f".{place.name}.together")


@contextlib.contextmanager
def _locked(places: Sequence[Path]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for place in places:
            lock = FolderLock(place, _REMEDY, is_beside=True)
            lock.take()
            stack.callback(lock.release)
        yield


def _recover(place: Path, held: Collection[Path]) -> None:
    """Finish a replacement that was cut off; the caller has locked ``place`` and the others of ``held``."""
    found = _together(place)
    if found is not None:
        journal, members = found
        with _locked([member for member in members if member not in held]):
            _finish(journal, members)
    elif not place.exists():
        for before in _left_over(place, r"(\d+\.)?before"):  # of a program that kept no list
            if (before / "manifest.json").is_file():
                before.rename(place)
                return


def _together(place: Path) -> tuple[Path, list[Path]] | None:
    """The list that names ``place``, and all that it names."""
    for journal in sorted(place.parent.glob(".*.together")):
        names = read_json(journal, "remove this file")
        if not isinstance(names, list) or not all(isinstance(name, str) and _is_plain(name) for name in names):
            raise UserError(f"{journal} is no list of folders: remove this file")
        if place.name in names:
            return journal, [place.with_name(name) for name in names]
    return None


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _finish(journal: Path, places: Sequence[Path]) -> None:
    for place in places:
        if _new(place).exists():
            replace_folder(_new(place), place)
        else:
            recover_folder(place)
    journal.unlink()
    fsync_path(journal.parent)


def _sweep(place: Path) -> None:
    """Remove what killed writers left, also those of earlier versions, who had their process' number in the names."""
    for path in _left_over(place, r"new|before|\d+|\d+\.before"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _left_over(place: Path, endings: str) -> list[Path]:
    name = re.compile(rf"\.{re.escape(place.name)}\.({endings})")
    return sorted(path for path in place.parent.iterdir() if name.fullmatch(path.name))
