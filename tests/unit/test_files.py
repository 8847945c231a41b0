"""Files that are whole, are files, and mean one thing."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dist_defend.errors import UserError
from dist_defend.files import open_regular, read_regular, recover_folder, replace_folder
from dist_defend.screen import printable
from dist_defend.strict_json import build, parse_json, read_json


def test_a_pipe_or_a_device_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match="not a regular file"):
            open_regular(path)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")


def test_a_file_has_a_largest_size(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_regular(tmp_path / "a", 5) == b"12345"
    with pytest.raises(UserError, match="larger than"):
        read_regular(tmp_path / "a", 4)


class Killed(Exception):
    pass


@pytest.mark.parametrize("instant", range(5))
def test_replacing_a_folder_loses_nothing_at_any_instant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instant: int
) -> None:
    """Killed before its first, second, ... change of names, or after all: the folder is the old one or the new one."""
    final, aside = tmp_path / "final", tmp_path / "aside"
    for folder, text in ((final, "old"), (aside, "new")):
        folder.mkdir()
        (folder / "a").write_text(text)
    left = [instant]

    def until(real: object) -> object:
        def call(*args: object, **options: object) -> object:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real(*args, **options)  # type: ignore[operator]

        return call

    monkeypatch.setattr(Path, "rename", until(Path.rename))
    monkeypatch.setattr("shutil.rmtree", until(__import__("shutil").rmtree))
    monkeypatch.setattr("dist_defend.files.fsync_path", until(lambda path: None))
    with contextlib.suppress(Killed):
        replace_folder(aside, final)
    monkeypatch.undo()
    recover_folder(final)
    assert (final / "a").read_text() in (("old",) if instant < 2 else ("new",))
    assert sorted(p.name for p in tmp_path.iterdir()) == (["aside", "final"] if instant < 2 else ["final"])


def test_json_has_one_meaning(tmp_path: Path) -> None:
    assert parse_json('{"a": [1, null]}', "f", "restore it") == {"a": [1, None]}
    for text, told in (
        ('{"a": 1, "b": 2, "a": 3}', "key 'a' comes twice"),
        ('{"a": NaN}', "NaN is not a number of JSON"),
        ('{"a": -Infinity}', "-Infinity"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "cannot be read"),
        ("1" * 5000, "cannot be read"),
        (b"\xff", "cannot be read"),
        ('{"\\u001b[2J": 1, "\\u001b[2J": 1}', r"\\x1b\[2J"),
    ):
        with pytest.raises(UserError, match=told) as caught:
            parse_json(text, "f", "restore it")
        assert str(caught.value).startswith("f ") and str(caught.value).endswith(": restore it")
        assert str(caught.value).isprintable()
    assert str(parse_json("NaN", "f", "", may_be_nan=True)) == "nan"
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none", "restore it")
    with pytest.raises(UserError, match="restore it"):
        read_json(tmp_path, "restore it")


@dataclass(frozen=True)
class Part:
    count: int
    share: float
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count is {self.count}")


def test_a_schema_is_strict() -> None:
    assert build(Part, {"count": 1, "share": 1, "names": ["a"]}, "f", "") == Part(1, 1, ("a",))
    contents: list[Any] = [
        {"count": True, "share": 0.5},
        {"count": 1.0, "share": 0.5},
        {"count": -1, "share": 0.5},
        {"count": 1, "share": "0.5"},
        {"count": 1},
        {"count": 1, "share": 0.5, "other": 0},
        {"count": 1, "share": 0.5, "names": "a"},
        [],
        None,
    ]
    for content in contents:
        with pytest.raises(UserError, match="f is not what it should be"):
            build(Part, content, "f", "restore it")


def test_what_does_not_print_is_escaped() -> None:
    assert printable("Größe 犬 ok") == "Größe 犬 ok"
    assert printable("a\x1b[2J\n\u202e\u2028\udc80\x9b") == "a\\x1b[2J\\n\\u202e\\u2028\\udc80\\x9b"
    assert printable("a\nb\r", keep="\n") == "a\nb\\r"
    assert printable("abcdef", 3) == "abc..."
