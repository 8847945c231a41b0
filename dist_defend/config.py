"""One YAML file per experiment, ``key.sub=value`` overrides, strict, as frozen dataclasses.

PyYAML reads the file and dacite builds and type-checks the dataclasses; the walk for unknown keys is ours, because its
message (file, path, nearest key) is what saves a user an hour. See docs/decisions/0001-configuration.md.
"""

import dataclasses
import difflib
import hashlib
import importlib
import json
import pkgutil
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import dacite
import yaml

import dist_defend.methods
from dist_defend.data.loader import LoaderConfig
from dist_defend.engine.trainer import TrainerConfig
from dist_defend.errors import UserError


class _Yaml(yaml.SafeLoader):
    """Scalars as people mean them, close to YAML 1.2: 1e-3 is a number; 24:00:00, 0100 and 2026-01-31 stay text.

    YAML 1.1 reads these four as a string, a number to base 60, one to base 8 and a date.
    """


_OURS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_Yaml.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in _OURS]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$|0x[0-9a-fA-F]+$"), list("-+0123456789")
)
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)\.[0-9]*)([eE][-+]?[0-9]+)?$|[-+]?(0|[1-9][0-9]*)[eE][-+]?[0-9]+$"
        r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


class _Text(yaml.SafeLoader):
    """Every scalar as its text; anchors and merges as ever."""


_Text.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] == "tag:yaml.org,2002:merge"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@dataclass(frozen=True)
class Experiment:
    """What every experiment file holds beside the section named after its method."""

    method: str
    output: str
    seed: int = 100
    world_size: int | None = None  # refuse to start on any other number of ranks
    precision: Literal["fp64", "fp32", "bf16", "fp16"] = "fp32"
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    options: Any = None  # the method's own Config

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"key 'seed' is {self.seed}; it must not be negative")

    def resolved(self) -> dict[str, Any]:
        """The file that gives exactly this experiment, as plain containers."""
        plain = json.loads(json.dumps(dataclasses.asdict(self)))  # tuples become lists
        return {**{k: v for k, v in plain.items() if k != "options"}, self.method: plain["options"]}

    def digest(self) -> str:
        """sha256 of the resolved configuration."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()


def method_names() -> list[str]:
    """Modules of dist_defend.methods: the module's name is the registry."""
    names = {module.name for module in pkgutil.iter_modules(dist_defend.methods.__path__)}
    return sorted(names - set(dist_defend.methods.SHARED))


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read, override and check an experiment file. UserError (file, key, remedy) for anything that does not fit."""
    path = Path(path)
    raw = read_yaml(path)
    for text in overrides:
        _override(raw, text)
    name = raw.get("method")
    if name not in method_names():
        raise UserError(f"{path}: key 'method' is {name!r}; it must be one of {', '.join(method_names())}")
    module = importlib.import_module(f"dist_defend.methods.{name}")
    options_type, options_raw = module.Config, raw.pop(name, None)
    if options_raw is None:
        raise UserError(f"{path}: the section '{name}:' is missing; it holds the method's options")
    if isinstance(options_raw, dict) and "preset" in options_raw:
        options_raw = _with_preset(options_raw, getattr(module, "PRESETS", {}), path, name)
    options = build_section(options_type, options_raw, path, prefix=f"{name}.")
    experiment = build_section(Experiment, raw, path, extra=(name,))
    return dataclasses.replace(experiment, options=options)


def read_yaml(path: Path, as_written: bool = False) -> dict[str, Any]:
    """The keys of a YAML file, every scalar as its text if as_written. UserError if it cannot be read or has none."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Text if as_written else _Yaml)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"{path}: cannot read the configuration: {reason}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected 'key: value' lines, found {type(raw).__name__}")
    return raw


def _with_preset(raw: dict[str, Any], presets: dict[str, dict[str, Any]], path: Path, name: str) -> dict[str, Any]:
    """The section with a named set of options below its own keys; the resolved file names the options instead."""
    own = dict(raw)
    preset = own.pop("preset")
    if not isinstance(preset, str) or preset not in presets:
        known = ", ".join(presets) or "none: the method has no presets"
        raise UserError(f"{path}: key '{name}.preset' is {preset!r}; known: {known}")
    return _merged(presets[preset], own)


def _over_defaults(cls: Any, raw: dict[str, Any]) -> dict[str, Any]:
    """Sections with what they leave out as this dataclass, not only the section's own, has it."""
    full = dict(raw)
    for field_ in dataclasses.fields(cls):
        default = field_.default if field_.default_factory is dataclasses.MISSING else field_.default_factory()
        value = raw.get(field_.name)
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
        raise UserError(f"override {text!r}: write it as key.sub=value")
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(raw.setdefault(parent, {}), dict):
            raise UserError(f"override {text!r}: '{parent}' is not a section")
        raw = raw[parent]
    try:
        raw[last] = yaml.load(value, Loader=_Yaml)
    except yaml.YAMLError as error:
        raise UserError(f"override {text!r}: the value is not valid YAML") from error


def build_section(cls: Any, raw: Any, path: Path, prefix: str = "", extra: Sequence[str] = ()) -> Any:
    """The dataclass ``cls`` from a section. UserError (path, key below ``prefix``, remedy) if anything does not fit."""
    _check_keys(cls, raw, path, prefix, extra)
    hints = typing.get_type_hints(cls)
    for key, value in raw.items():
        raw[key] = _listed(hints[key], value, path, f"{prefix}{key}")  # in place: the section around it is built later
    raw = _over_defaults(cls, raw)
    for key, value in raw.items():  # inner sections first, so that an error names the innermost key
        if typing.get_origin(hints[key]) is tuple and not isinstance(value, list | tuple):
            raise UserError(f"{path}: key '{prefix}{key}' is {value!r}; expected a list")
        try:
            sections = _sections(hints[key], value)
        except ValueError as error:
            told = str(error).replace("key '", f"key '{prefix}{key}.", 1)
            raise UserError(f"{path}: {told}") from error
        for inner, item, place in sections:
            build_section(inner, item, path, f"{prefix}{key}{place}.")
    hooks: dict[Any, Any] = {float: _number, int: _integer}
    try:
        return dacite.from_dict(cls, raw, dacite.Config(cast=[tuple], type_hooks=hooks, check_types=True))
    except dacite.MissingValueError as error:
        raise UserError(f"{path}: key '{prefix}{error.field_path}' is missing; it has no default") from error
    except dacite.WrongTypeError as error:
        wanted = (
            str(getattr(error.field_type, "__name__", error.field_type))
            if isinstance(error.field_type, type)
            else (str(error.field_type).replace("typing.", "").replace("NoneType", "null").replace("None", "null"))
        )
        raise UserError(f"{path}: key '{prefix}{error.field_path}' is {error.value!r}; expected {wanted}") from error
    except ValueError as error:  # a dataclass' own check of its values
        told = str(error).replace("key '", f"key '{prefix}", 1)
        raise UserError(f"{path}: {told}") from error


def _listed(hint: Any, value: Any, path: Path, key: str) -> Any:
    """A scalar where a list is wanted: a list of one, or an error where the list has a length of its own."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is not tuple or not isinstance(value, str | int | float):
        return value
    if arguments[-1] is not Ellipsis:
        raise UserError(f"{path}: key '{key}' is {value!r}; expected a list of {len(arguments)} values")
    return [value]


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _integer(value: Any) -> Any:
    return str(value) if isinstance(value, bool) else value  # a bool is an int to Python, not to a reader


def _check_keys(cls: Any, raw: Any, path: Path, prefix: str, extra: Sequence[str] = ()) -> None:
    """Refuse keys that no field of the dataclass reads."""
    if not isinstance(raw, dict):
        raise UserError(f"{path}: key '{prefix.rstrip('.')}' is {raw!r}; expected a section with keys")
    names = [f.name for f in dataclasses.fields(cls) if f.name != "options"]
    for key in raw:
        if key not in names:
            near = difflib.get_close_matches(str(key), [*names, *extra], n=1, cutoff=0.4)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known: {', '.join(names)}"
            raise UserError(f"{path}: unknown key '{prefix}{key}'; {hint}")


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
    name = value.get("name")
    if name not in sections:
        near = difflib.get_close_matches(str(name), [str(known) for known in sections], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"key 'name' is {name!r}; {hint}it must be one of {', '.join(map(str, sections))}")
    return [sections[name]]


def dump(experiment: Experiment) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(experiment.resolved(), sort_keys=False, width=110)
