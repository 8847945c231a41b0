"""Which prepared data sets were checked, byte for byte, so that each is checked once per machine and not at each start.

A mark is an empty file in the user's cache. Its name is a digest of the manifest, of size, inode and times of change of
each file, and of the version of the checks; so a mark cannot be damaged, and whatever changes has none. Only this
user's marks count.
"""

import hashlib
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path

from dist_defend.files import user_cache

CHECKS = 1  # raised with every new check
_SETTLED = 2.0  # seconds after which a change shows in a file's times, on any file system


class Mark:
    """The mark of a data set as it is now: the bytes of its manifest, and each file's status."""

    def __init__(self, manifest: bytes, files: Mapping[str, os.stat_result]) -> None:
        self._last_change = max(status.st_ctime for status in files.values())
        digest = hashlib.sha256(f"{CHECKS}\n".encode() + manifest)
        for name, is_now in sorted(files.items()):
            digest.update(
                f"\n{name} {is_now.st_size} {is_now.st_ino} {is_now.st_mtime_ns} {is_now.st_ctime_ns}".encode()
            )
        cache = user_cache()
        self._path: Path | None = cache / "verified" / digest.hexdigest() if cache is not None else None

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
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._path.touch()
        except OSError:
            pass
