"""The shape of the repository: sizes, names, what documents promise, what no file may mention."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from mypy.config_parser import parse_config_file
from mypy.options import Options

from dist_defend.cli import main

ROOT = Path(__file__).parents[2]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
FILES = [ROOT / name for name in TRACKED if name and (ROOT / name).is_file()]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
DOCUMENTS = [file for file in FILES if file.suffix == ".md"]


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_no_python_file_is_long() -> None:
    lengths = {relative(file): len(file.read_text().splitlines()) for file in FILES if file.suffix == ".py"}
    assert {name: length for name, length in lengths.items() if length > 420} == {}


def test_no_drawer_for_odds_and_ends() -> None:
    assert [relative(file) for file in FILES if file.name in ("utils.py", "helpers.py", "misc.py", "common.py")] == []


def test_no_file_names_a_machine_or_a_registry() -> None:
    # Spelled in halves, so that this file does not find itself.
    halves = [("/ro", "ot/"), (r"(?<![\w.])/wo", "rk/"), (r"\.\./sha", "red"), (r"\bpypi\.", "org"),
              (r"download\.pytorch\.", "org"), (r"deb\.debian\.", "org"), (r"pythonhosted\.", "org")]  # fmt: skip
    pattern = re.compile("|".join(first + second for first, second in halves))
    found = []
    for file in FILES:
        text = file.read_bytes().decode(errors="ignore")
        found += [f"{relative(file)}: {match.group()}" for match in pattern.finditer(text)]
    assert found == []


def test_types_are_strict_in_every_file() -> None:
    options, strict = Options(), []
    parse_config_file(options, lambda: strict.append(True), str(ROOT / "pyproject.toml"))
    assert strict and {"dist_defend", "examples/plugin", "tests", "launch", "setup.py"} == set(options.files or ())
    assert options.enable_error_code == ["ignore-without-code"] and not options.disable_error_code
    for pattern, changes in options.per_module_options.items():  # libraries may lack types, we may not
        assert [key for key, value in changes.items() if value != []] == ["ignore_missing_imports"]
        assert not pattern.startswith(("dist_defend", "tests"))
    comment = re.compile(r"^\s*# my" "py:", re.MULTILINE)
    assert [relative(file) for file in FILES if file.suffix == ".py" and comment.search(file.read_text())] == []


@pytest.mark.parametrize("config", CONFIGS, ids=relative)
def test_config_opens_with_its_command(config: Path) -> None:
    lines = config.read_text().splitlines()
    header = "\n".join(line for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    assert relative(config) in header, "the comment at the top shows the command that runs this file"
    assert len(lines) <= 40


def test_there_are_configs() -> None:
    assert CONFIGS


def test_documents_name_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"setup", "test", "demo", "lint", "clean"} <= targets
    named = {name for file in DOCUMENTS for name in re.findall(r"(?:`|^    |&& )make ([a-z]+)", file.read_text(), re.M)}
    assert named and named <= targets


def test_documents_name_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    pattern = re.compile(r"(?:`|^    |bin/|&& )dist-defend ([a-z]+)", re.MULTILINE)
    commands = {name for file in DOCUMENTS for name in pattern.findall(file.read_text())}
    assert commands
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0, f"dist-defend {command}: {capsys.readouterr().err}"


def test_license_is_apache() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


@pytest.mark.parametrize("script", ["launch/bootstrap", "launch/demo", ".ci/run"])
def test_scripts_are_executable_bash(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_bootstrap_says_which_python_it_needs() -> None:
    environment = {**os.environ, "PYTHON": "/nonexistent/python3.11"}
    done = subprocess.run([ROOT / "launch/bootstrap"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no Python 3.10, 3.11, 3.12 or 3.13 at PYTHON=/nonexistent/python3.11" in done.stderr
