"""One YAML file per experiment, ``key.sub=value`` overrides, strict, as frozen dataclasses.

strict_yaml reads the file and dacite builds and type-checks the dataclasses; the walk for unknown keys is ours, because
its message (file, path, nearest key) is what saves a user an hour. See docs/decisions/0001-configuration.md.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import os
import re
import types
import typing
from collections.abc import Callable, Sequence
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
_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)
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
        plain = _plain(self)
        return {**{k: v for k, v in plain.items() if k != "options"}, self.method: plain["options"]}

    def digest(self) -> str:
        """sha256 of the resolved configuration."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Dataclasses as dicts, tuples as lists; without keys that are UNWRITTEN and null."""
    if dataclasses.is_dataclass(value):
        own = [(field_, getattr(value, field_.name)) for field_ in dataclasses.fields(value)]
        return {f.name: _plain(inner) for f, inner in own if inner is not None or "unwritten" not in f.metadata}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


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
        value = raw.get(field_.name)
        if not isinstance(value, dict):
            continue
        default = default_of(field_)
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
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
    try:
        parsed = parse_yaml(value, f"override {_shown(text)}")
    except UserError as error:
        raise UserError(str(error).replace("not valid YAML", "the value is not valid YAML", 1)) from error
    change(raw, key, parsed)


def change(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set ``key.sub`` of a file's content, which takes the value over. UserError where a part of it is no section."""
    *parents, last = key.split(".")
    section = raw
    for parent in parents:
        if not isinstance(section.setdefault(parent, {}), dict):
            raise UserError(f"override {_shown(f'{key}={value}')}: '{printable(parent, 80)}' is not a section")
        section = section[parent]
    section[last] = value


def build_section(cls: type[T], raw: Any, path: Path, prefix: str = "", extra: Sequence[str] = ()) -> T:
    """The dataclass ``cls`` from a section. UserError (path, key below ``prefix``, remedy) if anything does not fit."""
    _check_keys(cls, raw, path, prefix, extra)
    hints = _hints(cls)
    content = {key: _listed(hints[key], value, path, f"{prefix}{key}") for key, value in raw.items()}
    content = _over_defaults(cls, content)
    for key, value in content.items():  # inner sections first, so that an error names the innermost key
        if typing.get_origin(hints[key]) is tuple and not isinstance(value, list | tuple):
            raise UserError(f"{path}: key '{prefix}{key}' is {_shown(value)}; expected a list")
        try:
            content[key] = _with_sections(hints[key], value, path, f"{prefix}{key}")
        except ValueError as error:
            told = str(error).replace("key '", f"key '{prefix}{key}.", 1)
            raise UserError(f"{path}: {told}") from error
    hooks: dict[Any, Any] = {float: _number, int: _integer}
    try:
        return dacite.from_dict(cls, content, with_added(dacite.Config(cast=[tuple], type_hooks=hooks)))
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


@functools.cache
def _holds_sections(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) or any(map(_holds_sections, typing.get_args(hint)))


def _with_sections(hint: Any, value: Any, path: Path, place: str) -> Any:
    """A value of this type, with each section in it as its dataclass."""
    if not _holds_sections(hint):
        return value
    if dataclasses.is_dataclass(hint):
        return build_section(hint, value, path, f"{place}.")  # type: ignore[arg-type]
    arguments, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType) and value is not None:
        for inner in _members(arguments, value):
            value = _with_sections(inner, value, path, place)
    elif origin is tuple and isinstance(value, list):
        return [_with_sections(arguments[0], item, path, f"{place}[{i}]") for i, item in enumerate(value)]
    elif origin is dict and isinstance(value, dict):
        return {k: _with_sections(arguments[1], item, path, f"{place}.{k}") for k, item in value.items()}
    return value


def _members(arguments: Sequence[Any], value: Any) -> list[Any]:
    """The types of a union that a value can be; of several dataclasses, the one whose `name` the section names."""
    classes = [t for t in arguments if dataclasses.is_dataclass(t)]
    if len(classes) < 2 or not isinstance(value, dict):
        return [t for t in arguments if t is not type(None)]
    sections = {typing.get_args(_hints(t)["name"])[0]: t for t in classes}
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
