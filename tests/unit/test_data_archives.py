"""webdataset's shards and other tars, read in place."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
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


def pack(path: Path, files: dict[str, bytes], mode: str = "w", **options: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **options) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def read(path: str, split: str = "train", keys: Keys = Keys(), kind: str = "webdataset") -> list[tuple[int, int]]:  # noqa: B008
    source = open_source(kind, path, split, keys)
    return [(int(source[row][0][0, 0, 0]), source[row][1]) for row in range(len(source))]


def shard(first: int, count: int) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for number in range(first, first + count):
        files |= {f"{number:06d}.cls": str(number % 3).encode(), f"{number:06d}.png": picture(number)}
    return files


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("kind", ["webdataset", "imagefolder"])
def test_a_shard(tmp_path: Path, kind: str, format_: int) -> None:
    path = pack(
        tmp_path / "shard-000000.tar", {"./" + "deep/" * 30 + "a.png": picture(9), **shard(0, 3)}, format=format_
    )
    assert read(path, kind=kind) == [(9, -1), (0, 0), (1, 1), (2, 2)]
    assert open_source(kind, path, "train").name(1) == f"{path}/000000.png"


def test_patterns_and_folders_of_shards(tmp_path: Path) -> None:
    for number in range(12):
        pack(tmp_path / f"train-{number:06d}.tar", shard(10 * number, 2))
    pack(tmp_path / "val-000000.tar", shard(200, 2))
    expected = [(10 * n + i, (10 * n + i) % 3) for n in range(12) for i in range(2)]
    for kind in ("webdataset", "imagefolder"):
        assert read(str(tmp_path / "train-{000000..000011}.tar"), kind=kind) == expected
    assert source_splits("webdataset", str(tmp_path)) == ["train", "val"]
    assert read(str(tmp_path)) == expected and read(str(tmp_path), "val") == [(200, 2), (201, 0)]
    with pytest.raises(UserError, match=r"there is no file \S+train-000012.tar \(1 of 3\)"):
        read(str(tmp_path / "train-{000010..000012}.tar"))
    pack(tmp_path / "more.tar", shard(0, 1))
    with pytest.raises(UserError, match=r"more.tar is not named after a split as others are"):
        source_splits("webdataset", str(tmp_path))
    for name in ("test/0.tar", "train/0.tar"):
        pack(tmp_path / "inner" / name, shard(len(name), 1))
    assert read(str(tmp_path / "inner"), "test") == [(10, 1)]


@pytest.mark.parametrize(
    ("name", "content", "keys"),
    [
        ("a.json", {"label": 4, "url": "x"}, Keys()),
        ("a.json", {"cls": "4"}, Keys()),
        ("a.json", {"fine": 4, "label": 1}, Keys(labels="fine")),
        ("a.meta.json", {"target": 4}, Keys()),
        ("a.id", "4", Keys(labels="id")),
        ("a.cls", "4\n", Keys()),
    ],
)
def test_where_labels_are(tmp_path: Path, name: str, content: object, keys: Keys) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    path = pack(tmp_path / "s.tar", {"a.png": picture(5), name: text.encode(), "a.txt": b"caption"})
    assert read(path, keys=keys) == [(5, 4)]
    assert "neither pictures nor labels, passed over: 1" in open_source("webdataset", path, "train", keys).notes[-1]


def test_of_several_pictures_in_a_sample_one_is_chosen(tmp_path: Path) -> None:
    path = pack(tmp_path / "s.tar", {"a.png": picture(5), "a.mask.png": picture(6), "a.cls": b"1"})
    with pytest.raises(UserError, match=r"the sample 'a' has the pictures mask.png, png; choose one with --images"):
        read(path)
    assert read(path, keys=Keys(images="png")) == [(5, 1)]


def test_words_are_names_and_samples_without_a_label_are_told(tmp_path: Path) -> None:
    files = {"a.png": picture(1), "a.cls": b"dog", "b.png": picture(2), "b.cls": b"cat", "c.png": picture(3)}
    path = pack(tmp_path / "s.tar", files)
    assert read(path) == [(1, 1), (2, 0), (3, -1)]
    source = open_source("webdataset", path, "train")
    assert source.classes == ("cat", "dog") and "images without a label (-1): 1" in source.notes


def test_class_folders_in_a_tar(tmp_path: Path) -> None:
    names = [f"set/{split}/{name}/x.1.png" for split in ("Train", "test") for name in ("10", "9")]
    path = pack(tmp_path / "set.tar", {name: picture(number) for number, name in enumerate(names)})
    assert source_splits("webdataset", path) == ["train", "test"]
    assert read(path) == [(0, 1), (1, 0)] and read(path, "test") == [(2, 1), (3, 0)]
    files = {"cat/a.png": picture(1), "__MACOSX/a.png": picture(0), "ant/b.v2.png": picture(2)}
    flat = pack(tmp_path / "flat.tar", files)
    assert read(flat) == [(1, 1), (2, 0)]
    source = open_source("webdataset", flat, "train")
    assert source.classes == ("ant", "cat")
    assert "no labels (.cls, .json) in the tar: classes are the folders in it" in source.notes
    two = [pack(tmp_path / f"two/{s}.tar", {f"{s}/{c}/0.png": picture(3)}) for s, c in (("train", "a"), ("val", "b"))]
    assert len(two) == 2 and read(str(tmp_path / "two"), "val") == [(3, 1)]


@pytest.mark.parametrize("names", [("img/0.png", "img/1.png"), ("0.png", "1.png")])
def test_pictures_alone_are_unlabelled_and_told(tmp_path: Path, names: tuple[str, str]) -> None:
    path = pack(tmp_path / "s.tar", {name: picture(number) for number, name in enumerate(names)})
    assert read(path) == [(0, -1), (1, -1)]
    told = open_source("webdataset", path, "train").notes
    assert "no labels (.cls, .json) in the tar: images have no label (-1)" in told


@pytest.mark.parametrize("kind", ["link", "hard", "device", "up", "absolute"])
def test_members_that_lead_out_are_refused(tmp_path: Path, kind: str) -> None:
    path = pack(tmp_path / "s.tar", {"a.png": picture(0)})
    member = tarfile.TarInfo({"up": "../b.png", "absolute": "/etc/b.png"}.get(kind, "b.png"))
    member.linkname = "/etc/passwd"
    types = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}
    member.type = types.get(kind, tarfile.REGTYPE)
    with tarfile.open(path, "a") as tar:
        tar.addfile(member)
    with pytest.raises(UserError, match=r"s.tar: the member '\S*b.png' (leads out|is a link or a device)"):
        read(path)


def test_tars_that_cannot_be_read(tmp_path: Path) -> None:
    whole = Path(pack(tmp_path / "s.tar", {"a.png": picture(0), "b.png": bytes(5000)})).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:4000])
    (tmp_path / "text.tar").write_text("hello " * 200)
    pack(tmp_path / "zipped.tar", {"a.png": picture(0)}, "w:gz")
    pack(tmp_path / "twice.tar", {"a.png": picture(0)})
    with tarfile.open(tmp_path / "twice.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    pack(tmp_path / "bad.tar", {"a.png": picture(0), "a.json": b"{"})
    pack(tmp_path / "none.tar", {"a.txt": b""})
    for name, told in (
        ("cut", "is cut short within 'b.png'"),
        ("text", "not a plain tar file"),
        ("zipped", "not a plain tar file .*; unpack a compressed one"),
        ("twice", "holds 'a.png' twice"),
        ("bad", "a.json: not JSON"),
        ("none", "no pictures in the shards of train"),
    ):
        with pytest.raises(UserError, match=told) as caught:
            read(str(tmp_path / f"{name}.tar"))
        assert "\n" not in str(caught.value) and f"{name}.tar" in str(caught.value)


def test_prepared_and_nothing_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path / "shards" / "s.tar", shard(0, 6))
    monkeypatch.chdir(tmp_path)
    assert main(["data", "prepare", "webdataset", "--path", path, "--out", "out", "--storage", "npy"]) == 0
    dataset = open_dataset("out/train")
    pairs = sorted((int(dataset.image(row)[0, 0, 0]), int(dataset.labels[row])) for row in range(6))
    assert pairs == [(n, n % 3) for n in range(6)] and np.unique(dataset.images(np.arange(6))[..., 1:]).tolist() == [0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "shards"]
