"""Look through a folder of pictures: what lies in it, in torchvision's order, and what is passed over and why."""

import os
from collections import Counter
from pathlib import Path

from dist_defend.data.pictures import is_picture
from dist_defend.data.splits import is_passed_over
from dist_defend.errors import UserError

_HIDDEN = "hidden files and those of editors, passed over"
_LOOP = "folders that a link leads back to, passed over"
_NOWHERE = "links that lead nowhere and files that are none, passed over"

Identity = tuple[int, int]  # device and number of a folder


class Walk:
    """Looks into folders and counts what it passes over."""

    def __init__(self) -> None:
        self._passed: Counter[str] = Counter()
        self._endings: Counter[str] = Counter()

    def notes(self) -> list[str]:
        """What was passed over."""
        notes = [f"{what}: {count}" for what, count in sorted(self._passed.items())]
        if self._endings:
            each = ", ".join(f"{ending} {count}" for ending, count in self._endings.most_common(10))
            notes.append(f"files that do not end as a picture does, passed over: {self._endings.total()} ({each})")
        return notes

    def look(self, folder: str | Path, is_inside: bool = True) -> tuple[list[os.DirEntry[str]], list[str]]:
        """Folders and pictures right in a folder, by name. UserError for a folder that cannot be read.

        is_inside: it should hold pictures, so other files count.
        """
        folders, pictures = [], []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if is_passed_over(entry.name):
                        self._passed[_HIDDEN] += 1
                    elif _is(entry, "is_dir"):
                        folders.append(entry)
                    elif not _is(entry, "is_file"):
                        self._passed[_NOWHERE] += 1
                    elif is_picture(entry.name):
                        pictures.append(entry.path)
                    elif is_inside:
                        self._endings[os.path.splitext(entry.name)[1].lower() or "no ending"] += 1
        except OSError as error:
            raise UserError(f"{folder}: cannot be read ({error.strerror}); check --path and its rights") from error
        return sorted(folders, key=lambda entry: entry.name), sorted(pictures)

    def folders(self, folder: str | Path) -> dict[str, str]:
        """Name -> path of the folders right in a folder, but for links that lead back to it or above it."""
        above, inside = _above(folder), {}
        for entry in self.look(folder, is_inside=False)[0]:
            if _identity(entry.path) in above:
                self._passed[_LOOP] += 1
            else:
                inside[entry.name] = entry.path
        return inside

    def pictures(self, folder: str | Path) -> list[str]:
        """All pictures in a folder and below, in the order of torchvision's ImageFolder.

        Links are followed. A folder that was met before, or that holds this one, is not entered again.
        """
        seen = _above(folder)
        waiting, found = [str(folder)], []
        while waiting:
            place = waiting.pop()
            folders, pictures = self.look(place)
            found.append((place, pictures))
            for entry in folders:
                identity = _identity(entry.path)
                if identity in seen:
                    self._passed[_LOOP] += 1
                else:
                    seen.add(identity)
                    waiting.append(entry.path)
        return [picture for _, pictures in sorted(found) for picture in pictures]


def _is(entry: os.DirEntry[str], what: str) -> bool:
    try:
        return bool(getattr(entry, what)())
    except OSError:  # a link to itself
        return False


def _identity(path: str | Path) -> Identity:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _above(folder: str | Path) -> set[Identity]:
    """The folder and all that hold it."""
    place = Path(folder).resolve()
    return {_identity(part) for part in (place, *place.parents)}
