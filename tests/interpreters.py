"""Python's versions that the package is for, and those of them that start on this machine.

python -m tests.interpreters      # a line that says which
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache

MINORS = (10, 11, 12, 13)
ASKED = "import sys; print(sys.version_info[1], sys.executable)"


def outcome(command: list[str], **variables: str) -> str:
    """What a command prints; nothing if it is not there or fails."""
    try:
        done = subprocess.run(
            command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commands(minor: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Programs that may be that Python, each with the variables that it may need."""
    name = f"python3.{minor}"
    yield name, {}
    if shutil.which("pyenv"):  # its python3.X is a script that starts nothing until a version is chosen
        installed = outcome(["pyenv", "versions", "--bare"]).split()
        yield from ((name, {"PYENV_VERSION": one}) for one in installed if one.startswith(f"3.{minor}."))
    if shutil.which("uv"):
        yield outcome(["uv", "python", "find", "--no-project", "--offline", f"3.{minor}"]) or name, {}


@cache
def interpreter(minor: int) -> str | None:
    """An interpreter of Python 3.``minor`` that really started: this one, or what PATH, pyenv or uv have."""
    if sys.version_info[1] == minor:
        return sys.executable
    for name, variables in commands(minor):
        told, _, path = outcome([name, "-c", ASKED], **variables).partition(" ")
        if told == str(minor) and path:
            return path
    return None


if __name__ == "__main__":
    print("Python:", ", ".join(f"3.{m} {'starts' if interpreter(m) else 'IS NOT HERE'}" for m in MINORS))
