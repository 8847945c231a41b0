"""The keys of a section of YAML, as its dataclass has them: type, default, meaning; as lines of text.

Meanings stand in the class's docstring, below a line ``Keys:``, one key or several in a line::

    Keys:
        rounds: so many
        row, column: of the upper left pixel; a line that goes on
            stands further in
"""

import dataclasses
import inspect
import json
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

UNWRITTEN = {"unwritten": True}  # metadata of a key that came late: null is left out, so digests stay what they were
_ENTRY = re.compile(r"(\w+(?:, \w+)*): (.+)")
_HEAD = "Keys:"


def split_doc(cls: type) -> tuple[str, dict[str, str]]:
    """A class's docstring without the part on its keys, and the meanings by key, its base classes' too."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__[1:-1]):
        meanings |= split_doc(base)[1]
    about, _, listed = inspect.cleandoc(cls.__doc__ or "").partition(f"{_HEAD}\n")
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(listed).rstrip()) if listed else ():
        found = _ENTRY.fullmatch(" ".join(entry.split()))
        if found is None:
            raise ValueError(f"{cls.__qualname__}: {entry!r} below '{_HEAD}' is not 'key: meaning'")
        meanings |= dict.fromkeys(found[1].split(", "), found[2])
    return about.strip(), meanings


def sections(cls: type, at: str = "") -> Iterator[tuple[type, str]]:
    """(dataclass, path of keys) of a dataclass and all sections below it; unions of several are left out."""
    yield cls, at
    for name, hint in typing.get_type_hints(cls).items():
        inner = _dataclasses_in(hint)
        if len(inner) == 1:
            inside = f"{at}{name}." if typing.get_origin(hint) is not dict else f"{at}{name}.NAME."
            yield from sections(inner[0], inside)


def _dataclasses_in(hint: Any) -> list[type]:
    if dataclasses.is_dataclass(hint):
        return [typing.cast(type, hint)]
    return [found for inner in typing.get_args(hint) for found in _dataclasses_in(inner)]


def told_type(hint: Any) -> str:
    """A type as one says it of YAML."""
    inner, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin is typing.Literal:
        return " | ".join(map(str, inner))
    if origin in (typing.Union, types.UnionType):
        members = dict.fromkeys("null" if one is type(None) else told_type(one) for one in inner)
        return " | ".join(members)
    if origin is tuple:
        return (
            f"list of {told_type(inner[0])}" if inner[-1] is Ellipsis else f"list of {len(inner)} {told_type(inner[0])}"
        )
    if origin is dict:
        return f"{told_type(inner[1])} by name" if inner[1] is not Any else "section"
    if dataclasses.is_dataclass(hint):
        return "section"
    return "section" if hint.__module__ != "builtins" else hint.__name__


def default_of(field: "dataclasses.Field[Any]") -> Any:
    """A field's default, made anew where a function makes it; MISSING where it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def told_default(field: "dataclasses.Field[Any]") -> str:
    """A default in YAML, of a section what differs from the section's own defaults; "required" where there is none."""
    default = default_of(field)
    if default is dataclasses.MISSING:
        return "required"
    plain = _plain(default)
    return "the section's own" if dataclasses.is_dataclass(default) and not plain else in_yaml(plain)


def in_yaml(value: Any) -> str:
    """A value as one writes it on one line of YAML."""
    plain = json.loads(json.dumps(value))  # tuples become lists
    import yaml  # not above: `methods` and `attacks` list without it

    return yaml.safe_dump([plain], default_flow_style=True, sort_keys=False, width=10**6).strip()[1:-1]


def _plain(value: Any) -> Any:
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    own = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return {field.name: _plain(one) for field, one in own if one != default_of(field)}


def width() -> int:
    """Columns to write in: the terminal's, 80 to 120; 100 in a pipe."""
    return min(max(shutil.get_terminal_size((100, 24)).columns, 80), 120)


def key_lines(cls: type) -> list[str]:
    """Of each key a line with type and default, and below it what it means."""
    meanings, hints, lines = split_doc(cls)[1], typing.get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        if field.name == "options":  # an experiment's, whose section has the method's name
            continue
        lines += wrapped(f"{field.name}: {told_type(hints[field.name])} = {told_default(field)}", "  ", "      ")
        lines += wrapped(meanings.get(field.name, "(no meaning is given)"), "      ", "      ")
    return lines


def section_lines(cls: type) -> list[str]:
    """A dataclass's keys and, each once, those of all sections below it, with the places where they stand."""
    places: dict[type, list[str]] = {}
    for section, at in sections(cls):
        places.setdefault(section, []).append(at.rstrip("."))
    lines = key_lines(cls)
    for section, where in list(places.items())[1:]:
        lines += ["", *wrapped(f"section {', '.join(where)}", "", "  ")]
        lines += [*paragraphs(split_doc(section)[0], "  "), *key_lines(section)]
    return lines


def paragraphs(text: str, indent: str = "") -> list[str]:
    """A docstring's paragraphs, wrapped anew."""
    blocks = [block for block in re.split(r"\n\s*\n", text) if block.strip()]
    return [line for block in blocks for line in wrapped(" ".join(block.split()), indent, indent)]


def wrapped(text: str, first: str, other: str) -> list[str]:
    """Lines of the width, indented."""
    return textwrap.wrap(text, width(), initial_indent=first, subsequent_indent=other, break_on_hyphens=False)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of text; the last one is wrapped."""
    wide = [max(len(row[column]) for row in rows) + 2 for column in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        head = "".join(cell.ljust(size) for cell, size in zip(row[:-1], wide, strict=True))
        lines += wrapped(row[-1], head, " " * min(len(head), 40)) or [head.rstrip()]
    return lines
