"""What a run reads beside its configuration, by digest, and its lives: a checkpoint and a result remember both."""

import hashlib
import logging
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_defend.bounds import at_least_one
from dist_defend.engine.clock import WorkClock
from dist_defend.engine.version import code_version
from dist_defend.errors import UserError
from dist_defend.files import read_regular, sha256_file
from dist_defend.screen import printable
from dist_defend.strict_json import build, parse_json

log = logging.getLogger(__name__)

# What tells all of a folder's content: each holds the sha256 of the files beside it.
_MANIFESTS = ("manifest.json", "model.json")
_MOST_BYTES = 64 << 20  # of a model card


def digests_of(section: Any, key: str) -> dict[str, str]:
    """Every file, prepared data set and model folder that a section of a configuration names: key -> sha256.

    Whatever a method opens is named by its section or by the card of a model that the section names (the trigger it
    was backdoored with); so no method has to report what it opens. Of a folder the digest is that of its manifest or
    card. A text that names nothing here is no input. Roles are the keys: ``mimic.teacher``, ``rnp.mask_file``.
    """
    return dict(_digests(section, key))


def _digests(section: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(section, dict):
        for name, value in section.items():
            yield from _digests(value, f"{key}.{name}")
    elif isinstance(section, list | tuple):
        for number, value in enumerate(section):
            yield from _digests(value, f"{key}.{number}")
    elif isinstance(section, str) and section:
        if os.path.isfile(section):  # unlike Path's, False for any text that is no path
            yield key, sha256_file(Path(section))
        elif os.path.isdir(section):
            for manifest in (Path(section) / name for name in _MANIFESTS):
                if manifest.is_file():
                    content = read_regular(manifest, _MOST_BYTES)
                    yield key, hashlib.sha256(content).hexdigest()
                    yield from _digests(_attack(content), f"{key}.attack")


def _attack(card: bytes) -> Any:
    try:
        content = parse_json(card, "", "", may_be_nan=True)
    except UserError:
        return None  # whoever opens the folder says so
    return content.get("attack", content.get("trigger")) if isinstance(content, dict) else None  # format 1 had trigger


@dataclass(frozen=True)
class Life:
    """A run's time in one process, or in one on each rank, up to its last checkpoint or its end.

    work_seconds: without measuring, see WorkClock; 0 of lives before it was kept.
    """

    code_version: str
    world_size: int
    wall_seconds: float
    work_seconds: float = 0.0

    def __post_init__(self) -> None:
        at_least_one(self, "world_size")
        for key in ("wall_seconds", "work_seconds"):
            value: float = getattr(self, key)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"key '{key}' is {value}; it must be a number of seconds")


@dataclass(frozen=True)
class Past:
    """What a checkpoint remembers: digests of the inputs by role, and the lives so far."""

    inputs: dict[str, str]
    lives: tuple[Life, ...]

    @classmethod
    def read(cls, content: Any, where: Path) -> "Past":
        """UserError for anything that ``Identity.plain`` does not make."""
        return build(cls, content, f"{where}, key 'identity',", "delete this checkpoint")


class Identity:
    """Of a run in this process. earlier: the lives that it goes on from."""

    def __init__(
        self, inputs: dict[str, str], world_size: int, version: str | None = None, clock: WorkClock | None = None
    ) -> None:
        """The clocks start now, unless one is given, and the code is what it is now, unless a version is given."""
        self.inputs, self.world_size, self.version = inputs, world_size, version or code_version()
        self.earlier: tuple[Life, ...] = ()
        self.clock = clock or WorkClock()
        self._started = time.perf_counter()

    @property
    def lives(self) -> tuple[Life, ...]:
        """All of them, the present one last."""
        now = max(0.0, time.perf_counter() - self._started)
        return (*self.earlier, Life(self.version, self.world_size, now, self.clock.seconds))

    @property
    def work_seconds(self) -> float:
        """Of all lives and ranks."""
        return sum(life.work_seconds * life.world_size for life in self.lives)

    def plain(self) -> dict[str, Any]:
        """For a checkpoint: what ``Past.read`` reads."""
        return {"inputs": dict(self.inputs), "lives": [asdict(life) for life in self.lives]}

    def follow(self, past: Past | None, where: Path, is_main: bool) -> None:
        """Go on from a checkpoint. UserError if it comes of other inputs; other code is told."""
        if past is None:
            if is_main:
                log.warning(
                    "%s does not say what data, models and code it comes from: taken to be the present ones; "
                    "the seconds before it are not counted",
                    where,
                )
            return
        remedy = f"put it back, or delete {where.parent} (or choose another 'output') to start again with the new"
        check_same(past.inputs, self.inputs, str(where), remedy)
        self.earlier = past.lives
        before = past.lives[-1].code_version if past.lives else self.version
        if before != self.version and is_main:
            log.warning("%s was written by version %s; version %s goes on", where, printable(before), self.version)


def check_same(then: dict[str, str], now: dict[str, str], what: str, remedy: str) -> None:
    """UserError for the first role whose content has changed. What is missing is for its reader to say."""
    for role, digest in then.items():
        if role in now and now[role] != digest:
            raise UserError(
                f"{what} comes of another '{printable(role, 200)}': sha256 {printable(digest[:12])} then, "
                f"{now[role][:12]} now: {remedy}"
            )
