"""Each Python that the package is for: its files compile there without a warning, and what needs no package runs.

A version that does not start on this machine is skipped, and its skip says so.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dist_defend import doctor
from tests import interpreters

ROOT = Path(__file__).parents[2]
COMPILE = """
import sys
from pathlib import Path
for name in sys.stdin.read().splitlines():
    compile(Path(name).read_bytes(), name, "exec", dont_inherit=True)
    print(name)
"""


@pytest.fixture(params=interpreters.MINORS, ids="3.{}".format)
def minor(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


@pytest.fixture
def python(minor: int) -> str:
    found = interpreters.interpreter(minor)
    if found is None:
        pytest.skip(
            f"PYTHON 3.{minor} DOES NOT START HERE, so nothing was tried with it: neither PATH nor pyenv nor uv has it"
        )
    return found


def bare(python: str, *arguments: str, text: str = "") -> "subprocess.CompletedProcess[str]":
    """Run it with warnings as errors, without any installed package, in the repository's root."""
    dropped = ("PYTHON", "DIST_DEFEND", "PYTEST_", "COV_", "VIRTUAL_ENV", "COLUMNS")
    own = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return subprocess.run(
        [python, "-S", "-B", "-W", "error", *arguments],
        cwd=ROOT, env=own, input=text, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_running_one_is_among_them() -> None:
    assert sys.version_info[:2] in [(3, minor) for minor in interpreters.MINORS]
    told = subprocess.run(
        [sys.executable, "-m", "tests.interpreters"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"3.{sys.version_info[1]} starts" in told.stdout


def test_pyenv_is_asked_for_a_version_that_its_script_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minor = next(number for number in interpreters.MINORS if number != sys.version_info[1])
    scripts = {
        f"python3.{minor}": f'[ "$PYENV_VERSION" = 3.{minor}.7 ] || exit 127\necho "{minor} {tmp_path}/real"',
        "pyenv": f"printf '2.7.18\\n3.{minor}.7\\n'",
    }
    for name, body in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("PYENV_VERSION", raising=False)
    found = interpreters.interpreter.__wrapped__(minor)
    assert found == f"{tmp_path}/real"
    (tmp_path / f"python3.{minor}").write_text("#!/bin/sh\nexit 127\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert interpreters.interpreter.__wrapped__(minor) is None


def test_every_file_compiles_without_a_warning(python: str) -> None:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [name for name in listed.splitlines() if (ROOT / name).is_file()]
    assert {"setup.py", "dist_defend/cli.py", "launch/torchvision_hook.py", "tests/runs.py"} <= set(names)
    done = bare(python, "-c", COMPILE, text="\n".join(names))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == names


def test_help_version_lists_and_init_need_no_package(python: str, minor: int, tmp_path: Path) -> None:
    assert bare(python, "-c", "import torch").returncode == 1, "the environment is not bare"
    version = bare(python, "-c", "import sys; print(sys.version_info[1])")
    assert version.stdout.split() == [str(minor)]

    def told(*arguments: str) -> str:
        done = bare(python, "-m", "dist_defend", *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    helped = told("--help")
    assert all(f"    {command} " in helped for command in ("init", "data", "run", "launch", "report", "doctor"))
    wanted = re.search(r'^__version__ = "(.+)"$', (ROOT / "dist_defend/__init__.py").read_text(), re.MULTILINE)
    assert wanted is not None and told("--version") == wanted[1] + "\n"
    listed = told("methods")
    assert all(
        re.search(rf"^ *{name}\b", listed, re.MULTILINE) for name in ("simclr", "badencoder", "mimic", "ibau", "rnp")
    )
    told("init", str(tmp_path / "new"))
    copied = tmp_path / "new/configs/start/poison.yaml"
    assert copied.read_bytes() == (ROOT / "configs/start/poison.yaml").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", ["3.10", "3.13"])
def test_types_hold_in_the_oldest_and_the_newest(version: str) -> None:
    # The numpy and pandas that Python 3.10 gets are older than those installed here, whose types it cannot read.
    older = ["--no-warn-return-any"] if version == "3.10" else []
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-version", version, *older],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_doctor_takes_these_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for number in range(interpreters.MINORS[0] - 1, interpreters.MINORS[-1] + 2):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "version_info", (3, number, 0))
            found[number] = doctor._python().status
    assert found == {number: "ok" if number in interpreters.MINORS else "broken" for number in found}


def test_what_says_which_pythons_agrees() -> None:
    oldest, newest = (f"3.{number}" for number in (interpreters.MINORS[0], interpreters.MINORS[-1]))
    assert f'python_requires=">={oldest}"' in (ROOT / "setup.py").read_text()
    assert f"range({interpreters.MINORS[0]}, {interpreters.MINORS[-1] + 1})" in (ROOT / "setup.py").read_text()
    for name in ("README.md", "CONTRIBUTING.md"):
        assert re.search(rf"Python {oldest}(-| to ){newest}\b", (ROOT / name).read_text()), name
    first, last = interpreters.MINORS[0], interpreters.MINORS[-1]
    assert f"(3, {first}) <= sys.version_info[:2] <= (3, {last})" in (ROOT / "launch/bootstrap").read_text()
    assert f'target-version = "py{oldest.replace(".", "")}"' in (ROOT / "pyproject.toml").read_text()
