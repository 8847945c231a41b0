"""Files that are whole or not there, and that are files: opening a pipe or a device would wait or never end."""

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

from dist_defend.errors import UserError

_CHUNK = 1 << 20  # bytes


def open_regular(path: str | Path) -> IO[bytes]:
    """Open a file for reading. UserError for a pipe, a socket or a device; OSError as ever for what is not there."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer: no waiting
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(21, os.strerror(21), str(path))
    raise UserError(f"{path} is not a regular file (a pipe, a socket or a device): give the path of a file")


def read_regular(path: str | Path, most_bytes: int) -> bytes:
    """The bytes of a file. UserError for one of more than ``most_bytes``, or of another kind (see open_regular)."""
    with open_regular(path) as file:
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise UserError(f"{path} is larger than {most_bytes >> 20} MiB, which no such file is: give the right file")
    return data


def read_into(file: IO[bytes], room: memoryview) -> bool:
    """Fill the room from the file, in pieces, so that nothing is held twice. False if the file ends before."""
    while count := file.readinto(room[:_CHUNK]):  # type: ignore[attr-defined]
        room = room[count:]
    return not len(room)


def user_cache() -> Path | None:
    """The folder of this program in the user's cache, which need not exist; None for a user without a home."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "dist_defend"
    try:
        return Path.home() / ".cache" / "dist_defend"
    except RuntimeError:
        return None


def sha256_file(path: Path) -> str:
    """Hex digest of the file's bytes."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_hashed(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write the parts one after another and push them to the disk. Hex sha256 of all, made by a thread meanwhile."""
    digest = hashlib.sha256()
    with path.open("wb") as file, ThreadPoolExecutor(1, thread_name_prefix="sha256") as thread:
        hashed = []
        for part in parts:
            hashed.append(thread.submit(digest.update, part))
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
        for done in hashed:
            done.result()
    return digest.hexdigest()


def fsync_path(path: Path) -> None:
    """Push a file's data, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write to a temporary name beside ``path``, fsync, rename: readers see the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    fsync_path(aside)
    aside.replace(path)
    fsync_path(path.parent)


def sweep_temporary(folder: Path) -> None:
    """Delete what ``write_atomic`` leaves in a folder when it is killed. No other process may be writing there."""
    for path in folder.glob(".*"):
        if re.fullmatch(r"\..+\.\d+", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def replace_folder(aside: Path, final: Path) -> None:
    """Put the folder ``aside`` in the place of ``final``, which may exist: rename aside, rename in, delete.

    A process that is killed on the way leaves what ``recover_folder`` puts right. One writer at a time.
    """
    before = _before(final)
    recover_folder(final)
    if final.exists():
        final.rename(before)
    aside.rename(final)
    fsync_path(final.parent)
    shutil.rmtree(before, ignore_errors=True)


def recover_folder(final: Path) -> None:
    """Undo a ``replace_folder`` that was cut off: the old folder comes back if the new one is not in its place."""
    before = _before(final)
    if not before.exists():
        return
    if final.exists():
        shutil.rmtree(before, ignore_errors=True)
    else:
        before.rename(final)
        fsync_path(final.parent)


def _before(final: Path) -> Path:
    return final.with_name(f".{final.name}.before")
