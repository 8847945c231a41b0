"""YAML that people write: one meaning, bounded size, or a UserError that names file, line and key.

PyYAML reads it. Refused here, because PyYAML lets it pass: keys that come twice, keys that are no text or number,
aliases that grow beyond any file, deep nesting, values that are no plain data, numbers that are not finite, control
characters inside of a text.
"""

import math
import re
import unicodedata
from pathlib import Path
from typing import Any

import yaml

from dist_defend.errors import UserError
from dist_defend.files import read_regular
from dist_defend.screen import printable

MOST_BYTES = 1 << 20
MOST_NODES = 250_000  # values of a file, with every alias counted as what it stands for
MOST_DEPTH = 40
_LETTERS = 32  # of a text that count as a value more
_MERGE = "tag:yaml.org,2002:merge"
_NO_TEXT = {"Cc", "Cs", "Zl", "Zp"}  # control characters, half of a pair, separators of lines


class _Refused(yaml.YAMLError):
    """What PyYAML lets pass and this module does not; says the line itself."""


class _Bounded(yaml.SafeLoader):
    """Composes no more than a configuration can hold, and no key twice."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.depth, self.count = 0, 0
        self.sizes: dict[int, int] = {}  # id of a finished node -> nodes that it stands for

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As PyYAML's; its nodes live as long as the tree, so that their ids tell them apart."""
        event: Any = yaml.SafeLoader.peek_event(self)
        if isinstance(event, yaml.AliasEvent) and event.anchor in self.anchors:
            named = self.anchors[event.anchor]
            if id(named) not in self.sizes:
                raise self._error(event.start_mark, f"*{event.anchor} stands inside of what it names")
            self._count(event.start_mark, self.sizes[id(named)])
            return super().compose_node(parent, index)
        before = self.count
        self._count(event.start_mark, 1 + len(getattr(event, "value", "")) // _LETTERS)
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise self._error(event.start_mark, f"nested deeper than {MOST_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        self.sizes[id(node)] = self.count - before
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
        return node

    def _count(self, mark: Any, nodes: int) -> None:
        self.count += nodes
        if self.count > MOST_NODES:
            raise self._error(mark, f"more than {MOST_NODES} values, aliases spelled out")

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen: set[Any] = set()
        for key, _ in node.value:
            is_merge = key.tag == _MERGE
            name = "<<" if is_merge else self.construct_object(key) if isinstance(key, yaml.ScalarNode) else None
            if not isinstance(name, str | int | float) or name != name:
                raise self._error(key.start_mark, "a key is neither text nor number")
            if name in seen:
                raise self._error(key.start_mark, f"key '{printable(name, 80)}' comes twice")
            seen.add(name)

    def _error(self, mark: Any, told: str) -> _Refused:
        return _Refused(f"line {mark.line + 1}: {told}")


class _Typed(_Bounded):
    """Scalars as people mean them, close to YAML 1.2: 1e-3 is a number; 24:00:00, 0100 and 2026-01-31 stay text.

    YAML 1.1 reads these four as a string, a number to base 60, one to base 8 and a date.
    """


_OURS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_Typed.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in _OURS]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBERS: tuple[tuple[str, re.Pattern[str], list[str]], ...] = (
    ("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9]*)$|0x[0-9a-fA-F]+$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)\.[0-9]*)([eE][-+]?[0-9]+)?$|[-+]?(0|[1-9][0-9]*)[eE][-+]?[0-9]+$"
            r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
        ),
        list("-+0123456789."),
    ),
)


class _Text(_Bounded):
    """Every scalar as its text; anchors and merges as ever."""


_Text.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] == _MERGE]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Quotes every text that one of the two ways of reading takes for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _NUMBERS:
    _Typed.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def read_yaml(path: Path, as_written: bool = False) -> dict[str, Any]:
    """The keys of a YAML file, every scalar as its text if as_written. UserError if it cannot be read or has none."""
    try:
        text = read_regular(path, MOST_BYTES).decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from error
    except ValueError as error:  # no UTF-8, or a path that no file can have
        raise UserError(f"{path}: cannot read the configuration: not a text file") from error
    raw = parse_yaml(text, str(path), as_written)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected 'key: value' lines, found {type(raw).__name__}")
    return raw


def parse_yaml(text: str, where: str, as_written: bool = False) -> Any:
    """Plain data: dicts, lists, texts, finite numbers, booleans, None; nothing is shared. UserError (where, line)."""
    try:
        tree = yaml.load(text, Loader=_Text if as_written else _Typed)
    except _Refused as error:
        raise UserError(f"{where}: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {printable(' '.join(str(error).split()), 300)}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # `!!int x` and others
        raise UserError(f"{where}: not valid YAML: a value is not of the kind that its tag says") from error
    return _plain(tree, where, ())


def dump_yaml(content: Any) -> str:
    """Plain data as YAML that parse_yaml reads as the same."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=False)


def _plain(value: Any, where: str, place: tuple[Any, ...]) -> Any:
    """A copy in which no two places share a value: a change of one by an override leaves the other alone."""
    if isinstance(value, dict):
        return {_checked(key, where, place): _plain(item, where, (*place, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, where, (*place, number)) for number, item in enumerate(value)]
    return _checked(value, where, place)


def _checked(value: Any, where: str, place: tuple[Any, ...]) -> Any:
    wrong = None
    if isinstance(value, float) and not math.isfinite(value):
        wrong = f"is {value}; it must be a finite number"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        wrong = "is larger than any number that is meant here"
    elif isinstance(value, str) and any(unicodedata.category(c) in _NO_TEXT and c not in "\t\n\r" for c in value):
        wrong = f"holds a control character: take it out of {printable(repr(value), 80)}"
    elif not isinstance(value, str | int | float | None):
        wrong = f"is a {type(value).__name__}; expected text, a number, true or false, a list or keys"
    if wrong is None:
        return value
    name = printable(".".join(map(str, place)), 200)
    raise UserError(f"{where}: key '{name}' {wrong}" if place else f"{where}: the value {wrong}")
