"""Zips of class folders, read in place."""

import io
import os
import stat
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dist_defend.cli import main
from dist_defend.data.sources import Keys, open_source, source_splits
from dist_defend.data.store import open_dataset
from dist_defend.errors import UserError


def picture(red: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), (red, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def pack(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED, **changes: Any) -> str:
    """changes: of every member's ZipInfo."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            for key, value in changes.items():
                setattr(info, key, value)
            archive.writestr(info, content)
    return str(path)


def read(path: str, split: str = "train", kind: str = "zip") -> list[tuple[int, int]]:
    source = open_source(kind, path, split)
    return [(int(source[row][0][0, 0, 0]), source[row][1]) for row in range(len(source))]


SPLITS = {
    "set/test/cat/1.png": picture(5),
    "set/train/dog/2.PNG": picture(4),
    "set/train/dog/10.png": picture(3),
    "set/train/cat/1.png": picture(2),
    "set/train/cat/deep/0.png": picture(1),
    "__MACOSX/set/train/cat/._1.png": b"",
    "set/readme.txt": b"words",
}


@pytest.mark.parametrize("kind", ["zip", "imagefolder"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_splits_and_classes_are_folders(tmp_path: Path, kind: str, method: int) -> None:
    path = pack(tmp_path / "a.zip", SPLITS, method)
    assert source_splits(kind, path) == ["train", "test"]
    assert sorted(read(path, "train", kind)) == [(1, 0), (2, 0), (3, 1), (4, 1)]
    assert read(path, "test", kind) == [(5, 0)]
    source = open_source(kind, path, "train")
    assert source.classes == ("cat", "dog") and source.name(0) == f"{path}/set/train/cat/1.png"
    assert "files in the zip that are no pictures, passed over: 1" in source.notes
    assert "classes without a folder" not in " ".join(source.notes)


def test_order_is_that_of_the_names(tmp_path: Path) -> None:
    """Not that of the files in the zip."""
    forwards = pack(tmp_path / "a.zip", SPLITS)
    backwards = pack(tmp_path / "b.zip", dict(reversed(SPLITS.items())))
    assert read(forwards) == read(backwards)


def test_a_zip_without_folders_has_no_labels(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", {"1.png": picture(1), "2.png": picture(2)})
    assert read(path) == [(1, -1), (2, -1)]
    assert "no label (-1)" in open_source("zip", path, "train").notes[0]


def test_prepared_as_the_same_folder_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = pack(tmp_path / "set.zip", SPLITS)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "unpacked")
    for source, out in ((path, "one"), (str(tmp_path / "unpacked" / "set"), "other")):
        words = ["data", "prepare", "imagefolder", "--path", source, "--out", str(tmp_path / out), "--storage", "npy"]
        assert main(words) == 0
    told = capsys.readouterr().out
    assert "is read as the kind zip" in told
    for split in ("train", "test"):
        one, other = (open_dataset(tmp_path / out / split) for out in ("one", "other"))
        assert {k: f.sha256 for k, f in one.manifest.files.items()} == {
            k: f.sha256 for k, f in other.manifest.files.items()
        }
        assert one.classes == other.classes


def link(target: bytes = b"/etc/passwd") -> dict[str, Any]:
    return {"files": {"cat/1.png": target}, "external_attr": (stat.S_IFLNK | 0o777) << 16}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"files": {"../cat/1.png": picture(1)}}, "'../cat/1.png' leads out of the zip"),
        ({"files": {"/cat/1.png": picture(1)}}, "'/cat/1.png' leads out of the zip"),
        ({"files": {"cat\\..\\..\\1.png": picture(1)}}, "leads out of the zip"),
        (link(), "'cat/1.png' is a link or a device"),
        ({"files": {"cat/1.png": picture(1)}, "external_attr": stat.S_IFIFO << 16}, "is a link or a device"),
        ({"files": {"cat/1.png": picture(1)}, "method": zipfile.ZIP_LZMA}, "neither stored nor deflated"),
        ({"files": {"cat/1.png": bytes(300 << 20)}, "method": zipfile.ZIP_DEFLATED}, "would unpack to 314,572,800 "),
        ({"files": {"cat/1.png": bytes(5 << 20)}, "method": zipfile.ZIP_DEFLATED}, "would unpack to 5,242,880 bytes"),
        ({"files": {"cat/1.txt": b"1"}}, "no pictures in it"),
        ({"files": {}}, "no pictures in it"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    path = pack(tmp_path / "a.zip", **options)
    with pytest.raises(UserError) as error:
        source_splits("zip", path)
    assert told in str(error.value) and path in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["a.zip"]


def test_what_is_packed_twice_or_encrypted_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("cat/1.png", picture(1))
        archive.writestr("cat/1.png", picture(2))
    with pytest.raises(UserError, match=r"holds 'cat/1.png' twice"):
        source_splits("zip", str(tmp_path / "twice.zip"))
    content = bytearray(Path(pack(tmp_path / "a.zip", {"cat/1.png": picture(1)})).read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag in the table at the end
    (tmp_path / "locked.zip").write_bytes(content)
    with pytest.raises(UserError, match="is encrypted"):
        source_splits("zip", str(tmp_path / "locked.zip"))


def test_damage_is_told(tmp_path: Path) -> None:
    whole = Path(pack(tmp_path / "a.zip", {"cat/1.png": picture(1), "dog/2.png": picture(2)})).read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.zip: not a whole zip file"):
        source_splits("zip", str(tmp_path / "cut.zip"))
    (tmp_path / "none.zip").write_bytes(b"hello")
    with pytest.raises(UserError, match=r"none\.zip: not a whole zip file"):
        source_splits("zip", str(tmp_path / "none.zip"))
    place = whole.index(picture(2)) + 20
    (tmp_path / "flipped.zip").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    source = open_source("zip", str(tmp_path / "flipped.zip"), "train")
    assert source[0][1] == 0
    with pytest.raises(UserError, match=r"flipped\.zip: not a whole zip file \(Bad CRC-32"):
        source[1]


def test_a_size_that_lies_ends_the_reading(tmp_path: Path) -> None:
    """A table that says 100 bytes of a member that unpacks to 8 MiB: no more than 100 are made."""
    content = bytearray(
        Path(pack(tmp_path / "a.zip", {"cat/1.png": bytes(8 << 20)}, zipfile.ZIP_DEFLATED)).read_bytes()
    )
    table = content.index(b"PK\x01\x02")
    content[table + 24 : table + 28] = (100).to_bytes(4, "little")
    content[table + 16 : table + 20] = zlib.crc32(bytes(100)).to_bytes(4, "little")
    (tmp_path / "lie.zip").write_bytes(content)
    source = open_source("zip", str(tmp_path / "lie.zip"), "train")
    assert source.encoded(0) == bytes(100)  # type: ignore[attr-defined]


def test_keys_are_for_other_kinds(tmp_path: Path) -> None:
    path = pack(tmp_path / "a.zip", SPLITS)
    with pytest.raises(UserError, match="zip has no keys to choose from"):
        open_source("zip", path, "train", Keys("x", None))
