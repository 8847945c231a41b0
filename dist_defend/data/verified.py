"""Which prepared data sets were checked, byte for byte, so that each is checked once per machine and not at each start.

A mark is an empty file in the user's cache. Its name is a digest of the manifest, of size, inode and times of change of
each file, and of the version of the checks; so a mark cannot be damaged, and whatever changes has none. Only this
user's marks count.
"""

import hashlib
import os
import stat
import time
from pathlib import Path

from dist_defend.files import user_cache

FILES = ("labels.npy", "order.npy", "images.npy", "data.beton")
CHECKS = 1  # raised with every new check
_SETTLED = 2.0  # seconds after which a change shows in a file's times, on any file system


class Mark:
    """The mark of a data set as it is now: the bytes of its manifest, and what the status of its files tells."""

    def __init__(self, folder: Path, manifest: bytes) -> None:
        self._last_change = 0.0
        lines = [f"{CHECKS}"]
        for name in FILES:
            try:
                now = os.stat(f"{folder}/{name}")
            except OSError:
                continue
            lines.append(f"{name} {now.st_size} {now.st_ino} {now.st_mtime_ns} {now.st_ctime_ns}")
            self._last_change = max(self._last_change, now.st_ctime)
        digest = hashlib.sha256("\n".join(lines).encode() + b"\n" + manifest).hexdigest()
        cache = user_cache()
        self._path = None if cache is None else f"{cache}/verified/{digest}"

    def exists(self) -> bool:
        """Whether this user has checked these files."""
        try:
            status = os.lstat(self._path) if self._path is not None else None
        except OSError:
            return False
        return status is not None and stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()

    def leave(self) -> None:
        """Remember that they were checked, where the cache can be written and none was changed just now."""
        if self._path is None or time.time() - self._last_change < _SETTLED:
            return
        try:
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            Path(self._path).touch()
        except OSError:
            pass
