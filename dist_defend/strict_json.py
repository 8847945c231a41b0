"""JSON from files that others may have written: one meaning, or a UserError."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import dacite

from dist_defend.errors import UserError
from dist_defend.files import read_regular
from dist_defend.screen import printable

MOST_BYTES = 64 << 20
T = TypeVar("T")


def parse_json(text: str | bytes, where: str | Path, remedy: str, *, may_be_nan: bool = False) -> Any:
    """The value. UserError, ending in ``remedy``, for no JSON, a key that comes twice, NaN, or too deep nesting.

    may_be_nan: NaN, Infinity and numbers beyond all floats (1e999) are taken; otherwise they are refused.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(items)
        if len(content) != len(items):
            twice = next(name for name, count in Counter(name for name, _ in items).items() if count > 1)
            raise ValueError(f"key '{printable(twice, 80)}' comes twice")
        return content

    def constant(name: str) -> float:
        return float(name) if may_be_nan else _refuse(f"{name} is not a number of JSON")

    def finite(digits: str) -> float:
        number = float(digits)
        return number if may_be_nan or math.isfinite(number) else _refuse(f"{digits[:40]} is larger than any number")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_float=finite)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        told = "nested too deeply" if isinstance(error, RecursionError) else printable(str(error), 200)
        raise UserError(f"{where} cannot be read ({told}): {remedy}") from error


def read_json(path: str | Path, remedy: str, *, may_be_nan: bool = False, most_bytes: int = MOST_BYTES) -> Any:
    """``parse_json`` of a file. FileNotFoundError if it is missing; UserError if it is no regular file or too large."""
    try:
        data = read_regular(path, most_bytes)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}") from error
    return parse_json(data, path, remedy, may_be_nan=may_be_nan)


def build(kind: type[T], content: Any, where: str | Path, remedy: str) -> T:
    """A dataclass from parsed JSON, strictly: no unknown key, no missing one, no other type, no true for a 1.

    What the dataclass' own ``__post_init__`` refuses by ValueError (a range) is a UserError too.
    """
    try:
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not keys and values")
        config = dacite.Config(cast=[tuple], strict=True, type_hooks={int: _number, float: _number})
        built: T = dacite.from_dict(kind, content, config)
        if not _is_kept(built, content):
            raise ValueError("a text stands where a list belongs")
        return built
    except (dacite.DaciteError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where} is not what it should be ({printable(str(error), 200)}): {remedy}") from error


def _is_kept(built: Any, content: Any) -> bool:
    """Whether nothing changed its meaning on the way: a cast makes ("a", "b") of "ab"."""
    if dataclasses.is_dataclass(built):
        return isinstance(content, dict) and all(_is_kept(getattr(built, key), content[key]) for key in content)
    if isinstance(built, tuple):
        is_list = isinstance(content, list | tuple) and len(content) == len(built)
        return is_list and all(map(_is_kept, built, content))
    if isinstance(built, dict):
        return all(_is_kept(built[key], content[key]) for key in built)
    return built is content or bool(built == content)


def _number(value: Any) -> Any:
    return _refuse("true and false are no numbers") if isinstance(value, bool) else value


def _refuse(what: str) -> NoReturn:
    raise ValueError(what)
