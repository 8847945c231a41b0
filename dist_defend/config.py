"""One YAML file per experiment, ``key.sub=value`` overrides, strict, as frozen dataclasses.

strict_yaml reads the file and dacite builds and type-checks the dataclasses; the walk for unknown keys is ours, because
its message (file, path, nearest key) is what saves a user an hour. See docs/decisions/0001-configuration.md.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import dacite

from dist_defend import plugins
from dist_defend.attacks.added import find_options, with_added
from dist_defend.attacks.trigger import TriggerOptions
from dist_defend.bounds import at_least_one, not_negative
from dist_defend.data.loader import LoaderConfig
from dist_defend.engine.trainer import TrainerConfig
from dist_defend.errors import UserError, did_you_mean
from dist_defend.keys import default_of
from dist_defend.methods import find_method, method_names
from dist_defend.screen import printable
from dist_defend.strict_yaml import dump_yaml, parse_yaml, read_yaml

_RENAMED = {"poison": "attack", "trigger": "attack.trigger"}  # keys of earlier versions
T = TypeVar("T")
_LONGEST_NAME = 200  # bytes of a folder's name; file systems have 255, and temporary names are longer


@dataclass(frozen=True)
class Experiment:
    """What every experiment file holds beside the section named after its method.

    Keys:
        method: name of a method (`dist-defend methods`); the section of that name holds its keys
        output: folder of the run; the same command goes on from the checkpoint that is there
        seed: of all random draws
        world_size: number of ranks without which the run refuses to start; null: any
        precision: of weights and arithmetic: fp64, fp32, or mixed with bf16 or fp16
        trainer: logging and checkpoints
        loader: who makes the batches
        options: the section of the method
    """

    method: str
    output: str
    seed: int = 100
    world_size: int | None = None
    precision: Literal["fp64", "fp32", "bf16", "fp16"] = "fp32"
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    options: Any = None

    def __post_init__(self) -> None:
        not_negative(self, "seed")
        at_least_one(self, "world_size")
        check_folder("output", self.output)

    def resolved(self) -> dict[str, Any]:
        """The file that gives exactly this experiment, as plain containers."""
        plain = json.loads(json.dumps(dataclasses.asdict(self)))  # tuples become lists
        return {**{k: v for k, v in plain.items() if k != "options"}, self.method: plain["options"]}

    def digest(self) -> str:
        """sha256 of the resolved configuration."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()


def check_folder(key: str, value: str) -> None:
    """ValueError unless the value names a folder of its own: not nothing, not ``.``, ``..`` or ``/``."""
    parts = [part for part in Path(os.path.normpath(value)).parts if part not in (".", "..", os.sep, "//")]
    if not value.strip() or not parts:
        raise ValueError(f"key '{key}' is {value!r}; it must name a folder of its own, such as runs/name")
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in parts):
        raise ValueError(f"key '{key}' is {_shown(value)}; a name in it is longer than {_LONGEST_NAME} bytes")


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read, override and check an experiment file. UserError (file, key, remedy) for anything that does not fit."""
    path = Path(path)
    raw = read_yaml(path)
    for text in overrides:
        _override(raw, text)
    return build_experiment(raw, path)


def build_experiment(raw: dict[str, Any], path: Path) -> Experiment:
    """The experiment that a file's content describes. UserError as load_experiment's; path: what it names the file."""
    plugins.allow(raw)
    name = raw.get("method")
    if name not in method_names():
        raise UserError(f"{path}: key 'method' is {_shown(name)}; it must be one of {', '.join(method_names())}")
    module = find_method(name)
    options_type, options_raw = module.Config, raw.pop(name, None)
    if options_raw is None:
        raise UserError(f"{path}: the section '{name}:' is missing; it holds the method's options")
    if isinstance(options_raw, dict) and "preset" in options_raw:
        options_raw = _with_preset(options_raw, getattr(module, "PRESETS", {}), path, name)
    options = build_section(options_type, options_raw, path, prefix=f"{name}.")
    experiment = build_section(Experiment, raw, path, extra=(name,))
    return dataclasses.replace(experiment, options=options)


def _with_preset(raw: dict[str, Any], presets: dict[str, dict[str, Any]], path: Path, name: str) -> dict[str, Any]:
    """The section with a named set of options below its own keys; the resolved file names the options instead."""
    own = dict(raw)
    preset = own.pop("preset")
    if not isinstance(preset, str) or preset not in presets:
        known = ", ".join(presets) or "none: the method has no presets"
        raise UserError(f"{path}: key '{name}.preset' is {_shown(preset)}; known: {known}")
    return _merged(presets[preset], own)


def _over_defaults(cls: Any, raw: dict[str, Any]) -> dict[str, Any]:
    """Sections with what they leave out as this dataclass, not only the section's own, has it."""
    full = dict(raw)
    for field_ in dataclasses.fields(cls):
        default, value = default_of(field_), raw.get(field_.name)
        if isinstance(value, dict) and dataclasses.is_dataclass(default) and not isinstance(default, type):
            full[field_.name] = _merged(dataclasses.asdict(default), value)
    return full


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Key by key; a section with another ``name`` (an optimizer, a trigger) starts afresh."""
    if above.get("name", below.get("name")) != below.get("name"):
        return above
    both = {k: _merged(below[k], v) for k, v in above.items() if isinstance(v, dict) and isinstance(below.get(k), dict)}
    return {**below, **above, **both}


def _override(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"override {_shown(text)}: write it as key.sub=value")
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(raw.setdefault(parent, {}), dict):
            raise UserError(f"override {_shown(text)}: '{printable(parent, 80)}' is not a section")
        raw = raw[parent]
    try:
        raw[last] = parse_yaml(value, f"override {_shown(text)}")
    except UserError as error:
        raise UserError(str(error).replace("not valid YAML", "the value is not valid YAML", 1)) from error


def build_section(cls: type[T], raw: Any, path: Path, prefix: str = "", extra: Sequence[str] = ()) -> T:
    """The dataclass ``cls`` from a section. UserError (path, key below ``prefix``, remedy) if anything does not fit."""
    _check_keys(cls, raw, path, prefix, extra)
    hints = typing.get_type_hints(cls)
    for key, value in raw.items():
        raw[key] = _listed(hints[key], value, path, f"{prefix}{key}")  # in place: the section around it is built later
    raw = _over_defaults(cls, raw)
    for key, value in raw.items():  # inner sections first, so that an error names the innermost key
        if typing.get_origin(hints[key]) is tuple and not isinstance(value, list | tuple):
            raise UserError(f"{path}: key '{prefix}{key}' is {_shown(value)}; expected a list")
        try:
            sections = _sections(hints[key], value)
        except ValueError as error:
            told = str(error).replace("key '", f"key '{prefix}{key}.", 1)
            raise UserError(f"{path}: {told}") from error
        for inner, item, place in sections:
            build_section(inner, item, path, f"{prefix}{key}{place}.")
    hooks: dict[Any, Any] = {float: _number, int: _integer}
    try:
        return dacite.from_dict(cls, raw, with_added(dacite.Config(cast=[tuple], type_hooks=hooks)))
    except dacite.MissingValueError as error:
        raise UserError(f"{path}: key '{prefix}{error.field_path}' is missing; it has no default") from error
    except dacite.WrongTypeError as error:
        kind, told = error.field_type, f"key '{prefix}{error.field_path}' is {_shown(error.value)}"
        wanted = kind.__name__ if isinstance(kind, type) else re.sub("None(Type)?", "null", f"{kind}")
        raise UserError(f"{path}: {told}; expected {wanted.replace('typing.', '')}") from error
    except (ValueError, dacite.DaciteError) as error:  # a dataclass' own check of its values
        told = str(error).replace("key '", f"key '{prefix}", 1)
        raise UserError(f"{path}: {told}") from error


def _shown(value: Any) -> str:
    """What stands in a file, for a message."""
    return printable(repr(value), 100)


def _listed(hint: Any, value: Any, path: Path, key: str) -> Any:
    """A scalar where a list is wanted: a list of one, or an error where the list has a length of its own."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is not tuple or not isinstance(value, str | int | float):
        return value
    if arguments[-1] is not Ellipsis:
        raise UserError(f"{path}: key '{key}' is {_shown(value)}; expected a list of {len(arguments)} values")
    return [value]


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else _integer(value)


def _integer(value: Any) -> Any:
    return str(value) if isinstance(value, bool) else value  # a bool is an int to Python, not to a reader


def _check_keys(cls: Any, raw: Any, path: Path, prefix: str, extra: Sequence[str] = ()) -> None:
    """Refuse keys that no field of the dataclass reads."""
    if not isinstance(raw, dict):
        raise UserError(f"{path}: key '{prefix.rstrip('.')}' is {_shown(raw)}; expected a section with keys")
    names = [f.name for f in dataclasses.fields(cls) if f.name != "options"]
    for key in raw:
        if key not in names:
            told = printable(key, 100)
            if _RENAMED.get(key, "").split(".")[0] in names:
                told, now = prefix + told, prefix + _RENAMED[key]
                raise UserError(f"{path}: key '{told}' is called '{now}' now: write that, with 'name' in each trigger")
            near = difflib.get_close_matches(told, [*names, *extra], n=1, cutoff=0.4)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known: {', '.join(names)}"
            raise UserError(f"{path}: unknown key '{prefix}{told}'; {hint}")


def _sections(hint: Any, value: Any) -> list[tuple[Any, Any, str]]:
    """(dataclass, raw section, place) for every section below a value of this type."""
    if dataclasses.is_dataclass(hint):
        return [(hint, value, "")]
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and value is not None:
        return [s for inner in _members(arguments, value) for s in _sections(inner, value)]
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return [(c, v, f"[{i}]") for i, item in enumerate(value) for c, v, _ in _sections(arguments[0], item)]
    if typing.get_origin(hint) is dict and isinstance(value, dict):
        return [(c, v, f".{k}") for k, item in value.items() for c, v, _ in _sections(arguments[1], item)]
    return []


def _members(arguments: Sequence[Any], value: Any) -> list[Any]:
    """The types of a union that a value can be; of several dataclasses, the one whose `name` the section names."""
    classes = [t for t in arguments if dataclasses.is_dataclass(t)]
    if len(classes) < 2 or not isinstance(value, dict):
        return [t for t in arguments if t is not type(None)]
    sections = {typing.get_args(typing.get_type_hints(t)["name"])[0]: t for t in classes}
    name, known = value.get("name"), [str(known) for known in sections]
    if TriggerOptions in arguments:
        known += plugins.names("triggers")
        added = find_options(name) if isinstance(name, str) else None
        if added is not None:
            return [added]
    if not isinstance(name, str) or name not in sections:
        hint = did_you_mean(printable(name, 100), known)
        raise ValueError(f"key 'name' is {_shown(name)}; {hint}it must be one of {', '.join(known)}")
    return [sections[name]]


def dump(experiment: Experiment) -> str:
    """The resolved configuration as YAML."""
    return dump_yaml(experiment.resolved())
