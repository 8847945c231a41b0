"""A sweep file, and the scales that it may have."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dist_defend.bounds import at_least_one, not_negative
from dist_defend.config import build_section, check_folder
from dist_defend.errors import UserError
from dist_defend.strict_yaml import read_yaml
from dist_defend.sweep.expectation import Expectation
from dist_defend.sweep.preparation import Preparation

_TOP_KEYS = ("output", "throttle", "restarts", "slurm", "setup", "stages", "scales", "expect", "before")


@dataclass(frozen=True)
class StageConfig:
    """One grid. Values of ``set`` and of every axis may be any YAML; the key ``config`` chooses the experiment file.

    Keys:
        config: experiment file of all points, unless an axis 'config' chooses one
        after: stage whose points these start from
        set: key -> value, the same for all points
        product: key -> values, or label -> value; every combination is a point
        zip: the same, all of one length; the first values together are a point, and so on
        explicit: a list of changes, or label -> changes; each is a point
        seeds: each point once with each
        slurm: sbatch's long options, over the sweep's
        setup: lines of shell before the points, after the sweep's
        points_per_job: that one process runs one after another
    """

    config: str | None = None
    after: str | None = None
    set: dict[str, Any] = field(default_factory=dict)
    product: dict[str, Any] = field(default_factory=dict)
    zip: dict[str, Any] = field(default_factory=dict)
    explicit: Any = ()
    seeds: tuple[int, ...] = ()
    slurm: dict[str, Any] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    points_per_job: int = 1

    def __post_init__(self) -> None:
        at_least_one(self, "points_per_job")


@dataclass(frozen=True)
class SweepConfig:
    """A sweep file. One with a single stage may leave out ``stages`` and hold the stage's keys itself.

    Keys:
        output: folder for points, logs and tables
        stages: name -> a grid
        throttle: points of a stage that Slurm runs at a time; null: no limit
        restarts: of a point, by time limits, preemption and lost nodes together
        slurm: sbatch's long options
        setup: lines of shell that Slurm's jobs run first: module load, conda activate
        scales: name -> stage -> keys that replace the stage's own, or go over its ``set`` and, label by label, over its
            ``explicit``; null takes a stage, or a label, out; --scale NAME chooses them, in a folder of its own,
            <output>_<NAME>
        expect: published figures that the report compares with
        before: data sets and models that points read, and how ``dist-defend reproduce``, and nothing else, makes them
    """

    output: str
    stages: dict[str, StageConfig]
    throttle: int | None = None
    restarts: int = 20
    slurm: dict[str, Any] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    scales: dict[str, dict[str, StageConfig | None]] = field(default_factory=dict)
    expect: tuple[Expectation, ...] = ()
    before: tuple[Preparation, ...] = ()

    def __post_init__(self) -> None:
        at_least_one(self, "throttle")
        check_folder("output", self.output)
        not_negative(self, "restarts")
        if not self.stages:
            raise ValueError("key 'stages' is empty; name at least one")
        for number, expectation in enumerate(self.expect):
            if expectation.scale is not None and expectation.scale not in self.scales:
                raise ValueError(f"key 'expect[{number}].scale' is '{expectation.scale}', which 'scales' does not have")


def read_file(path: Path, scale: str | None) -> tuple[SweepConfig, list[int]]:
    """The file at this scale, with the expectations that hold there, and their numbers in the file.

    UserError (file, key) if anything does not fit.
    """
    raw = _with_slurm_as_written(read_yaml(path), read_yaml(path, as_written=True))
    if "stages" not in raw:
        stage = {key: raw.pop(key) for key in list(raw) if key not in _TOP_KEYS}
        raw["stages"] = {"points": stage}
    config: SweepConfig = build_section(SweepConfig, raw, path)
    holding = {number: own for number, own in enumerate(config.expect) if own.scale == scale}
    config = config if scale is None else _at_scale(path, config, scale)
    return replace(config, expect=tuple(holding.values())), list(holding)


def _at_scale(path: Path, config: SweepConfig, scale: str) -> SweepConfig:
    """The sweep with a scale's keys over those of its stages."""
    if scale not in config.scales:
        known = ", ".join(config.scales) or "none: it has no 'scales'"
        raise UserError(f"{path}: --scale {scale} is not in the file; known: {known}")
    stages, usual = dict(config.stages), StageConfig()
    for name, own in config.scales[scale].items():
        if name not in stages:
            raise UserError(f"{path}: key 'scales.{scale}.{name}' is no stage; those are: {', '.join(stages)}")
        if own is None:
            del stages[name]
            continue
        given = {key.name: getattr(own, key.name) for key in fields(own)}
        changed = {key: value for key, value in given.items() if value != getattr(usual, key)}
        changed["set"] = stages[name].set | own.set
        below, above = stages[name].explicit, own.explicit
        if isinstance(below, dict) and isinstance(above, dict):
            both = [label for label in above if isinstance(below.get(label), dict) and isinstance(above[label], dict)]
            merged = below | above | {label: below[label] | above[label] for label in both}
            changed["explicit"] = {label: entry for label, entry in merged.items() if entry is not None}
        stages[name] = replace(stages[name], **changed)
    if not stages:
        raise UserError(f"{path}: key 'scales.{scale}' takes every stage out; leave one")
    return replace(config, output=f"{config.output}_{scale}", stages=stages)


def _with_slurm_as_written(typed: dict[str, Any], written: dict[str, Any]) -> dict[str, Any]:
    """The file's keys, with sbatch's values as their text: 1.10 and 007 are no numbers to sbatch."""

    def text(value: Any, own: Any) -> Any:
        if isinstance(value, list):
            return [text(*pair) for pair in zip(value, own, strict=True)] if isinstance(own, list) else value
        return own if isinstance(value, float | int) and not isinstance(value, bool) else value

    def section(raw: Any, own: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("slurm"), dict):
            return raw
        beside = own.get("slurm") if isinstance(own, dict) else None
        beside = beside if isinstance(beside, dict) else {}  # a key that is a number has another text: 0x1
        return raw | {"slurm": {key: text(value, beside.get(str(key), value)) for key, value in raw["slurm"].items()}}

    whole: dict[str, Any] = section(typed, written)
    if isinstance(stages := whole.get("stages"), dict):
        whole["stages"] = {name: section(stage, written["stages"].get(str(name))) for name, stage in stages.items()}
    if isinstance(scales := whole.get("scales"), dict):
        own = written["scales"]
        whole["scales"] = {
            scale: {name: section(stage, own[str(scale)].get(str(name))) for name, stage in changes.items()}
            if isinstance(changes, dict) and str(scale) in own
            else changes
            for scale, changes in scales.items()
        }
    return whole
