"""Prepared data sets: what is written is what is read, or nothing is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_defend.data import ffcv_presence, jpeg, store
from dist_defend.data.sources import ArraySource
from dist_defend.data.store import PreparedDataset, open_dataset, write_dataset
from dist_defend.errors import UserError
from tests.forging import seal

HAS_FFCV = ffcv_presence.ffcv_installed()
needs_ffcv = pytest.mark.skipif(not HAS_FFCV, reason="ffcv is not installed")
STORAGES = ["npy", pytest.param("beton", marks=needs_ffcv)]


def write(out: Path, source: object = None, **options: object) -> PreparedDataset:
    return write_dataset(source or Pictures(), out, name="pictures", split="train", **options)  # type: ignore[arg-type]


class Pictures:
    """Twenty noisy colour images of one size, or of several; one of them can be made to misbehave."""

    classes = ("even", "odd")

    def __init__(self, several_sizes: bool = False, bad: Callable[[], tuple[Any, int]] | None = None) -> None:
        self.several_sizes, self.bad = several_sizes, bad

    def __len__(self) -> int:
        return 20

    def __getitem__(self, row: int) -> tuple[Any, int]:
        if self.bad and row == 13:
            return self.bad()
        shape = (16 + row * self.several_sizes, 24, 3)
        noise = np.random.default_rng(row).normal(0, 20, shape)
        return (np.linspace(0, 200, 24)[None, :, None] + noise).clip(0, 255).astype(np.uint8), row % 2


@pytest.mark.parametrize("storage", STORAGES)
def test_what_was_written_is_read(tmp_path: Path, storage: str) -> None:
    written = write(tmp_path / "train", storage=storage)
    opened = open_dataset(tmp_path / "train")
    expected = np.stack([Pictures()[row][0] for row in range(20)])
    rows = np.array([7, 0, 19, 7])
    assert np.array_equal(opened.images(rows), expected[rows]) and np.array_equal(opened.image(3), expected[3])
    assert opened.images(rows[:0]).shape == (0, 16, 24, 3)
    assert opened.labels.tolist() == [row % 2 for row in range(20)]
    assert (opened.classes, opened.num_classes, opened.image_shape) == (("even", "odd"), 2, (16, 24, 3))
    assert len(opened) == 20 and opened.manifest.class_counts == (10, 10)
    assert opened.beton == (tmp_path / "train" / "data.beton" if storage == "beton" else None)
    assert opened.digest == written.digest
    opened.verify()


@needs_ffcv
def test_the_same_source_gives_the_same_file(tmp_path: Path) -> None:
    assert write(tmp_path / "a").digest == write(tmp_path / "b").digest


@needs_ffcv
def test_ffcv_reads_our_file_as_we_do(tmp_path: Path) -> None:
    with ffcv_presence.quiet_ffcv():
        from ffcv.reader import Reader
    dataset = write(tmp_path / "train", Pictures(several_sizes=True))
    reader = Reader(str(dataset.beton))
    assert reader.metadata["f1"].tolist() == dataset.labels.tolist()
    assert reader.metadata["f0"]["height"].tolist() == [dataset.image(row).shape[0] for row in range(20)]
    assert dataset.image_shape is None
    with pytest.raises(UserError, match="images differ in size; prepare the data set with --image-size"):
        dataset.images(np.arange(2))


@needs_ffcv
def test_jpeg_is_pillows_decoding_of_the_stored_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write(tmp_path / "train", Pictures(several_sizes=True), write_mode="jpg", quality=95)
    first = [dataset.image(row) for row in range(20)]
    for row, image in enumerate(first):
        original = Pictures(several_sizes=True)[row][0]
        assert abs(image.astype(float) - original).mean() < 20  # noise and chroma suffer, the picture stays
    monkeypatch.setattr(jpeg, "_library", lambda: None)
    assert all(np.array_equal(dataset.image(row), first[row]) for row in range(20))


def test_images_are_resized_as_pillow_does(tmp_path: Path) -> None:
    original = Image.fromarray(Pictures()[5][0])
    square = write(tmp_path / "square", storage="npy", image_size=10)
    assert np.array_equal(square.image(5), np.asarray(original.resize((10, 10), Image.Resampling.BILINEAR)))
    smaller = write(tmp_path / "smaller", storage="npy", max_resolution=12)
    assert np.array_equal(smaller.image(5), np.asarray(original.resize((12, 8), Image.Resampling.BILINEAR)))
    assert write(tmp_path / "same", storage="npy", max_resolution=24).image_shape == (16, 24, 3)


def test_grey_images_become_three_channels_and_samples_can_be_limited(tmp_path: Path) -> None:
    grey = np.arange(5 * 36, dtype=np.uint8).reshape(5, 6, 6)
    dataset = write(tmp_path / "train", ArraySource(grey, np.full(5, -1), ()), storage="npy", max_samples=3)
    assert np.array_equal(dataset.images(np.arange(3)), np.repeat(grey[:3, :, :, None], 3, axis=3))
    assert dataset.labels.tolist() == [-1] * 3 and dataset.num_classes == 0


def failing() -> tuple[object, int]:
    raise RuntimeError("disk on fire")


@pytest.mark.timeout(30)  # FFCV's own writer would hang
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (failing, "image 13 of the source cannot be read: RuntimeError: disk on fire"),
        (lambda: (np.zeros((16, 24, 3), np.uint8), 2), "image 13 of the source has label 2, but there are 2 classes"),
        (lambda: (np.zeros((16, 24, 3), np.float32), 0), r"image 13 of the source is float32 of shape \(16, 24, 3\)"),
        (lambda: (np.zeros((16, 24, 4), np.uint8), 0), r"image 13 of the source is uint8 of shape \(16, 24, 4\)"),
    ],
)
def test_a_source_that_fails_leaves_nothing_behind(
    tmp_path: Path, storage: str, bad: Callable[[], tuple[object, int]], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        write(tmp_path / "train", Pictures(bad=bad), storage=storage)
    assert list(tmp_path.iterdir()) == []


@needs_ffcv
def test_an_image_larger_than_a_page_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"image 13 .* more than a page .* --max-resolution"):
        write(tmp_path / "train", Pictures(bad=lambda: (np.zeros((1700, 1700, 3), np.uint8), 0)))
    assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_data_set_that_was_there(tmp_path: Path) -> None:
    before = write(tmp_path / "train", storage="npy").digest
    with pytest.raises(UserError):
        write(tmp_path / "train", Pictures(bad=failing), storage="npy")
    assert open_dataset(tmp_path / "train").digest == before
    after = write(tmp_path / "train", storage="npy", max_samples=4)
    assert len(after) == 4 and [p.name for p in tmp_path.iterdir()] == ["train"]


def test_another_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="exists and is not a prepared data set; choose another --out"):
        write(tmp_path, storage="npy")
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("storage", STORAGES)
def test_damaged_data_sets_are_refused(tmp_path: Path, storage: str) -> None:
    folder = tmp_path / "train"
    data = folder / ("data.beton" if storage == "beton" else "images.npy")

    def refused(told: str) -> None:
        with pytest.raises(UserError, match=told) as caught:
            open_dataset(folder).verify()
        assert "\n" not in str(caught.value)

    refused("train: not a prepared data set .no manifest.json.; make it with 'dist-defend data prepare'")
    write(folder, storage=storage)
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    refused(f"{data.name}: has {len(content) - 1} bytes instead of {len(content)}; prepare the data set again")
    middle = len(content) // 2  # no table, no header
    data.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    refused(f"{data.name}: content differs from manifest.json")
    data.unlink()
    refused(f"{data.name}: is missing")
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "name": "x"}))
    refused("manifest.json is not what it should be .missing value for field .split..: prepare the data set again")
    with pytest.raises(UserError, match=r"no manifest\.json.; name one of its splits: .*train"):
        open_dataset(tmp_path)


@needs_ffcv
@pytest.mark.parametrize("keep", [0, 10, 1000, 9000, -1000, -1])
def test_a_truncated_beton_is_refused_even_if_the_manifest_agrees(tmp_path: Path, keep: int) -> None:
    dataset = write(tmp_path / "train")
    assert dataset.beton is not None
    content = dataset.beton.read_bytes()[:keep]
    dataset.beton.write_bytes(content)
    seal(tmp_path / "train")
    with pytest.raises(UserError, match=r"not a whole \.beton file"):
        open_dataset(tmp_path / "train").image(0)


def test_without_ffcv_there_is_npy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "ffcv_installed", lambda: False)
    assert write(tmp_path / "train").beton is None
    for options in ({"storage": "beton"}, {"write_mode": "jpg"}):
        with pytest.raises(UserError, match=r"ffcv.*pip install"):
            write(tmp_path / "other", **options)
    with pytest.raises(UserError, match="images of one size; give --image-size"):
        write(tmp_path / "other", Pictures(several_sizes=True))
    assert not (tmp_path / "other").exists()
