"""What a sweep's points read and ``dist-defend reproduce`` makes first: a sweep file's ``before``."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dist_defend import lifeline
from dist_defend.errors import UserError

_COMMANDS = (("data", "prepare"), ("import",))  # all that a file of somebody else's may have run
_SIGNS = ("manifest.json", "model.json", "[!.]*/manifest.json")  # one of them is in what these commands made


@dataclass(frozen=True)
class Way:
    """One way to make it.

    Keys:
        file: in the folder --from, that has to be there
        run: words of a dist-defend command; ${file} is that file, ${from} the folder
    """

    file: str
    run: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_inside("file", self.file)
        if not any(self.run[: len(own)] == own for own in _COMMANDS):
            raise ValueError(f"key 'run' is {' '.join(self.run)[:80]!r}; it begins with 'data prepare' or 'import'")

    def command(self, folder: Path) -> list[str]:
        """Its words, with files of this folder."""
        return [word.replace("${file}", str(folder / self.file)).replace("${from}", str(folder)) for word in self.run]


@dataclass(frozen=True)
class Preparation:
    """A prepared data set or an imported model. It is made where it is missing and a point of the sweep reads it.

    Keys:
        makes: folder that the commands write
        get: what the files are and where to get them, for those who have none
        ways: how it is made; the first whose file is there is taken
    """

    makes: str
    get: str
    ways: tuple[Way, ...]

    def __post_init__(self) -> None:
        _check_inside("makes", self.makes)
        if not self.ways:
            raise ValueError("key 'ways' is empty; give at least one")
        for number, way in enumerate(self.ways):
            if way.run[-2:] != ("--out", self.makes):
                raise ValueError(f"key 'ways[{number}].run' has to end with --out {self.makes}, which it makes")

    def is_made(self) -> bool:
        """Whether the folder holds a data set or a model."""
        return any(True for sign in _SIGNS for _ in Path(self.makes).glob(sign))

    def way(self, folder: Path) -> Way | None:
        """The first way whose file is there."""
        return next((way for way in self.ways if (folder / way.file).exists()), None)


def _check_inside(key: str, path: str) -> None:
    if not path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f"key '{key}' is {path!r}; it must be a path below the folder")


def read_by(preparations: Sequence[Preparation], experiments: Sequence[dict[str, Any]]) -> list[Preparation]:
    """Those whose folder, or something in it, a resolved experiment names."""
    named = {PurePosixPath(text) for experiment in experiments for text in texts(experiment)}
    within = {place for path in named for place in (path, *path.parents)}
    return [own for own in preparations if PurePosixPath(own.makes) in within]


def texts(content: Any) -> Iterator[str]:
    """Every text in a resolved experiment."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from texts(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from texts(value)


def check(preparations: Sequence[Preparation], folder: Path) -> None:
    """UserError that names every file that is missing for what is not made yet, and where to get it."""
    lacking = [own for own in preparations if not own.is_made() and own.way(folder) is None]
    if lacking:
        raise UserError(f"{'; '.join(missing(own, folder) for own in lacking)}; or name another folder with --from")


def missing(own: Preparation, folder: Path) -> str:
    """What is told of it."""
    files = " or ".join(str(folder / way.file) for way in own.ways)
    return f"{own.makes} is made from {files}, which is not there; get {own.get}"


def make(own: Preparation, folder: Path) -> int:
    """Run the command unless its folder is there; returns its exit status."""
    way = own.way(folder)
    if own.is_made() or way is None:
        return 0
    words = way.command(folder)
    print(f"dist-defend {' '.join(words)}", flush=True)
    environment = os.environ | {lifeline.STARTER: str(os.getpid())}
    return subprocess.run([sys.executable, "-m", "dist_defend", *words], env=environment, check=False).returncode
