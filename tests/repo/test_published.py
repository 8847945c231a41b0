"""The values of papers and their code in presets, defaults and configs/ are those of tests/published.py."""

import fnmatch
import importlib
import json
import operator
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_defend.config import load_experiment
from tests.published import DEVIATIONS, OURS, PUBLISHED

CONFIGS = Path(__file__).parents[2] / "configs"
FOLDERS = ("attack", "defend", "measure", "pretrain")
ROWS = [(place, key, value, source) for source, places, values in PUBLISHED
        for place in places for key, value in values.items()]  # fmt: skip
PLACES = list(dict.fromkeys(place for place, *_ in ROWS))


@cache
def found(place: str) -> Any:
    """What is at a place, as plain JSON."""
    module, separator, name = place.partition(":")
    if separator and module.startswith("dist_defend."):
        return json.loads(json.dumps(operator.attrgetter(name)(importlib.import_module(module))))
    file, _, override = place.partition(" ")
    return json.loads(json.dumps(load_experiment(CONFIGS / f"{file}.yaml", [override] if override else []).resolved()))


def value_of(place: str, key: str) -> Any:
    own: Any = found(place)
    for part in key.split(".") if key else ():
        own = own[part]
    return own


@pytest.mark.parametrize("place", PLACES)
def test_published_values(place: str) -> None:
    wrong = []
    for where, key, value, source in ROWS:
        if where != place:
            continue
        own = value_of(place, key)
        if own != json.loads(json.dumps(value)):
            wrong.append(f"{key} is {own!r}, but {value!r} in {source}")
    assert wrong == []


def numbers(content: Any, path: str = "") -> Iterator[str]:
    """Dotted keys of all numbers, and of all lists of numbers."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from numbers(value, f"{path}.{key}" if path else str(key))
    elif isinstance(content, list) or is_number(content):
        yield path


def is_number(value: Any) -> bool:
    try:
        float(value)  # YAML reads 1e-3 as text; so does PyYAML, and the loader makes a number of it
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


@pytest.mark.parametrize(
    "file", sorted(str(p.relative_to(CONFIGS).with_suffix("")) for f in FOLDERS for p in (CONFIGS / f).glob("*.yaml"))
)
def test_every_number_of_a_config_is_published_or_said_to_be_ours(file: str) -> None:
    content = yaml.safe_load((CONFIGS / f"{file}.yaml").read_text())
    stated = {key for place, key, *_ in ROWS if place == file}
    stated |= {key for places, key, *_ in DEVIATIONS if file in places}
    ours = [pattern for files, patterns in OURS.items() if fnmatch.fnmatch(file, files) for pattern in patterns]
    untold = [
        key
        for key in numbers(content)
        if key not in stated and not any(key == own or fnmatch.fnmatch(key, f"*.{own}") or own == "*" for own in ours)
    ]
    assert untold == []


def test_no_entry_contradicts_another() -> None:
    seen: dict[tuple[str, str], Any] = {}
    for place, key, value, _ in ROWS:
        assert seen.setdefault((place, key), value) == value, (place, key)


@pytest.mark.parametrize(("places", "key", "published", "ours", "file", "line"), DEVIATIONS)
def test_what_we_do_otherwise_is_written_down(
    places: tuple[str, ...], key: str, published: Any, ours: Any, file: str, line: str
) -> None:
    assert [value_of(place, key) for place in places] == [ours] * len(places) and ours != published
    assert line in (CONFIGS.parent / file).read_text(encoding="utf-8")
