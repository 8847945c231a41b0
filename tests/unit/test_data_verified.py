"""What was checked is remembered by size, inode and times; whatever changes is checked again."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from dist_defend.data import checks, store, verified
from dist_defend.data.store import open_dataset
from dist_defend.errors import UserError
from dist_defend.files import sha256_file
from tests.runs import make_data


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed, with a cache of this test's own that counts files as settled at once."""
    names: list[str] = []

    def noted(path: Path) -> str:
        names.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(checks, "sha256_file", noted)
    monkeypatch.setattr(verified, "_SETTLED", -1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return names


def marks(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "dist_defend" / "verified").iterdir())


def test_files_are_hashed_once(tmp_path: Path, hashed: list[str]) -> None:
    folder = make_data(tmp_path / "d", 6)
    assert hashed == []  # preparing knows what it wrote
    open_dataset(folder)
    assert sorted(hashed) == ["images.npy", "labels.npy"]
    open_dataset(folder, resize=4)
    (tmp_path / "d").rename(tmp_path / "e")
    open_dataset(tmp_path / "e")
    assert len(hashed) == 2 and len(marks(tmp_path)) == 1


def test_a_flipped_bit_is_found_and_named(tmp_path: Path, hashed: list[str]) -> None:
    folder = Path(make_data(tmp_path / "d", 6))
    open_dataset(folder)
    path = folder / "images.npy"
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps times
    for _ in range(2):
        with pytest.raises(UserError, match=r"d/images\.npy: content differs from manifest\.json \(sha256\)"):
            open_dataset(folder)


def test_a_file_or_manifest_that_is_another_is_checked_again(tmp_path: Path, hashed: list[str]) -> None:
    folder = Path(make_data(tmp_path / "d", 6))
    open_dataset(folder)
    labels = folder / "labels.npy"
    labels.rename(folder / "old")
    labels.write_bytes((folder / "old").read_bytes())
    open_dataset(folder)
    assert len(hashed) == 4
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"name": "other"}))
    open_dataset(folder)
    assert len(hashed) == 6


def test_only_this_users_own_plain_marks_count(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_data(tmp_path / "d", 6)
    open_dataset(folder)
    (mark,) = marks(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: mark.stat().st_uid + 1)
    open_dataset(folder)
    monkeypatch.setattr(os, "geteuid", lambda: mark.stat().st_uid)
    assert len(hashed) == 4
    mark.unlink()
    mark.symlink_to(tmp_path)
    open_dataset(folder)
    assert len(hashed) == 6


def test_where_no_cache_can_be_written_it_is_checked_each_time(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_data(tmp_path / "d", 6)
    (tmp_path / "cache").write_text("in the way")
    for _ in range(2):
        open_dataset(folder)
    assert len(hashed) == 4


def test_what_changed_just_now_is_not_remembered(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change within the same tick of the file system's clock would not show."""
    monkeypatch.setattr(verified, "_SETTLED", 3600.0)
    folder = make_data(tmp_path / "d", 6)
    for _ in range(2):
        open_dataset(folder)
    assert len(hashed) == 4 and not (tmp_path / "cache").exists()


def test_another_version_of_the_checks_checks_again(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_data(tmp_path / "d", 6)
    open_dataset(folder)
    monkeypatch.setattr(verified, "CHECKS", verified.CHECKS + 1)
    calls: list[object] = []
    monkeypatch.setattr(store, "check_contents", lambda *arguments: calls.append(arguments))
    open_dataset(folder)
    assert len(calls) == 1 and np.array_equal(open_dataset(folder).labels, np.arange(6) % 3)
