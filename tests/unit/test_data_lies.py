"""Prepared data sets whose files lie, under a manifest that vouches for them: refused by one line before any work."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dist_defend.data.beton import IMAGE_FIELD
from dist_defend.data.ffcv_presence import ffcv_installed
from dist_defend.data.store import PreparedDataset, open_dataset, write_dataset
from dist_defend.errors import UserError
from tests.forging import seal
from tests.runs import make_data, make_experiment, options_of

needs_ffcv = pytest.mark.skipif(not ffcv_installed(), reason="only ffcv writes .beton")
COUNT, SIDE = 6, 16
# A .beton of two fields: a header of 24 bytes, two descriptions of 1,041, then a row per image of 19 bytes that are
# followed by five of padding and an int64 label, which begin at a multiple of 8.
_ROW = np.dtype([("image", IMAGE_FIELD), ("label", "<i8")], align=True)
_ROWS = 24 + 2 * 1041
_ALLOCATION = np.dtype([("sample", "<u8"), ("address", "<u8"), ("size", "<u8")])


def forge_beton(folder: Path, change: Callable[[np.ndarray, np.ndarray, np.ndarray], None]) -> None:
    """``change`` gets the bytes of data.beton, its rows and its allocation table, all in place."""
    path = folder / "data.beton"
    data = np.fromfile(path, np.uint8)
    rows = data[_ROWS : _ROWS + COUNT * _ROW.itemsize].view(_ROW)
    start = int(data[16:24].view("<u8")[0])
    table = data[start:].view(_ALLOCATION)
    assert rows["label"].tolist() == [0, 1, 2] * 2 and len(table) == COUNT  # the layout is what this test thinks
    change(data, rows, table)
    path.write_bytes(data.tobytes())
    seal(folder)


def put(column: str, value: int) -> Callable[[np.ndarray, np.ndarray, np.ndarray], None]:
    def change(data: np.ndarray, rows: np.ndarray, table: np.ndarray) -> None:
        rows["image"][column][3] = value

    return change


def put_all(column: str, value: int) -> Callable[[np.ndarray, np.ndarray, np.ndarray], None]:
    def change(data: np.ndarray, rows: np.ndarray, table: np.ndarray) -> None:
        rows["image"][column] = value

    return change


def flat_and_wide(data: np.ndarray, rows: np.ndarray, table: np.ndarray) -> None:
    """As many bytes as before."""
    rows["image"]["height"], rows["image"]["width"] = SIDE // 2, SIDE * 2


def put_table(column: str, row: int, value: int) -> Callable[[np.ndarray, np.ndarray, np.ndarray], None]:
    def change(data: np.ndarray, rows: np.ndarray, table: np.ndarray) -> None:
        table[column][row] = value

    return change


def over_header(data: np.ndarray, rows: np.ndarray, table: np.ndarray) -> None:
    table["address"][0] = rows["image"]["data_ptr"][0] = 8


def over_table(data: np.ndarray, rows: np.ndarray, table: np.ndarray) -> None:
    table["address"][5] = rows["image"]["data_ptr"][5] = len(data) - 3 * SIDE * SIDE


def overflowing(data: np.ndarray, rows: np.ndarray, table: np.ndarray) -> None:
    """Address plus size is negative in 64 bits."""
    table["address"][5] = rows["image"]["data_ptr"][5] = 2**63 - 8
    table["size"][5] = 2**63 - 8


def one_image_for_all(data: np.ndarray, rows: np.ndarray, table: np.ndarray) -> None:
    rows["image"]["data_ptr"] = rows["image"]["data_ptr"][0]


def other_labels(data: np.ndarray, rows: np.ndarray, table: np.ndarray) -> None:
    rows["label"] = rows["label"][::-1]


def header(at: int, kind: str, value: int) -> Callable[[np.ndarray, np.ndarray, np.ndarray], None]:
    def change(data: np.ndarray, rows: np.ndarray, table: np.ndarray) -> None:
        data[at : at + np.dtype(kind).itemsize].view(kind)[0] = value

    return change


BETON_LIES = {
    "one image is enlarged": (put("height", 60000), "another size than their bytes"),
    "all images are enlarged": (put_all("height", 4000), "another size than their bytes"),
    "flat and wide": (flat_and_wide, "another size than manifest.json says"),
    "one image is smaller": (put("width", 1), "another size than manifest.json says"),
    "no height": (put("height", 0), "another size than their bytes"),
    "a pointer behind the end": (put("data_ptr", 2**40), "does not list"),
    "an address behind the end": (put_table("address", 2, 2**62), "does not list"),
    "a size behind the end": (put_table("size", 2, 2**40), "outside of the file"),
    "a size of 64 bits": (put_table("size", 2, 2**64 - 1), "outside of the file"),
    "a sum of more than 64 bits": (overflowing, "outside of the file"),
    "a larger size": (put_table("size", 2, 3 * SIDE * SIDE + 1), "over one another"),
    "an image in the header": (over_header, "over the header"),
    "an image in the table": (over_table, "over one another, over the header or over the table"),
    "one image for all": (one_image_for_all, "over one another"),
    "a JPEG": (put("mode", 0), "images that are not raw"),
    "a mode that there is not": (put("mode", 7), "another|not raw"),
    "other labels": (other_labels, "labels are not those of labels.npy"),
    "more images": (header(8, "<u8", COUNT + 1), "instead of 6"),
    "images without end": (header(8, "<u8", 2**62), "an end before"),
    "no images": (header(8, "<u8", 0), "0 images instead of 6"),
    "another version": (header(0, "<u2", 3), "another header"),
    "no fields": (header(2, "<u2", 0), "fields"),
    "no pages": (header(4, "<u4", 0), "pages of 0 bytes"),
    "a table elsewhere": (header(16, "<u8", 24), "list|table"),
    "a table behind the end": (header(16, "<u8", 2**63), "an end before"),
}  # fmt: skip


@needs_ffcv
@pytest.mark.parametrize("lie", BETON_LIES)
def test_a_beton_that_lies(tmp_path: Path, lie: str) -> None:
    make_data(tmp_path / "d", COUNT, storage="beton", size=SIDE)
    change, told = BETON_LIES[lie]
    forge_beton(tmp_path / "d", change)
    refused(tmp_path / "d", rf"data\.beton: .*({told})")


def refused(folder: Path, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        open_dataset(folder)
    assert str(caught.value).isprintable() and "prepare the data set again" in str(caught.value)


class Noise:
    """Six noisy images of sizes that grow."""

    classes = ("any",)

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        return np.random.default_rng(row).integers(0, 256, (16 + row, 20, 3), dtype=np.uint8), 0


@needs_ffcv
@pytest.mark.parametrize("library", ["turbojpeg", "pillow"])
def test_a_jpeg_of_another_size_than_its_table(tmp_path: Path, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_defend.data import jpeg, store

    if library == "pillow":
        monkeypatch.setattr(jpeg, "_library", lambda: None)
    for lie, told in (
        (None, None),
        (17, "size than their bytes"),
        (2700, "another size than"),
        (60000, "another size"),
    ):
        folder = tmp_path / str(lie)
        dataset = write_dataset(Noise(), folder, name="x", split="s", storage="beton", write_mode="jpg")
        assert open_dataset(folder).image(3).shape == (19, 20, 3)
        if lie is not None and told is not None:
            path = folder / "data.beton"
            data = bytearray(path.read_bytes())
            np.frombuffer(data, _ROW, COUNT, _ROWS)["image"]["height"][3] = lie
            path.write_bytes(data)
            seal(folder)
            refused(folder, told)
            monkeypatch.setattr(store, "check_contents", lambda *_: None)  # the decoder itself looks too
            with pytest.raises(UserError, match="row 3 of the data set is a damaged JPEG"):
                open_dataset(folder).image(3)
            monkeypatch.undo()
            if library == "pillow":
                monkeypatch.setattr(jpeg, "_library", lambda: None)
        assert isinstance(dataset, PreparedDataset)


def npy(name: str, array: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / name, array)


def key(**changes: object) -> Callable[[Path], None]:
    return lambda folder: seal(folder, **changes)


def raw(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def longer(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b"x")


def file_key(name: str, as_: str) -> Callable[[Path], None]:
    """The file goes by another name, in the folder and in the manifest."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        content["files"][as_] = content["files"].pop(name)
        (folder / "manifest.json").write_text(json.dumps(content))
        (folder / as_).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).rename(folder / as_)

    return change


_PIXELS = np.zeros((COUNT, SIDE, SIDE, 3), np.uint8)
_LABELS = np.arange(COUNT) % 3
NPY_LIES = {
    "one channel": (npy("images.npy", _PIXELS[..., :1]), "images.npy: holds uint8"),
    "two dimensions": (npy("images.npy", _PIXELS[..., 0]), "images.npy: holds uint8"),
    "fewer images": (npy("images.npy", _PIXELS[:2]), "images.npy: holds uint8"),
    "float images": (npy("images.npy", _PIXELS.astype(np.float32)), "images.npy: holds float32"),
    "columns first": (npy("images.npy", np.asfortranarray(_PIXELS)), "images.npy: holds uint8"),
    "objects": (npy("images.npy", np.array([None] * COUNT, dtype=object)), "images.npy: holds object"),
    "no array": (raw("images.npy", b"\x93NUMPY\x01\x00"), "images.npy: not a .npy file"),
    "an empty file": (raw("images.npy", b""), "images.npy: not a .npy file"),
    "more than an array": (longer("images.npy"), "images.npy: holds uint8"),
    "an archive": (raw("labels.npy", b"PK\x03\x04"), "labels.npy: not a .npy file"),
    "a label too high": (npy("labels.npy", _LABELS * 2), "labels.npy: has the label 4, but there are 3 classes"),
    "a label too low": (npy("labels.npy", _LABELS - 2), "labels.npy: has the label -2"),
    "labels of 32 bits": (npy("labels.npy", _LABELS.astype(np.int32)), "labels.npy: holds int32"),
    "labels of the other end": (npy("labels.npy", _LABELS.astype(">i8")), "labels.npy: holds >i8"),
    "labels as a table": (npy("labels.npy", _LABELS[:, None]), r"labels.npy: holds int64 of shape \(6, 1\)"),
    "fewer labels": (npy("labels.npy", _LABELS[:5]), "labels.npy: holds int64"),
    "other labels": (npy("labels.npy", np.zeros(COUNT, np.int64)), "not as many of each class"),
    "another size": (key(image_shape=[SIDE, SIDE + 1, 3]), "images.npy: holds"),
    "a huge size": (key(image_shape=[65535, 65535, 3]), "images.npy: holds"),
    "a size below zero": (key(image_shape=[-1, SIDE, 3]), "image_shape is"),
    "four channels": (key(image_shape=[SIDE, SIDE, 4]), "image_shape is"),
    "no size": (key(image_shape=None), "image_shape is null"),
    "no images": (key(num_samples=0), "num_samples is 0"),
    "fewer than none": (key(num_samples=-6), "num_samples is -6"),
    "a number of 100 digits": (key(num_samples=10**100), "not what it should be|holds"),
    "true for a number": (key(num_samples=True), "not what it should be"),
    "counts of other classes": (key(class_counts=[2, 2, 2, 0]), "differ in length"),
    "negative counts": (key(class_counts=[2, 5, -1]), "class count is negative"),
    "too many": (key(class_counts=[2, 2, 3]), "more than num_samples"),
    "JPEG in an array": (key(write_mode="jpg", quality=90), "do not fit one another"),
    "quality of raw": (key(quality=90), "do not fit one another"),
    "no such mode": (key(write_mode="smart"), "write_mode is 'smart'"),
    "quality": (key(write_mode="jpg", quality=101), "quality is 101"),
    "no resolution": (key(max_resolution=0), "max_resolution is 0"),
    "fewer rows in the source": (key(source_samples=5), "source_samples is 5"),
    "a seed below zero": (key(order_seed=-1), "order_seed is -1"),
    "an unknown key": (key(hue=1), "hue"),
    "a text for a list": (key(notes="ab"), "a text stands where a list belongs"),
    "another format": (key(format=2), "format 2 is another version's"),
    "a file outside": (file_key("images.npy", "../images.npy"), "the files that a data set has, and no other"),
    "a file below": (file_key("images.npy", "sub/images.npy"), "the files that a data set has, and no other"),
    "a file without a name": (file_key("labels.npy", "x"), "the files that a data set has, and no other"),
    "a key that comes twice": (
        lambda folder: (folder / "manifest.json").write_text('{"format": 1, "format": 1}') and None,
        "key 'format' comes twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", NPY_LIES)
def test_an_array_or_a_manifest_that_lies(tmp_path: Path, lie: str) -> None:
    folder = tmp_path / "d"
    make_data(folder, COUNT, size=SIDE)
    change, told = NPY_LIES[lie]
    change(folder)
    if told.startswith(("images.npy", "labels.npy", "not as many")) and "seal" not in str(change):
        seal(folder, **{k: v for k, v in json.loads((folder / "manifest.json").read_text()).items() if k != "files"})
    refused(folder, told)


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4, 4], [0, 1, 2, 3, 4, 6], [-1, 1, 2, 3, 4, 5]])
def test_an_order_that_lies(tmp_path: Path, rows: list[int]) -> None:
    write_dataset(Noise(), tmp_path / "d", name="x", split="s", storage="npy", image_size=8, order_seed=1)
    np.save(tmp_path / "d" / "order.npy", np.array(rows))
    seal(tmp_path / "d")
    refused(tmp_path / "d", r"order\.npy: does not name a row for each image")


@pytest.mark.parametrize("name", ["images.npy", "labels.npy", "manifest.json"])
@pytest.mark.parametrize("what", ["pipe", "loop", "folder", "device"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, name: str, what: str) -> None:
    make_data(tmp_path / "d", COUNT)
    path = tmp_path / "d" / name
    path.unlink()
    match what:
        case "pipe":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"is missing|not a regular file|no manifest\.json") as caught:
        open_dataset(tmp_path / "d")
    assert str(caught.value).isprintable()


def test_a_link_to_the_file_that_was_written_is_that_file(tmp_path: Path) -> None:
    before = open_dataset(make_data(tmp_path / "d", COUNT)).images(np.arange(COUNT))
    (tmp_path / "d" / "images.npy").rename(tmp_path / "store")
    (tmp_path / "d" / "images.npy").symlink_to(tmp_path / "store")
    assert np.array_equal(open_dataset(tmp_path / "d").images(np.arange(COUNT)), before)


@pytest.mark.parametrize("backend", [pytest.param("ffcv", marks=needs_ffcv), "torch", "resident"])
def test_a_run_refuses_what_would_end_in_a_signal(tmp_path: Path, backend: str) -> None:
    """A process of its own, as the fault that this guards against ends it."""
    storage = "beton" if ffcv_installed() else "npy"
    options = options_of("simclr", tmp_path) | {"data": {"path": make_data(tmp_path / "d", COUNT, storage=storage)}}
    config = make_experiment(tmp_path, "simclr", options, loader={"backend": backend, "workers": 1})
    if storage == "beton":
        forge_beton(tmp_path / "d", put_all("height", 4000))
    else:
        np.save(tmp_path / "d" / "images.npy", _PIXELS[..., :1])
        seal(tmp_path / "d")
    command = [sys.executable, "-m", "dist_defend", "run", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {tmp_path / 'd'}") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backend", ["torch", "resident"])
def test_a_run_refuses_images_of_one_channel(tmp_path: Path, backend: str) -> None:
    options = options_of("simclr", tmp_path)
    config = make_experiment(tmp_path, "simclr", options, loader={"backend": backend, "workers": 1})
    images = np.load(tmp_path / "data" / "images.npy")
    np.save(tmp_path / "data" / "images.npy", images[..., :1])
    seal(tmp_path / "data")
    command = [sys.executable, "-m", "dist_defend", "run", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "images.npy: holds uint8 of shape (24, 16, 16, 1); expected uint8 (24, 16, 16, 3)" in done.stderr
