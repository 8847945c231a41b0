"""Other people's .beton files, written by FFCV itself or, without it, by hand after its description."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_defend.data.sources import Keys, open_source, source_splits
from dist_defend.errors import UserError

IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
POINTER = np.dtype([("ptr", "<u8"), ("size", "<u8")])
TYPES = {"float": (0, "<f8"), "int": (1, "<i8"), "image": (2, IMAGE), "bytes": (3, POINTER), "own": (255, "<i8")}
HEADER = [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("n", "<u8"), ("table", "<u8")]
FIELD = [("type", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)]
START = 16384  # of the data
PICTURES = [np.full((4 + n, 6, 3), 40 * n, np.uint8) for n in range(4)]


def write(path: Path, fields: dict[str, str], labels: list[int], jpeg_rows: tuple[int, ...] = ()) -> Path:
    """Header, fields, metadata, data, allocation table; the first int field counts, others are 0."""
    header = np.zeros(1, np.dtype(HEADER, align=True))
    described = np.zeros(len(fields), np.dtype(FIELD, align=True))
    for number, (name, kind) in enumerate(fields.items()):
        described[number]["type"] = TYPES[kind][0]
        described[number]["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    metadata = np.zeros(len(labels), np.dtype([(name, TYPES[kind][1]) for name, kind in fields.items()], align=True))
    table = np.zeros(len(labels), np.dtype([("sample", "<u8"), ("ptr", "<u8"), ("size", "<u8")]))
    start, data = START, b""
    for row, label in enumerate(labels):
        pixels = PICTURES[row]
        content = pixels.tobytes()
        if row in jpeg_rows:
            stream = io.BytesIO()
            Image.fromarray(pixels).save(stream, "JPEG", quality=95)
            content = stream.getvalue()
        for name, kind in fields.items():
            if kind == "image":
                metadata[name][row] = (row not in jpeg_rows, pixels.shape[1], pixels.shape[0], start + len(data))
        first = next((name for name, kind in fields.items() if kind == "int"), None)
        if first:
            metadata[first][row] = label
        table[row] = (row, start + len(data), len(content))
        data += content
    header[0] = (2, len(fields), 4096, len(labels), start + len(data))
    head = header.tobytes() + described.tobytes() + metadata.tobytes()
    path.write_bytes(head.ljust(start, b"\0") + data + table.tobytes())
    return path


@pytest.mark.parametrize("jpeg_rows", [(), (0, 1, 2, 3), (1, 3)])
def test_raw_jpg_and_mixed(tmp_path: Path, jpeg_rows: tuple[int, ...]) -> None:
    path = write(tmp_path / "val_400_0.10_90.ffcv", {"covariate": "image", "label": "int"}, [3, 0, 1, 3], jpeg_rows)
    for kind in ("beton", "imagefolder"):
        assert source_splits(kind, str(path)) == ["val"]
        source = open_source(kind, str(path), "val")
        assert [source[row][1] for row in range(4)] == [3, 0, 1, 3] and source.classes == ("0", "1", "2", "3")
        for row, pixels in enumerate(PICTURES):
            assert source[row][0].shape == pixels.shape and np.abs(source[row][0].astype(int) - pixels).max() <= 1
    assert "classes without an image in any split: 2" in source.notes


def test_fields_by_name_and_fields_that_are_none(tmp_path: Path) -> None:
    several = {"one": "image", "two": "image", "coarse": "int", "fine": "int", "weight": "float"}
    path = str(write(tmp_path / "a.beton", several, [1, 1, 0, 0]))
    assert open_source("beton", path, "train", Keys("two", "coarse"))[0][1] == 1
    for keys, told in (
        (Keys(None, "coarse"), "several fields may be meant; choose one RGBImageField by --images: it has one"),
        (
            Keys("one", None),
            r"several .* choose one IntField by --labels: it has .*fine \(IntField\), weight \(FloatField\)",
        ),
        (Keys("one", "weight"), "several fields may be meant; choose one IntField by --labels"),
    ):
        with pytest.raises(UserError, match=f"a.beton: {told}"):
            open_source("beton", path, "train", keys)
    for fields, told in (
        ({"image": "image", "label": "bytes"}, r"no IntField, which labels must be; it has .* label \(BytesField\)"),
        ({"x": "bytes", "label": "int"}, "no RGBImageField, which images must be"),
        ({"image": "image", "label": "own"}, "a field 'label' of a type that is not FFCV's own"),
    ):
        path = str(write(tmp_path / "b.beton", fields, [0, 1, 0, 1]))
        with pytest.raises(UserError, match=told):
            open_source("beton", path, "train")


def test_damaged_files(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.beton", {"image": "image", "label": "int"}, [0, 1, 0, 1]).read_bytes()
    (tmp_path / "b.beton").write_bytes(whole[:3000])
    (tmp_path / "c.beton").write_bytes(whole[:-24])
    (tmp_path / "d.beton").write_bytes(whole[:START] + whole[-96:])
    (tmp_path / "e.beton").write_bytes(b"")
    for name in "bcde":
        with pytest.raises(UserError, match=rf"{name}.beton: not a whole .beton file"):
            open_source("beton", str(tmp_path / f"{name}.beton"), "train")
    jpeg = write(tmp_path / "train.beton", {"image": "image", "label": "int"}, [0, 1, 0, 1], (2,))
    jpeg.write_bytes(jpeg.read_bytes().replace(b"\xff\xd8", b"\0\0"))
    source = open_source("beton", str(tmp_path / "train.beton"), "train")
    assert source[0][0].shape == PICTURES[0].shape
    with pytest.raises(UserError, match=r"train.beton: image 2 is a damaged JPEG"):
        source[2]


def test_splits_share_their_classes(tmp_path: Path) -> None:
    for name, labels in (("train", [0, 4, 2, 1]), ("val", [0, 1, 1, 0])):
        write(tmp_path / f"{name}.beton", {"image": "image", "label": "int"}, labels)
    assert source_splits("beton", str(tmp_path)) == ["train", "val"]
    source = open_source("beton", str(tmp_path), "val")
    assert len(source.classes) == 5 and "classes without an image in val: 2, 4" in source.notes
