"""One writer in a folder: a lock that the kernel gives back when its holder ends, however it ends."""

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO

from dist_defend.errors import UserError
from dist_defend.files import open_regular
from dist_defend.screen import printable

_NAME = ".lock"
_INSTANT = 0.1  # seconds
_REMEDY = "wait for it, end it, or choose another folder (key 'output')"
log = logging.getLogger(__name__)


class FolderLock:
    """Held from ``take`` to ``release`` or the process' end. The file in the folder stays; who holds it is what counts.

    is_beside: the file lies beside the folder, which may be renamed then, and goes with the release.
    """

    def __init__(self, folder: Path, remedy: str = _REMEDY, *, is_beside: bool = False) -> None:
        self.path = folder.with_name(f".{folder.name}{_NAME}") if is_beside else folder / _NAME
        self._folder, self._remedy, self._is_beside = folder, remedy, is_beside
        self._file: IO[str] | None = None

    def take(self) -> None:
        """UserError, naming host, process, start and job of the holder, while another process has the folder.

        Where the file system has no locks this is said, and nothing is locked.
        """
        file = self._locked()
        if file is None:
            return
        self._file = file
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "job": os.environ.get("SLURM_JOB_ID"),
        }
        file.truncate(0)
        file.write(json.dumps(holder))
        file.flush()

    def _locked(self) -> IO[str] | None:
        is_first = True
        while True:
            file = self.path.open("a+", encoding="utf-8", errors="replace")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with file:
                    if is_first:  # `look` has it for an instant
                        is_first = False
                        time.sleep(_INSTANT)
                        continue
                    raise self._in_use(file) from None
            except OSError as error:  # ENOLCK or ENOSYS: NFS without lockd, some parallel file systems
                file.close()
                if self._is_beside:
                    self.path.unlink(missing_ok=True)
                log.warning(
                    "%s cannot be locked (%s): see to it that only one run writes there", self._folder, error.strerror
                )
                return None
            try:
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    return file
            except FileNotFoundError:  # its holder has just let go of it: there is a new file to lock
                pass
            file.close()

    def check(self) -> None:
        """UserError as from ``take``, but the folder is not taken, and nothing is written."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back at once
            except BlockingIOError:
                raise self._in_use(file) from None
            except OSError:  # no locks here, which take says
                return

    def look(self) -> tuple[bool | None, dict[str, str]]:
        """Whether a process has the folder, and host, pid, started and job of the newest one that had it, where known.

        Nothing is written. None: the file system cannot say. One on another host is seen where the file system shares
        its locks, which is not known here.
        """
        try:
            with open_regular(self.path) as file:
                told = _holder(file.read(1000).decode(errors="replace"))
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back at once
                except BlockingIOError:
                    return True, told
                except OSError:
                    return None, told
                return False, told
        except FileNotFoundError:
            return False, {}
        except OSError:
            return None, {}

    def _in_use(self, file: IO[str]) -> UserError:
        file.seek(0)
        return UserError(f"{self._folder} is in use by {_told(file.read(1000))}: {self._remedy}")

    def release(self) -> None:
        """Let go of the folder."""
        if self._file is not None:
            if self._is_beside:
                self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def _holder(text: str) -> dict[str, str]:
    """What the holder wrote; empty for anything else."""
    try:
        holder = json.loads(text)
        told = {"host": str(holder["host"]), "pid": str(int(holder["pid"])), "started": str(holder["started"])}
        return told | ({"job": str(holder["job"])} if holder["job"] else {})
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def _told(text: str) -> str:
    holder = _holder(text)
    if not holder:
        return "another process"
    job = f", job {holder['job']}" if "job" in holder else ""
    return printable(f"process {holder['pid']} on {holder['host']}{job}, since {holder['started']}", 200)
