"""A save that is killed at any of its file operations leaves the old checkpoint or the new one; no remnant stays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_defend.engine import checkpoint

# Forks for the n-th file operation a process that is killed before it; a text is also left empty and half written, the
# tensors half. The last process survives. Prints how many operations there were.
DRIVER = """
import os, pathlib, shutil, signal, sys
import torch
from dist_defend.engine import checkpoint

base, folder, step, keep = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "shutil.rmtree")

def save(place, last):
    count = 0
    def point():
        nonlocal count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(lambda event, args: point() if event in OPERATIONS else None)
    fsync, write_hashed = os.fsync, checkpoint.write_hashed
    def write_text(self, text):
        with self.open("w") as file:
            for part in ("", text[: len(text) // 2], text[len(text) // 2 :]):
                file.write(part)
                file.flush()
                point()
    def halves(parts):  # the tensor's are longer than what Python keeps back, so they are in the file
        for part in parts:
            for half in (part[: len(part) // 2], part[len(part) // 2 :]):
                yield half
                point()
    os.fsync = lambda descriptor: (point(), fsync(descriptor))[1]
    pathlib.Path.write_text = write_text
    checkpoint.write_hashed = lambda path, parts: write_hashed(path, halves(parts))
    checkpoint.save(place, step, {"value": torch.full((6000,), 2.0)}, keep)

number = 0
while True:
    number += 1
    place = folder / str(number)
    shutil.copytree(base, place)
    child = os.fork()
    if not child:
        save(place, number)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
print(number)
"""


def value(path: Path | None) -> tuple[str, float]:
    assert path is not None, "no checkpoint is left"
    return path.name, checkpoint.load(path)["value"][0].item()


def put(folder: Path, step: int, number: float) -> None:
    checkpoint.save(folder, step, {"value": torch.full((3,), number)}, keep=9)


@pytest.mark.parametrize(
    ("before", "left", "step", "old"),
    [
        ({3: 0.0, 5: 1.0}, None, 5, "step_000000005"),  # the same step once more, as a signal after a save has it
        ({3: 0.0, 5: 1.0}, None, 6, "step_000000005"),  # the next one, which pushes out the oldest
        ({5: 1.0}, None, 5, "step_000000005"),  # the only one
        ({3: 0.0, 5: 1.0}, "renamed", 5, "step_000000005"),  # killed between the two renames before
        ({3: 0.0, 5: 1.0}, "kept", 5, "step_000000005"),  # killed before the old one was deleted
        ({}, None, 5, None),  # the first of all
    ],
)
def test_every_instant_of_a_save(
    before: dict[int, float], left: str | None, step: int, old: str | None, tmp_path: Path
) -> None:
    base, folder = tmp_path / "base", tmp_path / "killed"
    base.mkdir()
    folder.mkdir()
    for at, number in before.items():
        put(base, at, number)
    if left == "renamed":
        (base / "step_000000005").rename(base / ".step_000000005.before")
        (base / ".writing_1").mkdir()
    elif left == "kept":
        put(tmp_path / "other", 5, 0.5)
        (tmp_path / "other" / "step_000000005").rename(base / ".step_000000005.before")
    command = [sys.executable, "-c", DRIVER, str(base), str(folder), str(step), "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    instants = int(done.stdout)
    assert instants > 25
    new = f"step_{step:09d}"
    found = []
    for number in range(1, instants + 1):
        place = folder / str(number)
        newest = checkpoint.newest(place)
        if old is not None or newest is not None:
            found.append(value(newest))
            assert found[-1] in [(old, 1.0), (new, 2.0)]
        put(place, 7, 3.0)
        assert sorted(p.name for p in place.iterdir() if not p.name.startswith("step_")) == []
        assert value(checkpoint.newest(place)) == ("step_000000007", 3.0)
    assert found[-1] == (new, 2.0) and (old is None or found[0] == (old, 1.0))
    if old is not None:
        assert set(found) == {(old, 1.0), (new, 2.0)}


def test_the_left_over_of_a_dead_process_with_our_number_is_no_error(tmp_path: Path) -> None:
    """Containers start at the same number again and again."""
    remnant = tmp_path / f".writing_{os.getpid()}"
    remnant.mkdir()
    (remnant / "state.json").write_text(json.dumps("half"))
    put(tmp_path, 1, 1.0)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000000001"]


def test_a_reader_that_does_not_own_the_folder_leaves_it_as_it_is(tmp_path: Path) -> None:
    put(tmp_path, 1, 1.0)
    (tmp_path / "step_000000001").rename(tmp_path / ".step_000000001.before")
    assert checkpoint.newest(tmp_path, is_owner=False) is None
    assert [p.name for p in tmp_path.iterdir()] == [".step_000000001.before"]
    assert value(checkpoint.newest(tmp_path)) == ("step_000000001", 1.0)
