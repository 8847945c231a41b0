"""What a run says of its code: the commit of its own checkout, never that of a repository around an installation."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import dist_defend
from dist_defend.engine.version import code_version

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def git(folder: Path, *arguments: str) -> str:
    own = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    command = ["git", *who, *arguments]
    return subprocess.run(
        command, cwd=folder, env=os.environ | own, capture_output=True, text=True, check=True
    ).stdout.strip()


def repository(folder: Path, package: str | None) -> str:
    """A repository with one commit, of the package where one is named; the commit."""
    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "-q")
    (folder / "notes.txt").write_text("of this repository")
    (folder / ".gitignore").write_text(".venv/\n")
    git(folder, "add", "notes.txt", ".gitignore")
    if package is not None:
        git(folder, "add", package)
    git(folder, "commit", "-qm", "first")
    return git(folder, "rev-parse", "--short=12", "HEAD")


def package(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "cli.py").write_text("")
    return folder


def test_a_checkout_of_its_own_has_its_commit_and_tells_of_changed_code(tmp_path: Path) -> None:
    place = package(tmp_path / "dist_defend")
    commit = repository(tmp_path, "dist_defend")
    version = f"{dist_defend.__version__}+{commit}"
    assert code_version(place) == version
    (tmp_path / "notes.txt").write_text("no code")
    assert code_version(place) == version
    (place / "cli.py").write_text("changed = True")
    assert code_version(place) == version + "+"
    git(tmp_path, "checkout", "-q", "dist_defend")
    (place / "new.py").write_text("")  # runs, though no commit has it
    assert code_version(place) == version + "+"


@pytest.mark.parametrize(
    ("where", "tracked"),
    [
        (".venv/lib/python3.11/site-packages/dist_defend", None),  # an environment in somebody's checkout
        ("dist_defend", None),  # a copy that nobody added
        ("third_party/dist_defend", "third_party"),  # one that somebody did: the commit is that of a larger whole
    ],
)
def test_a_repository_around_it_says_nothing(where: str, tracked: str | None, tmp_path: Path) -> None:
    place = package(tmp_path / where)
    repository(tmp_path, tracked)
    assert code_version(place) == dist_defend.__version__


def test_a_repository_that_the_environment_names_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a hook of git."""
    repository(tmp_path / "other", None)
    place = package(tmp_path / "dist_defend")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    assert code_version(place) == dist_defend.__version__


def test_without_git_the_version_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = package(tmp_path / "dist_defend")
    repository(tmp_path, "dist_defend")
    monkeypatch.setenv("PATH", "")
    assert code_version(place) == dist_defend.__version__
