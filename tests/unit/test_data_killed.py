"""Preparing over a data set: killed at any moment nothing is lost, and one writer at a time."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dist_defend.cli import main
from dist_defend.data.sources import ArraySource
from dist_defend.data.store import open_dataset, write_dataset
from dist_defend.errors import UserError
from tests.runs import make_data


@pytest.mark.parametrize("kind", ["over", "fresh", "twice"])
def test_killed_before_any_file_operation_nothing_is_lost(tmp_path: Path, kind: str) -> None:
    """Both splits are the old ones or the new ones, the next prepare goes through, and no left-overs remain."""
    command = [sys.executable, "-m", "tests.unit.killed_prepare", str(tmp_path), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wrong, count = json.loads(done.stdout)
    assert wrong == []
    assert count > 15  # files are made, opened, renamed and removed in two folders


def data(level: int) -> ArraySource:
    return ArraySource(np.full((4, 4, 4, 3), level, np.uint8), np.zeros(4, np.int64), ("any",))


def write(folder: Path, level: int) -> None:
    write_dataset(data(level), folder, name="x", split="s", storage="npy")


def level(folder: Path) -> int:
    return int(open_dataset(folder).image(0)[0, 0, 0])


def test_what_earlier_versions_left_is_found_and_swept(tmp_path: Path) -> None:
    """They had their process' number in the names, which comes again in containers."""
    write(tmp_path / "d", 1)
    (tmp_path / "d").rename(tmp_path / ".d.4711.before")
    (tmp_path / ".d.4711").mkdir()
    (tmp_path / f".d.{os.getpid()}").mkdir()
    (tmp_path / f".d.{os.getpid()}" / "images.npy").write_bytes(b"half")
    (tmp_path / ".d.notes").write_text("the user's")
    assert level(tmp_path / "d") == 1
    write(tmp_path / "d", 2)
    assert level(tmp_path / "d") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [".d.notes", "d"]


def test_a_list_of_folders_that_is_none_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "d", 1)
    (tmp_path / "d").rename(tmp_path / ".d.before")
    for content in ('["../x"]', '["d", 1]', "{}", "[", '[".."]'):
        (tmp_path / ".d.together").write_text(content)
        with pytest.raises(UserError, match=r"\.d\.together.*remove this file"):
            open_dataset(tmp_path / "d")
    (tmp_path / ".d.together").unlink()
    assert level(tmp_path / "d") == 1


def test_a_place_that_is_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    write(tmp_path / "large" / "d", 1)
    (tmp_path / "d").symlink_to(tmp_path / "large" / "d")
    write(tmp_path / "d", 2)
    assert (tmp_path / "d").is_symlink() and level(tmp_path / "large" / "d") == 2
    assert [path.name for path in (tmp_path / "large").iterdir()] == ["d"]


WRITER = """
import sys, time
import numpy as np
from dist_defend.data.store import write_dataset

class Endless:
    classes = ("any",)
    def __len__(self): return 4
    def __getitem__(self, row):
        print("reading", flush=True)
        time.sleep(600)

write_dataset(Endless(), sys.argv[1], name="x", split="s", storage="npy")
"""


def test_a_second_writer_is_told_of_the_first_and_a_dead_ones_place_is_free(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_data(tmp_path / "out" / "test", 6)
    before = open_dataset(tmp_path / "out" / "test").digest
    again = ["data", "prepare", "digits", "--split", "test", "--out", str(tmp_path / "out"), "--max-samples", "5"]
    command = [sys.executable, "-c", WRITER, str(tmp_path / "out" / "test")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None and writer.stdout.readline() == "reading\n"
            assert main(again) == 2
            told = capsys.readouterr().err
            assert told.startswith(f"error: {tmp_path / 'out' / 'test'} is in use by process {writer.pid} on ")
            assert "choose another folder (--out)" in told and told.count("\n") == 1
            assert open_dataset(tmp_path / "out" / "test").digest == before  # readers go on with the old one
        finally:
            writer.send_signal(signal.SIGKILL)
    assert (tmp_path / "out" / ".test.new").exists()
    assert open_dataset(tmp_path / "out" / "test").digest == before
    assert main(again) == 0
    assert len(open_dataset(tmp_path / "out" / "test")) == 5
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["test"]
