"""The code that runs: the package's version and, in a checkout of its own, the commit."""

import os
import subprocess
from pathlib import Path

import dist_defend


def code_version(package: Path | None = None) -> str:
    """The version and, in a checkout, its commit (with + where the code was changed).

    package: the folder of dist_defend, by default the one that runs. Only a repository whose top folder holds it, and
    that tracks it, counts: one that merely surrounds an installation says nothing of this code.
    """
    package = (package or Path(dist_defend.__file__).parent).resolve()
    try:
        top = _git(package, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != package.parent:
            return dist_defend.__version__
        _git(package, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(package, "rev-parse", "--short=12", "HEAD")
        changed = _git(package, "status", "--porcelain", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return dist_defend.__version__
    return f"{dist_defend.__version__}+{commit}{'+' if changed else ''}"


def _git(folder: Path, *arguments: str) -> str:
    """What git says there, whatever repository the environment names (as in a hook)."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()
