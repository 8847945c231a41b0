"""A shell's completion by argcomplete: commands, options, experiment files and the keys in them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_defend.arguments import yaml_files


def completed(line: str, folder: Path) -> set[str]:
    """What the shell offers at the end of the line, typed in that folder."""
    pytest.importorskip("argcomplete", reason="the extra 'complete'; `make setup` installs it")
    file = folder / "answer"
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(file),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    code = "import sys; sys.argv[0] = 'dist-defend'; from dist_defend.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=os.environ | asked | {"PYTHONPATH": path}, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {word.strip() for word in file.read_text().split("\n")}


def test_commands_and_options(tmp_path: Path) -> None:
    assert completed("dist-defend ru", tmp_path) == {"run", "runs"}
    assert completed("dist-defend run --d", tmp_path) == {"--dry-run"}
    assert completed("dist-defend --debug runs --h", tmp_path) == {"--help"}


def test_files_and_the_keys_in_them(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "a.yaml").write_text("method: ibau\nibau: {rounds: 3, outer: {lr: 1}}\n")
    (tmp_path / "configs" / "a.txt").write_text("")
    assert completed("dist-defend run con", tmp_path) == {"configs/"}
    assert completed("dist-defend run configs/a", tmp_path) == {"configs/a.yaml"}
    assert completed("dist-defend run configs/a.yaml ibau.", tmp_path) == {"ibau.rounds=", "ibau.outer.lr="}


def test_a_broken_file_offers_no_keys(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: [")
    assert completed("dist-defend run a.yaml met", tmp_path) == {""}


def test_names_of_methods(tmp_path: Path) -> None:
    assert completed("dist-defend methods iba", tmp_path) == {"ibau"}


def test_folders_and_hidden_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (".hidden.yaml", "b.yaml", "c.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "d").mkdir()
    assert yaml_files("") == ["b.yaml", "d/"] and yaml_files(".h") == [".hidden.yaml"]
    assert yaml_files(f"{tmp_path}/b") == [f"{tmp_path}/b.yaml"] and yaml_files("none/x") == []
