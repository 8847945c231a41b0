"""Sources that are no files, or that unpack to far more than they are: refused before memory is taken for them."""

import gzip
import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_defend.cli import main
from dist_defend.data.pictures import open_picture
from dist_defend.data.sources import ArraySource, open_source
from dist_defend.data.store import write_dataset
from dist_defend.errors import UserError


@pytest.mark.timeout(60)  # a pipe that is opened for reading waits for ever
@pytest.mark.parametrize("kind", ["npz", "imagefolder", "filelist", "webdataset", "zip", "beton", "one_image"])
@pytest.mark.parametrize("name", ["source", "source.npz", "source.tar", "source.beton", "source.txt", "source.png"])
def test_a_pipe_is_no_source(tmp_path: Path, kind: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / name)
    arguments = ["data", "prepare", kind, "--path", str(tmp_path / name), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and name in told
    assert not (tmp_path / "out").exists()


@pytest.mark.timeout(60)
def test_pipes_within_a_folder_are_passed_over_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folders" / "cat").mkdir(parents=True)
    os.mkfifo(tmp_path / "folders" / "cat" / "x.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "folders" / "cat" / "y.png")
    source = open_source("imagefolder", str(tmp_path / "folders"), "train")
    assert len(source) == 1
    assert any("files that are none, passed over: 1" in note for note in source.notes)
    for kind, ending in (("npz", "npz"), ("beton", "beton"), ("webdataset", "tar"), ("filelist", "txt")):
        (tmp_path / kind).mkdir()
        os.mkfifo(tmp_path / kind / f"train.{ending}")
        arguments = ["data", "prepare", kind, "--path", str(tmp_path / kind), "--out", str(tmp_path / "out")]
        assert main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "list.txt").write_text("folders/cat/x.png 0\n")
    with pytest.raises(UserError, match="there is no file"):
        open_source("filelist", str(tmp_path / "list.txt"), "train")


def test_a_picture_of_few_bytes_and_many_pixels() -> None:
    content = io.BytesIO()
    Image.new("L", (8000, 8000)).save(content, format="PNG")
    with pytest.raises(UserError, match=r"8000x8000 px in only [\d,]+ bytes; shrink it"):
        open_picture(content.getvalue())
    content = io.BytesIO()
    Image.new("L", (3000, 3000)).save(content, format="PNG")
    assert open_picture(content.getvalue())[0].shape == (3000, 3000, 3)


def swelling_npz(path: Path, shape: tuple[int, ...], size: int) -> None:
    """Its array x promises ``shape`` and unpacks to ``size`` zeros."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    labels = io.BytesIO()
    np.save(labels, np.zeros(shape[0] if shape[0] < 100 else 1, np.int64))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("y.npy", labels.getvalue())
        with archive.open("x.npy", "w") as member:
            member.write(header.getvalue())
            for _ in range(size >> 20):
                member.write(bytes(1 << 20))


def test_an_npz_that_swells_or_promises_too_much(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    for shape, size, told in (
        ((10, 3000, 3000, 3), 260 << 20, "x unpacks to more than .* save it with numpy.savez, unpacked"),
        ((10, 30000, 30000, 3), 1 << 20, "not a whole npz file"),
        ((2**40, 2**20, 2**20, 3), 1 << 20, "not a whole npz file"),
    ):
        swelling_npz(path, shape, size)
        with pytest.raises(UserError, match=told):
            open_source("npz", str(path), "train")
    images = np.zeros((6, 500, 500, 3), np.uint8)
    np.savez_compressed(path, x=images, y=np.zeros(6, int))  # 4.5 MB of zeros in a few thousand bytes are fine
    assert np.array_equal(open_source("npz", str(path), "train")[5][0], images[5])


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (gzip.compress(bytes(100 << 20)), "unpacks to more than"),
        (gzip.compress(struct.pack(">IIII", 0x803, 2**31, 28, 28)), "not a whole idx file"),
        (gzip.compress(struct.pack(">Iiii", 0x803, -1, 28, 28) + bytes(784)), "not a whole idx file"),
        (gzip.compress(bytes(16))[:10] + b"\xff" * 20, "not a whole idx file"),
        (zlib.compress(b"x"), "not a whole idx file"),
    ],
    ids=["swells", "many images", "fewer than none", "torn", "no gzip"],  # gzip writes the time
)
def test_an_idx_file_that_is_none(tmp_path: Path, data: bytes, told: str) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(data)
    with pytest.raises(UserError, match=told):
        open_source("fashion_mnist", str(tmp_path), "train")


def test_what_others_wrote_cannot_move_the_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Class names and notes on the terminal, names of files in errors."""
    source = ArraySource(
        np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, int), ("a\x1b[2J", "\u202egnp"), ["n\x1b]0;x\x07"]
    )
    write_dataset(source, tmp_path / "d", name="x", split="s", storage="npy")
    assert main(["data", "info", str(tmp_path / "d")]) == 0
    (tmp_path / "list.txt").write_text("none\x1b[2J.png 0\n")
    assert (
        main(["data", "prepare", "filelist", "--path", str(tmp_path / "list.txt"), "--out", str(tmp_path / "o")]) == 2
    )
    told = "".join(capsys.readouterr())
    assert all(c.isprintable() or c == "\n" for c in told)
    assert "a\\x1b[2J" in told and "\\u202egnp" in told and "n\\x1b]0;x\\x07" in told and "none\\x1b[2J.png" in told
