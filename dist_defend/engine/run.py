"""The run folder: what a run reads to resume and what it leaves behind."""

import contextlib
import json
import logging
import os
import platform
import reprlib
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dist_defend.engine.identity import check_same
from dist_defend.engine.version import code_version
from dist_defend.errors import UserError
from dist_defend.files import sweep_temporary, write_atomic
from dist_defend.lock import FolderLock
from dist_defend.screen import printable
from dist_defend.strict_json import read_json
from dist_defend.terminal import LineFormatter

log = logging.getLogger(__name__)

END = "end.json"
# Where a run happens, not what it computes: a resume may change these.
_FREE_KEYS = ("world_size", "output", "trainer", "loader")
_shown = reprlib.Repr()  # a value of whatever size and depth
_shown.maxstring = _shown.maxother = 200


class RunFolder:
    """runs/<name>/: config.yaml, env.json, log.txt, metrics.jsonl, checkpoints/, model/, end.json, result.json.

    Only the main rank writes. result.json is written last: a folder that has it is finished. end.json tells how a
    process ended that did not get that far; the next one deletes it.
    """

    def __init__(self, path: Path, is_main: bool) -> None:
        self.path, self.is_main = path, is_main
        self.checkpoints = path / "checkpoints"
        self._recorded = path / "config.json"
        self._metrics_path = path / "metrics.jsonl"
        self._metrics: BinaryIO | None = None
        self._lock = FolderLock(path)
        self._is_open = False

    @property
    def is_finished(self) -> bool:
        return (self.path / "result.json").exists()

    def check(self, resolved: dict[str, Any]) -> None:
        """UserError if the folder cannot be written or holds another experiment (it names the first other key)."""
        try:
            place = next(p for p in (self.path.absolute(), *self.path.absolute().parents) if p.exists())
        except OSError as error:  # a name that is too long, a folder that may not be entered
            raise UserError(f"key 'output' is {self.path}, which cannot be made: {error.strerror}") from error
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise UserError(f"key 'output' is {self.path}, but {place} is not a folder that can be written")
        if not self._recorded.exists():
            return
        old = self._read(self._recorded, "restore it, delete the folder, or change 'output'")
        for key in sorted({*old, *resolved} - set(_FREE_KEYS)):
            difference = _first_difference(old.get(key), resolved.get(key), key)
            if difference:
                raise UserError(
                    f"{self.path} holds another experiment: {difference}; change 'output' or delete the folder"
                )

    def read_result(self, inputs: dict[str, str]) -> dict[str, Any]:
        """A finished run's result.json. UserError if it comes of other inputs (digests by role) than these."""
        path = self.path / "result.json"
        result = self._read(path, "restore it, or delete it to go on from the newest checkpoint")
        then = result.get("inputs", {})
        if not isinstance(then, dict) or not all(isinstance(digest, str) for digest in then.values()):
            raise UserError(f"{path}: key 'inputs' holds no digests: restore it, or delete the folder to run it again")
        check_same(then, inputs, f"{self.path} is finished and", "put it back, change 'output', or delete the folder")
        return result

    @staticmethod
    def _read(path: Path, remedy: str) -> dict[str, Any]:
        try:
            content = read_json(path, remedy, may_be_nan=True)
        except FileNotFoundError:
            content = None  # a link to nowhere
        if not isinstance(content, dict):
            raise UserError(f"{path} holds no keys and values: {remedy}")
        return content

    def check_free(self) -> None:
        """UserError while another process writes there; nothing is taken or written."""
        if self.is_main:
            self._lock.check()

    def open(self, resolved: dict[str, Any], text: str) -> None:
        """Create the folder and lock it, write down the configuration (as data and as YAML ``text``), start log.txt.

        UserError while another process writes there, or if log.txt or metrics.jsonl leads out of the folder.
        """
        if not self.is_main:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.take()
        for own in (self.path / "log.txt", self._metrics_path):
            if own.is_symlink() or (own.exists() and not own.is_file()):
                raise UserError(f"{own} is a link, a pipe or a folder, not this run's own file: delete it")
        for folder in (self.path, self.path / "model"):
            sweep_temporary(folder)  # of a run that was killed
        (self.path / END).unlink(missing_ok=True)
        self._is_open = True
        write_atomic(self.path / "config.yaml", text)
        write_atomic(self._recorded, json.dumps(resolved))
        write_atomic(self.path / "env.json", json.dumps(environment(), indent=1))
        handler = logging.FileHandler(self.path / "log.txt")
        handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger("dist_defend").addHandler(handler)

    def open_metrics(self, size: int) -> None:
        """Append to metrics.jsonl from its first ``size`` bytes on: a resume writes the rest again."""
        if not self.is_main:
            return
        self._metrics = self._metrics_path.open("ab")
        self._metrics.truncate(min(size, self._metrics.tell()))
        self._metrics.seek(0, os.SEEK_END)

    def check_metrics(self, size: int, checkpoint: Path) -> None:
        """UserError unless metrics.jsonl has the ``size`` bytes that belong to a checkpoint."""
        found = self._metrics_path.stat().st_size if self._metrics_path.is_file() else 0
        if found < size:
            raise UserError(
                f"{checkpoint / 'state.json'}: key 'metrics_size' is {printable(size, 40)}, but {self._metrics_path} "
                f"has {found} bytes: restore it, or delete {checkpoint} to go on from the one before"
            )

    def sync_metrics(self) -> int:
        """Push metrics.jsonl to the disk; its bytes so far. Main rank."""
        if self._metrics is None:
            return 0
        os.fsync(self._metrics.fileno())
        return self._metrics.tell()

    def write_metrics(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.write(json.dumps(row).encode() + b"\n")
            self._metrics.flush()

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json, the run's last act."""
        if self.is_main:
            write_atomic(self.path / "result.json", json.dumps(result, indent=1))

    def note_end(self, state: str, told: str) -> None:
        """Write end.json: ``state`` is stopped or failed, ``told`` the line. A full disk is no new failure."""
        if self._is_open:
            end = {"state": state, "told": printable(" ".join(told.split()), 500), "time": time.time()}
            with contextlib.suppress(OSError):
                write_atomic(self.path / END, json.dumps(end))

    def close(self) -> None:
        """Release the files and the folder."""
        self._lock.release()
        if self._metrics is not None:
            self._metrics.close()
        logger = logging.getLogger("dist_defend")
        for handler in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
            logger.removeHandler(handler)
            handler.close()


def _first_difference(old: Any, new: Any, key: str) -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for inner in {**old, **new}:
            found = _first_difference(old.get(inner), new.get(inner), f"{key}.{inner}")
            if found:
                return found
        return None
    if old == new:
        return None
    return f"key '{printable(key, 200)}' is {printable(_shown.repr(old))} there and {printable(_shown.repr(new))} here"


def environment() -> dict[str, Any]:
    """What the run ran on, for env.json."""
    packages: dict[str, str] = {"torch": torch.__version__}  # names the build too, such as +cpu; a wheel's may not
    for name in ("torchvision", "accelerate", "deepspeed", "ffcv", "timm", "numpy", "numba"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "missing"
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": packages,
        "code_version": code_version(),
        "command": sys.argv,
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
