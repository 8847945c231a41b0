"""What runs leave behind in numbers, read strictly: result.json, sweep.json, metrics.jsonl.

Run folders come from others too. What cannot be true (more right answers than images, a rate of 16,666 %, a step of -1)
is a UserError that names the file; every text is printable when it comes from here.
"""

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dist_defend.counts import Count
from dist_defend.detection import Detection
from dist_defend.errors import UserError
from dist_defend.files import read_regular
from dist_defend.screen import printable
from dist_defend.strict_json import MOST_BYTES, build, parse_json

MOST_ROWS = 5000  # of a result.json
MOST_STOPS = 20_000  # of a sweep.json
MOST_NAMES = 200  # stages, and scalars, of a metrics.jsonl
MOST_NUMBER = 2**53  # of anything that is counted: what a float still holds exactly
MOST_SCALAR = 1e30
_MOST_SECONDS = 1e12
COUNTS = ("acc", "asr", "asr_all", "ra")
BEFORE = ("acc_before", "asr_before")
RETUNED = (  # see methods.measure.reactivate
    *("acc_retuned", "asr_retuned", "asr_retuned_clean", "asr_retuned_control"),
    *("asr_queried", "asr_queried_control"),
)


def _check_counts(counts: dict[str, Count | None]) -> None:
    for name, count in counts.items():
        if count is not None and not 0 <= count.correct <= count.n <= MOST_NUMBER:
            raise ValueError(f"{name} is {count.correct} of {count.n}")


@dataclass(frozen=True)
class _Row:
    kind: str
    task: str
    seed: int
    acc: Count
    asr: Count
    asr_all: Count
    ra: Count
    acc_retuned: Count | None = None
    asr_retuned: Count | None = None
    asr_retuned_clean: Count | None = None
    asr_retuned_control: Count | None = None
    asr_queried: Count | None = None
    asr_queried_control: Count | None = None

    def __post_init__(self) -> None:
        _check_counts({name: getattr(self, name) for name in (*COUNTS, *RETUNED)})
        if not 0 <= self.seed <= 2**64:
            raise ValueError(f"seed is {self.seed}")
        if not self.asr.n == self.ra.n <= self.asr_all.n:
            raise ValueError(f"asr, ra and asr_all count {self.asr.n}, {self.ra.n} and {self.asr_all.n} images")


@dataclass(frozen=True, kw_only=True)
class Detected(Detection):
    """A row of what a detector found. task: the data that it looked at; seed: the run's."""

    kind: str
    task: str
    seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed <= 2**64:
            raise ValueError(f"seed is {self.seed}")


@dataclass(frozen=True)
class _Result:
    name: str | None = None
    method: str | None = None
    head: str | None = None
    seed: int | None = None
    world_size: int | None = None
    device: str | None = None
    code_version: str | None = None
    config_sha256: str | None = None
    wall_seconds: float | int | None = None
    device_seconds: float | int | None = None
    work_seconds: float | int | None = None
    peak_memory_bytes: int | None = None
    data: dict[str, str] = field(default_factory=dict)
    targets: dict[str, str] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seconds = {name: 0 for name in ("wall_seconds", "device_seconds", "work_seconds")}
        least = {"seed": 0, "world_size": 1, "peak_memory_bytes": 0, **seconds}
        for name, bound in least.items():
            value = getattr(self, name)
            most = _MOST_SECONDS if name.endswith("seconds") else 2**64
            if value is not None and not bound <= value <= most:
                raise ValueError(f"{name} is {value}")


@dataclass(frozen=True)
class _Stop:
    pruned: int
    threshold: float | int | None
    chosen: bool = False
    oracle: bool = False
    acc: Count | None = None
    asr: Count | None = None
    acc_defence: Count | None = None

    def __post_init__(self) -> None:
        _check_counts({"acc": self.acc, "asr": self.asr, "acc_defence": self.acc_defence})
        if not 0 <= self.pruned <= MOST_NUMBER:
            raise ValueError(f"pruned is {self.pruned}")
        if self.threshold is not None and not abs(self.threshold) <= MOST_SCALAR:
            raise ValueError(f"threshold is {self.threshold}")


def read_inside(path: Path, most_bytes: int) -> bytes | None:
    """The bytes of a regular file, None if it is not there. UserError for a link that leads out of the file's folder.

    A page that embeds what a run folder holds would otherwise show any file that its reader may read.
    """
    try:
        content = read_regular(path, most_bytes)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); delete it, or name other folders") from error
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(path.parent)):
        raise UserError(f"{path} is a link out of its folder, which is not followed: put the file itself there")
    return content


def read_result(file: Path, remedy: str) -> dict[str, Any]:
    """What the tables need of a result.json: the fields of _Result that it has, "rows", "detections" and "metrics".

    Each row has kind, task, seed, the COUNTS and maybe RETUNED as {"correct", "n"}; those of detectors are apart, as
    Detected. metrics has those of BEFORE that are known, in percent. UserError, ending in ``remedy``, for anything that
    is no result of this program.
    """
    where = f"{file}: not a result of dist-defend: it"
    data = read_inside(file, MOST_BYTES)
    if data is None:
        raise UserError(f"{where} cannot be read (it is a link to nowhere, or gone): {remedy}")
    content = _mapping(parse_json(data, where, remedy, may_be_nan=True), where, remedy)
    known = _known(_Result, content)
    build(_Result, known, where, remedy)
    rows, metrics = content.get("rows") or [], content.get("metrics") or {}
    if not isinstance(rows, list) or len(rows) > MOST_ROWS:
        raise UserError(f"{where} holds no list of at most {MOST_ROWS} rows: {remedy}")
    counted: list[dict[str, Any]] = []
    detections: list[Detected] = []
    for number, row in enumerate(rows):
        told = f"{where} has a row {number + 1} that"
        if "detector" in _mapping(row, told, remedy):
            detections.append(build(Detected, _printable(_known(Detected, row)), told, remedy))
        else:
            counted.append(_known(_Row, row))
            build(_Row, counted[-1], told, remedy)
    metrics = _mapping(metrics, f"{where} has metrics that", remedy)
    before = {name: metrics[name] for name in BEFORE if metrics.get(name) is not None}
    for name, value in before.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not (value != value or 0 <= value <= 100):
            raise UserError(f"{where} says that {name} is {printable(value, 40)} %: {remedy}")
    result = {**known, "rows": counted, "metrics": before}
    return {**{key: _printable(item) for key, item in result.items()}, "detections": detections}


def read_stops(content: bytes, where: str, remedy: str) -> list[dict[str, Any]]:
    """The stops of a sweep.json: "threshold" (or null), "pruned", "chosen", "oracle", and the counts that were made."""
    stops = parse_json(content, where, remedy)
    if not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise UserError(f"{where} holds no list of at most {MOST_STOPS} stops: {remedy}")
    found = []
    for stop in stops:
        if "threshold" not in _mapping(stop, where, remedy):
            raise UserError(f"{where} has a stop without a threshold: {remedy}")
        found.append({"threshold": None} | _known(_Stop, stop))
        build(_Stop, found[-1], where, remedy)
    return found


def read_metrics(content: bytes, where: str, remedy: str) -> tuple[list[dict[str, Any]], int]:
    """Lines of a metrics.jsonl, and how many could not be read (a killed run tears its last one).

    A line has "step" and "stage", and all of its values that are finite numbers. UserError for more stages or scalars
    than anybody logs.
    """
    lines = content.splitlines()
    rows = [row for line in lines if (row := _metrics_row(line, where)) is not None]
    stages, names = {row["stage"] for row in rows}, {name for row in rows for name in row}
    if len(stages) > MOST_NAMES or len(names) > MOST_NAMES:
        raise UserError(f"{where} has {len(stages)} stages and {len(names)} scalars, more than {MOST_NAMES}: {remedy}")
    return rows, len(lines) - len(rows)


def _metrics_row(line: bytes, where: str) -> dict[str, Any] | None:
    try:
        row = parse_json(line, where, "", may_be_nan=True)
    except UserError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("stage"), str) or not _is_number(row.get("step")):
        return None
    if not isinstance(row["step"], int) or not 0 <= row["step"] <= MOST_NUMBER:
        return None
    scalars = {printable(name, 80): value for name, value in row.items() if _is_number(value)}
    return scalars | {"stage": printable(row["stage"], 80)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST_SCALAR


def _mapping(content: Any, where: str, remedy: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{where} holds a {type(content).__name__}, not keys and values: {remedy}")
    return content


def _known(kind: type, content: dict[str, Any]) -> dict[str, Any]:
    """The keys that the schema knows; a run writes more, and later versions others. null is as good as nothing."""
    return {own.name: content[own.name] for own in fields(kind) if content.get(own.name) is not None}


def _printable(value: Any) -> Any:
    """The same with every text printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list) else value
