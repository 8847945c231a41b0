"""The wheel and the source distribution: what is in them, and what an installed wheel does far from any checkout."""

import ast
import email
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_defend import templates

ROOT = Path(__file__).parents[2]
BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, sys.argv[1])(sys.argv[2]))"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks, for a build leaves its traces."""
    folder = tmp_path_factory.mktemp("tree")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    copied = subprocess.run(
        ["tar", "cf", "-", "--null", "--ignore-failed-read", "-T", "-"],
        cwd=ROOT, input=names, capture_output=True, check=True,
    )  # fmt: skip
    subprocess.run(["tar", "xf", "-", "-C", str(folder)], input=copied.stdout, check=True)
    return folder


def build(tree: Path, what: str, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, what, str(out)], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tree, "build_wheel", tmp_path_factory.mktemp("wheel"))


def tracked(part: str) -> dict[str, bytes]:
    """Contents of all files of a part of the repository, by their names in it."""
    names = subprocess.run(["git", "ls-files", part], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name: (ROOT / name).read_bytes() for name in names.splitlines() if (ROOT / name).is_file()}


def test_the_wheel_has_each_template_as_it_is_in_the_repository(wheel: Path) -> None:
    (own,) = (line for line in (ROOT / "setup.py").read_text().splitlines() if line.startswith("TEMPLATES = "))
    assert ast.literal_eval(own.partition(" = ")[2]) == templates.PARTS
    head = "dist_defend/templates/"
    with zipfile.ZipFile(wheel) as archive:
        found = {name.removeprefix(head): archive.read(name) for name in archive.namelist() if name.startswith(head)}
        names = set(archive.namelist())
    del found["__init__.py"]
    wanted: dict[str, bytes] = {}
    for part in templates.PARTS:
        wanted |= tracked(part)
    assert found == wanted and len(wanted) > 80
    assert {"dist_defend/py.typed", "dist_defend/report/page.css", "dist_defend/bench/published/rnp.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "launch/", "examples/"))]


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_string(archive.read(name).decode())
    assert metadata["Summary"] and metadata["Description-Content-Type"] == "text/markdown"
    readme = (ROOT / "README.md").read_text()
    assert readme.strip() in str(metadata.get_payload())
    classifiers = metadata.get_all("Classifier") or []
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)} <= set(classifiers)
    assert all(url.split(", ")[1].startswith("https://arxiv.org/abs/") for url in metadata.get_all("Project-URL") or [])
    required = [line for line in metadata.get_all("Requires-Dist") or [] if 'extra == "all"' in line]
    assert any(line.startswith("pandas") for line in required) and any("ffcv" in line for line in required)
    assert not any(line.startswith(("pytest", "mypy", "ruff")) for line in required)


def test_a_wheel_made_of_the_source_distribution_is_the_same(tree: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build(tree, "build_sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    again = build(source, "build_wheel", tmp_path / "again")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        contents = [{n: a.read(n) for n in a.namelist() if ".dist-info/" not in n} for a in (first, second)]
    assert contents[0] == contents[1]
    assert {"launch/smoke", "docs/data.md", "LICENSE"} <= {str(p.relative_to(source)) for p in source.rglob("*")}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """bin/ of a fresh environment with the wheel, which sees this one's packages except for dist-defend itself."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
        str(wheel),
    ]
    subprocess.run(command, check=True, env=clean_environment())
    yield folder / "bin"


def clean_environment() -> dict[str, str]:
    dropped = ("PYTHONPATH", "PYTEST_", "COV_", "VIRTUAL_ENV")
    own = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return own | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def test_the_installed_package_is_the_wheels(installed: Path, tmp_path: Path) -> None:
    code = "import dist_defend, sys; print(dist_defend.__file__); print('torch' in sys.modules)"
    told = subprocess.run(
        [installed / "python", "-c", code],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    place, has_torch = told.stdout.splitlines()
    assert Path(place).is_relative_to(installed.parent) and has_torch == "False"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_readmes_five_minutes_two_ranks_and_a_bench(installed: Path) -> None:
    done = subprocess.run(
        [ROOT / "launch" / "smoke", installed, ROOT / "README.md"],
        env=clean_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "smoke: all 14 commands did what they should" in done.stdout
    commands = [line for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert [" ".join(line.split()[1:3]) for line in commands if line.split()[1] == "dist-defend"] == [
        f"dist-defend {name}" for name in (
            "init", "data", "run", "run", "report", "import", "evaluate", "run", "launch", "bench", "plan",
        )
    ]  # fmt: skip
    assert commands[10] == "$ python mine.py"
