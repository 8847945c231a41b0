"""A sweep file to its points: experiments, each keyed by what it computes.

A stage's grid is the product of four lists of changes to an experiment file: ``product`` (all combinations), ``zip``
(lists read side by side), ``explicit`` (written out) and ``seeds``. A stage that comes ``after`` another has its own
grid once for each point of that one, and reads ``${stage.output}`` and any other key of the points it descends from.
In a key ``${method}`` is the method's name, so one ``set`` serves the files of several methods.
"""

import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_defend.config import Experiment, build_experiment, change
from dist_defend.errors import UserError
from dist_defend.strict_yaml import read_yaml
from dist_defend.sweep.file import StageConfig, SweepConfig, read_file
from dist_defend.templates import shipped

_REFERENCE = re.compile(r"\$\{(\w+)\.([\w.]+)\}")
MOST_POINTS = 10_000  # of a stage: reading them takes a minute
_KEY_LENGTH = 12  # hex digits
# What a resume may change is no part of a point's identity, unless the sweep varies it.
_FREE_KEYS = ("world_size", "trainer", "loader")


@dataclass(frozen=True)
class Point:
    """One experiment of a sweep.

    root is the number of the first stage's point that it descends from, column the place in its own grid and those of
    its ancestors after the first: all points of a stage with one column follow one list of roots.
    """

    stage: str
    key: str
    experiment: Experiment
    labels: dict[str, Any]  # axis, with its stage before it -> what stands for the value in tables
    parent: "Point | None"
    root: int
    column: tuple[int, ...]

    @property
    def name(self) -> str:
        """For people: the labels."""
        axes = shorten(list(self.labels))
        return " ".join(f"{axis}={label}" for axis, label in zip(axes, self.labels.values(), strict=True)) or self.stage


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read and spread out."""

    path: Path
    config: SweepConfig
    points: tuple[Point, ...]  # stage by stage
    scale: str | None = None

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    def stage(self, name: str) -> list[Point]:
        """Its points."""
        return [point for point in self.points if point.stage == name]

    def run_folder(self, point: Point) -> Path:
        """Where it runs."""
        return Path(point.experiment.output)

    def is_done(self, point: Point) -> bool:
        """A point is done when it has a result, whatever a scheduler says."""
        return (self.run_folder(point) / "result.json").exists()


def load_sweep(path: str | Path, scale: str | None = None) -> Sweep:
    """Read a sweep file and build every point's experiment. UserError (file, stage, key) if anything does not fit.

    scale: one of the file's ``scales``.
    """
    path = Path(path)
    config, numbers = read_file(path, scale)
    points: dict[str, Point] = {}
    read = functools.cache(read_yaml)  # each experiment file once, not once a point
    for name, stage_config in config.stages.items():
        for point in _Stage(path, config.output, name, stage_config, read).points(list(points.values())):
            if other := points.get(point.key):
                raise UserError(
                    f"{path}: two points are the same experiment: {other.stage} ({other.name}) and {point.stage} "
                    f"({point.name}); take one of them out"
                )
            points[point.key] = point
    _check_points_per_job(path, config, list(points.values()))
    for number, own in zip(numbers, config.expect, strict=True):
        if not any(own.selects(point.labels) for point in points.values()):
            raise UserError(f"{path}: key 'expect[{number}].at': no point has {own.name or 'anything'}; see sweep plan")
    return Sweep(path, config, tuple(points.values()), scale)


class _Stage:
    def __init__(
        self, path: Path, output: str, name: str, config: StageConfig, read: Callable[[Path], dict[str, Any]]
    ) -> None:
        self.path, self.output, self.name, self.config, self._read = path, output, name, config, read
        if not re.fullmatch(r"\w+", name):
            raise self.error("", f"'{name}' is no name; use letters, digits and _")

    def error(self, key: str, told: str) -> UserError:
        return UserError(f"{self.path}: stage '{self.name}'{f', key {key!r}' if key else ''}: {told}")

    def points(self, earlier: list[Point]) -> Iterator[Point]:
        """The stage's own grid for each point that it comes after."""
        grid = self.grid()
        if self.config.after is None:
            parents: list[Point | None] = [None]
        else:
            parents = [point for point in earlier if point.stage == self.config.after]
            if not parents:
                known = ", ".join(dict.fromkeys(point.stage for point in earlier)) or "none"
                raise self.error("after", f"{self.config.after!r} is no stage above this one; those are: {known}")
        self.check_number(len(parents) * len(grid))
        for parent in parents:
            lineage = _lineage(parent)
            for column, (changes, labels) in enumerate(grid):
                root, columns = (column, ()) if parent is None else (parent.root, (*parent.column, column))
                experiment = self.experiment(changes, lineage)
                key = _key(experiment, changes, self.output)
                yield Point(
                    stage=self.name,
                    key=key,
                    experiment=replace(experiment, output=f"{self.output}/points/{key}"),
                    labels={**(parent.labels if parent else {}), **labels},
                    parent=parent,
                    root=root,
                    column=columns,
                )

    def grid(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Changes and labels of each of the stage's own points."""
        config = self.config
        product = [[(key, *pair) for pair in self.axis("product", key, config.product[key])] for key in config.product]
        beside = [[(key, *pair) for pair in self.axis("zip", key, config.zip[key])] for key in config.zip]
        if len({len(axis) for axis in beside}) > 1:
            lengths = ", ".join(f"{axis[0][0]} has {len(axis)}" for axis in beside)
            raise self.error("zip", f"lists of one length are read side by side, but {lengths}")
        explicit = self.explicit()
        factors = [*map(len, product), *map(len, beside[:1]), len(explicit), len(config.seeds) or 1]
        self.check_number(math.prod(factors))  # before they are made
        lists: list[list[tuple[dict[str, Any], dict[str, Any]]]] = [
            [self.change(cells) for cells in itertools.product(*product)],
            [self.change(cells) for cells in zip(*beside, strict=True)] or [({}, {})],
            explicit,
            [({"seed": seed}, {f"{self.name}.seed": seed}) for seed in config.seeds] or [({}, {})],
        ]
        merged = []
        for parts in itertools.product(*lists):
            changes = {key: value for part, _ in parts for key, value in part.items()}
            merged.append((config.set | changes, {axis: label for _, part in parts for axis, label in part.items()}))
        return merged

    def check_number(self, num_points: int) -> None:
        if num_points > MOST_POINTS:
            raise self.error(
                "", f"{num_points} points, at most {MOST_POINTS} are read; leave values out, or use two files"
            )

    def change(self, cells: tuple[tuple[str, Any, Any], ...]) -> tuple[dict[str, Any], dict[str, Any]]:
        changes = {key: value for key, _, value in cells}
        return changes, {f"{self.name}.{key}": label for key, label, _ in cells}

    def axis(self, kind: str, key: str, values: Any) -> list[tuple[Any, Any]]:
        """(label, value) of each of an axis' values."""
        if not isinstance(values, list | dict) or not values:
            raise self.error(f"{kind}.{key}", f"expected a list of values, or label: value, found {values!r}")
        return list(values.items()) if isinstance(values, dict) else [(_label(value), value) for value in values]

    def explicit(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        entries, own = self.config.explicit, {}
        if isinstance(entries, dict):
            own = {f"{self.name}": list(entries)}
            entries = list(entries.values())
        if not isinstance(entries, list | tuple) or not all(isinstance(entry, dict) for entry in entries):
            raise self.error("explicit", "expected a list of sections of changes, or label: changes")
        if not own:
            return [(entry, {f"{self.name}.{k}": _label(v) for k, v in entry.items()}) for entry in entries] or [
                ({}, {})
            ]
        return [(entry, {self.name: label}) for entry, label in zip(entries, own[self.name], strict=True)]

    def experiment(self, changes: dict[str, Any], lineage: Mapping[str, Any]) -> Experiment:
        """The experiment file with the changes; its output is still the file's own."""
        file = changes.get("config", self.config.config)
        if not isinstance(file, str):
            raise self.error("config", "missing; it names the experiment file that the grid changes")
        known = {key: self.resolve(key, value, lineage) for key, value in changes.items() if key != "config"}
        if "output" in known:
            raise self.error("output", "a point's folder follows from its key; leave it out")
        try:
            path = shipped(file)
            raw = _copied(self._read(path))
            for key, value in known.items():
                change(raw, key.replace("${method}", str(raw.get("method"))), value)
            return build_experiment(raw, path)
        except UserError as error:
            raise self.error("", str(error)) from error

    def resolve(self, key: str, value: Any, lineage: Mapping[str, Any]) -> Any:
        """The value with every ${stage.key} in it replaced; one that stands alone keeps its type."""
        if isinstance(value, dict):
            return {inner: self.resolve(key, item, lineage) for inner, item in value.items()}
        if isinstance(value, list):
            return [self.resolve(key, item, lineage) for item in value]
        if not isinstance(value, str):
            return value

        def find(match: re.Match[str]) -> Any:
            if match[1] not in lineage:
                known = ", ".join(lineage) or "none: it has no 'after'"
                raise self.error(key, f"{match[0]}: this stage comes after {known}")
            found = lineage[match[1]]
            for part in match[2].split("."):
                if not isinstance(found, dict) or part not in found:
                    raise self.error(key, f"{match[0]}: the experiment of stage '{match[1]}' has no key '{match[2]}'")
                found = found[part]
            return found

        whole = _REFERENCE.fullmatch(value)
        return find(whole) if whole else _REFERENCE.sub(lambda match: str(find(match)), value)


def _copied(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _copied(value) for key, value in content.items()}
    return [_copied(value) for value in content] if isinstance(content, list) else content


def _lineage(point: Point | None) -> dict[str, Any]:
    """Stage -> resolved experiment of a point and those that it descends from."""
    found = {}
    while point is not None:
        found[point.stage] = point.experiment.resolved()
        point = point.parent
    return found


def _key(experiment: Experiment, changes: Mapping[str, Any], output: str) -> str:
    """Hex digest of what the experiment computes; the same wherever the sweep's folder lies."""
    varied = {change.split(".")[0] for change in changes}
    free = {"output", *(key for key in _FREE_KEYS if key not in varied)}
    identity = {key: value for key, value in experiment.resolved().items() if key not in free}
    written = json.dumps(identity, sort_keys=True).replace(json.dumps(f"{output}/points/")[1:-1], "")
    return hashlib.sha256(written.encode()).hexdigest()[:_KEY_LENGTH]


def _check_points_per_job(path: Path, config: SweepConfig, points: list[Point]) -> None:
    for name, stage in config.stages.items():
        first = first_stage(config, name)
        if stage.points_per_job % (share := config.stages[first].points_per_job):
            raise UserError(
                f"{path}: stage '{name}', key 'points_per_job': {stage.points_per_job} is no multiple of the {share} "
                f"of stage '{first}', whose jobs it follows one by one; write {share}, or a multiple of it"
            )
    for point in points:
        ranks, together = point.experiment.world_size or 1, config.stages[point.stage].points_per_job
        if ranks > 1 and together > 1:
            raise UserError(
                f"{path}: stage '{point.stage}', key 'points_per_job': {together} points share a process, but "
                f"{point.name} asks for {ranks} ranks (world_size); leave one of the two out"
            )


def first_stage(config: SweepConfig, name: str) -> str:
    """The stage at the head of those that this one comes after."""
    while (before := config.stages[name].after) is not None:
        name = before
    return name


def _label(value: Any) -> Any:
    """What stands for an axis' value: itself, or the name of a section that has one, or its JSON."""
    if isinstance(value, dict):
        name = value.get("name")
        return name if isinstance(name, str) else json.dumps(value, sort_keys=True)
    return json.dumps(value) if isinstance(value, list) else value


def shorten(axes: list[str]) -> list[str]:
    """The last part of each axis' name, where that is enough to tell it from the others."""
    last = [axis.rpartition(".")[2] for axis in axes]
    return [name if last.count(name) == 1 else axis for name, axis in zip(last, axes, strict=True)]
