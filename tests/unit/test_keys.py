"""What a listing says of a section: types and defaults in YAML's words, meanings from the class's docstring."""

import inspect
import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest

from dist_defend import keys
from dist_defend.attacks.added import BUILT_IN
from dist_defend.config import Experiment
from dist_defend.methods import find_method, method_names
from dist_defend.methods_command import description
from dist_defend.sweep.file import StageConfig, SweepConfig

sys.path.append(str(Path(__file__).parents[2] / "examples/plugin"))
from example_plugin.fine_tune import Config
from example_plugin.stripes import Stripes


@dataclass(frozen=True)
class Inner:
    """A part.

    Keys:
        lr: rate
    """

    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Base:
    """Of all.

    Keys:
        seed: where draws start
    """

    seed: int = 0


@dataclass(frozen=True)
class Outer(Base):
    """A whole. It has: a colon.

    More of it.

    Keys:
        row, column: of the upper left pixel; a line that goes on
            stands further in: as here
        kind: one of two
        part: a part
    """

    path: str = field(kw_only=True)
    row: int | None = None
    column: int | None = None
    kind: Literal["a", "b"] = "b"
    part: Inner = field(default_factory=lambda: Inner(lr=2.0))
    usual: Inner = field(default_factory=Inner)
    many: dict[str, Inner] = field(default_factory=dict)
    widths: tuple[int, ...] = (1, 2)
    either: Inner | Base | None = None
    flag: bool = True
    anything: dict[str, Any] = field(default_factory=dict)


def test_meanings_by_key() -> None:
    about, meanings = keys.split_doc(Outer)
    assert about == "A whole. It has: a colon.\n\nMore of it."
    place = "of the upper left pixel; a line that goes on stands further in: as here"
    told = {"row": place, "column": place, "kind": "one of two", "part": "a part", "seed": "where draws start"}
    assert meanings == told


def test_types_and_defaults_are_yamls() -> None:
    lines = keys.key_lines(Outer)
    assert lines[0::2] == [
        "  seed: int = 0",
        "  path: str = required",
        "  row: int | null = null",
        "  column: int | null = null",
        "  kind: a | b = b",
        "  part: section = {lr: 2.0}",
        "  usual: section = the section's own",
        "  many: section by name = {}",
        "  widths: list of int = [1, 2]",
        "  either: section | null = null",
        "  flag: bool = true",
        "  anything: section = {}",
    ]
    assert lines[9] == "      one of two" and lines[13] == "      (no meaning is given)"


def test_each_section_is_told_once_with_its_places() -> None:
    heads = [line for line in keys.section_lines(Outer) if line.startswith("section")]
    assert heads == ["section part, usual, many.NAME"]


@pytest.mark.parametrize("listed", ["rounds", "rounds - so many", "two words: x", "a: b\n    c"])
def test_a_line_that_is_no_entry(listed: str) -> None:
    odd = type("Odd", (), {"__doc__": f"X.\n\nKeys:\n    {listed}\n"})
    with pytest.raises(ValueError, match="is not 'key: meaning'"):
        keys.split_doc(odd)


def test_columns_end_in_time() -> None:
    lines = keys.table([("a", "b" * 30, "word " * 40), ("long", "c", "x")])
    assert max(map(len, lines)) <= 120 and lines[-1] == "long  c" + " " * 31 + "x"
    assert lines[1].startswith(" " * 38 + "word")


def described() -> list[type]:
    """Every dataclass that a section of YAML becomes, of any method, trigger and sweep."""
    roots: list[type] = [Experiment, SweepConfig, StageConfig, *BUILT_IN.values(), Config, Stripes]
    roots += [find_method(name).Config for name in method_names()]
    return list(dict.fromkeys(section for root in roots for section, _ in keys.sections(root)))


@pytest.mark.parametrize("section", described(), ids=lambda section: f"{section.__module__}.{section.__qualname__}")
def test_every_key_has_a_meaning_and_every_meaning_a_key(section: type) -> None:
    about, meanings = keys.split_doc(section)
    assert about and {field.name for field in fields(section)} == meanings.keys()
    assert all(len(meaning) > 3 and meaning != name.replace("_", " ") for name, meaning in meanings.items())
    assert section.__module__.partition(".")[0] in ("dist_defend", "example_plugin")


def test_no_comment_repeats_a_meaning_beside_its_field() -> None:
    """Comments beside fields would be a second place for the same words."""
    for section in described():
        source = inspect.getsource(section).partition("def ")[0]
        beside = [line for line in source.splitlines() if re.match(r"    \w+: .*#", line)]
        assert not beside, f"{section.__module__}: {beside[0].strip()}"


@pytest.mark.parametrize("name", method_names())
def test_a_methods_description_is_complete_and_fits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, most in ((300, 120), (40, 80)):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = description(name, "here 1.0")
        assert max(map(len, lines)) <= most
    text = "\n".join(lines)
    assert "(no meaning is given)" not in text
    for key in fields(find_method(name).Config):
        assert f"\n  {key.name}: " in text
    for preset in getattr(find_method(name), "PRESETS", {}):
        assert f"\n  {preset}: " in text
    assert re.search(r"et al\.|[A-Z]\w+ and [A-Z]\w+|\w+/\w+", text), "who published it"
