"""Kills `data prepare` before each of its file operations in turn; run by test_data_killed.py in a process of its own.

    python -m tests.unit.killed_prepare FOLDER over | fresh | twice

Prints what was wrong as a JSON list, and how many operations there were. A hook of Python's audit events sees every
opening, renaming, making and removing in the folder; the process is ended by SIGKILL, so nothing is cleaned up.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dist_defend.data.sources import ArraySource
from dist_defend.data.store import WriteOptions, open_dataset, write_splits
from dist_defend.errors import UserError

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
SPLITS = ("train", "test")


def prepare(out: Path, level: int) -> None:
    """Both splits, of images of one level."""
    images = np.full((4, 4, 4, 3), level, np.uint8)
    sources = {split: ArraySource(images, np.arange(4) % 2, ("a", "b")) for split in SPLITS}
    options = WriteOptions(storage="npy", order_seed=0)
    write_splits(sources, {split: out / split for split in SPLITS}, name="level", options=options)


def levels(out: Path, splits: tuple[str, ...]) -> list[int | None]:
    """The level of the images of train and of test, None where there is no data set; opened in the order of splits."""
    found: dict[str, int | None] = {}
    for split in splits:
        try:
            images = open_dataset(out / split).images(np.arange(4))
        except UserError as error:
            assert "not a prepared data set" in str(error), error
            found[split] = None
        else:
            assert (images == images[0, 0, 0, 0]).all()
            found[split] = int(images[0, 0, 0, 0])
    return [found[split] for split in SPLITS]


def live(out: Path, act: Callable[[], Any], kill_at: int) -> bool:
    """Run ``act`` in a process that is killed before its n-th file operation in the folder; whether it was."""
    child = os.fork()
    if child == 0:
        left = [kill_at]

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event not in EVENTS or not arguments or isinstance(arguments[0], int):
                return
            place = os.fsdecode(arguments[0])
            if not os.path.isabs(place) or place.startswith(str(out)):  # rmtree works by names in an open folder
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1

        sys.addaudithook(hook)
        try:
            act()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "it failed, see above"
    return os.WIFSIGNALED(status)


def main(folder: Path, kind: str) -> tuple[list[str], int]:
    wrong: list[str] = []
    out = folder / "out"
    count = 0
    for at in range(1000):
        shutil.rmtree(out, ignore_errors=True)
        if kind != "fresh":
            prepare(out, 1)
        was_killed = live(out, lambda: prepare(out, 2), at)
        if not was_killed:
            if levels(out, SPLITS) != [2, 2]:
                wrong.append("not killed, and not prepared")
            break
        count += 1
        if kind == "twice":
            if list(out.glob(".*.together")):
                return _killed_readers(folder, out)
            continue
        found = levels(out, SPLITS if at % 2 else SPLITS[::-1])
        if found not in ([[2, 2], [None, None]] if kind == "fresh" else [[1, 1], [2, 2]]):
            wrong.append(f"killed before operation {at}: {found}")
        prepare(out, 3)
        left = sorted(path.name for path in out.iterdir())
        if left != sorted(SPLITS) or levels(out, SPLITS) != [3, 3]:
            wrong.append(f"killed before operation {at}, then prepared again: {left}")
    return wrong, count


def _killed_readers(folder: Path, out: Path) -> tuple[list[str], int]:
    """The reader that finishes the replacement is killed too, before each of its operations; the next one finds all."""
    wrong: list[str] = []
    kept = folder / "kept"
    shutil.copytree(out, kept)
    for at in range(1000):
        shutil.rmtree(out)
        shutil.copytree(kept, out)
        if not live(out, lambda: levels(out, SPLITS), at):
            return wrong, at
        found = levels(out, SPLITS[::-1])
        if found != [2, 2]:
            wrong.append(f"the reader killed before its operation {at}: {found}")
    raise AssertionError("it never ends")


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]).resolve(), sys.argv[2])))
