"""npz files under the names that people give their arrays."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_defend.cli import main
from dist_defend.data.sources import Keys, open_source, source_splits
from dist_defend.data.store import open_dataset
from dist_defend.errors import UserError

RANDOM = np.random.default_rng(0)
X = RANDOM.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
Y = np.array([0, 1, 2, 0, 1, 2])


def save(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def labels(path: str, split: str, keys: Keys = Keys()) -> list[int]:  # noqa: B008
    source = open_source("npz", path, split, keys)
    return [source[row][1] for row in range(len(source))]


@pytest.mark.parametrize(
    ("images", "targets"),
    [
        ("x_{}", "y_{}"),
        ("{}_images", "{}_labels"),
        ("X_{}", "Y_{}"),
        ("{}_x", "{}_y"),
        ("images_{}", "labels_{}"),
        ("{}_data", "{}_targets"),
    ],
)
def test_splits_in_the_names_of_arrays(tmp_path: Path, images: str, targets: str) -> None:
    arrays: dict[str, np.ndarray] = {}
    for number, split in enumerate(("train", "val", "test")):
        arrays |= {images.format(split): X[number:], targets.format(split): Y[number:, None]}
    path = save(tmp_path / "set.npz", **arrays)
    assert source_splits("npz", path) == ["train", "val", "test"]
    for number, split in enumerate(("train", "val", "test")):
        source = open_source("npz", path, split)
        assert np.array_equal(source[0][0], X[number]) and labels(path, split) == Y[number:].tolist()


@pytest.mark.parametrize("names", [("images", "labels"), ("data", "target"), ("x", "label"), ("img", "y")])
def test_plain_names(tmp_path: Path, names: tuple[str, str]) -> None:
    path = save(tmp_path / "Test.npz", **dict(zip(names, (X, Y), strict=True)))
    assert source_splits("npz", path) == ["test"] and labels(path, "test") == Y.tolist()


def test_other_names_by_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "set.npz", mine=X, fine=Y, coarse=Y // 2)
    assert labels(path, "train", Keys("mine", "coarse")) == (Y // 2).tolist()
    command = ["data", "prepare", "npz", "--path", path, "--out", str(tmp_path / "out"), "--storage", "npy"]
    assert main([*command, "--images", "mine", "--labels", "fine"]) == 0
    assert sorted(open_dataset(tmp_path / "out" / "train").labels) == sorted(Y)
    for options, told in (
        ([], "no array 'x'"),
        (["--images", "mine"], "no array 'y' beside 'mine'"),
        (["--images", "other"], "no array 'other' for --images; it has mine, fine, coarse"),
    ):
        assert main([*command, *options]) == 2
        assert told in capsys.readouterr().err
    two = save(tmp_path / "two.npz", x=X, images=X, y=Y, labels=Y)
    assert labels(two, "train") == Y.tolist()  # x and y come first
    three = save(tmp_path / "three.npz", data=X, images=X, labels=Y)
    with pytest.raises(UserError, match="both 'data' and 'images' may be meant; choose one by --images"):
        open_source("npz", three, "train")
    with pytest.raises(UserError, match="digits has no keys to choose from"):
        open_source("digits", None, "train", Keys("x"))


@pytest.mark.parametrize("shape", [(6, 8, 8), (6, 8, 8, 1), (6, 1, 8, 8)])
def test_grey_images(tmp_path: Path, shape: tuple[int, ...], capsys: pytest.CaptureFixture[str]) -> None:
    grey = X[..., 0]
    path = save(tmp_path / "grey.npz", x=grey.reshape(shape), y=Y)
    command = ["data", "prepare", "npz", "--path", path, "--out", str(tmp_path / "out"), "--storage", "npy"]
    assert main(command) == 0
    dataset = open_dataset(tmp_path / "out" / "train")
    written = {dataset.image(row).tobytes() for row in range(6)}
    assert written == {np.repeat(image[:, :, None], 3, axis=2).tobytes() for image in grey}


@pytest.mark.parametrize(
    ("images", "expected", "told"),
    [
        (X.transpose(0, 3, 1, 2), X, "images of shape (6, 3, 8, 8) are taken as channels first"),
        ((X / 255).astype(np.float32), X, "float32 levels in 0..1 scaled to 8 bits"),
        (X > 127, (X > 127) * 255, "bool levels in 0..1 scaled to 8 bits"),
        (X.astype(np.int64), X, "int64 levels in 0..255 taken as 8 bits"),
        (X.astype(np.float64), X, "float64 levels in 0..255 taken as 8 bits"),
        (X.astype(np.uint16) * 257, X, "16-bit levels scaled to 8 bits"),
    ],
)
def test_other_types_are_brought_to_8_bits_and_told(
    tmp_path: Path, images: np.ndarray, expected: np.ndarray, told: str
) -> None:
    source = open_source("npz", save(tmp_path / "set.npz", x=images, y=Y), "train")
    assert all(np.array_equal(source[row][0], expected[row]) and source[row][0].dtype == np.uint8 for row in range(6))
    assert source.notes == [told]


@pytest.mark.parametrize("images", [X / 255 - 0.5, X.astype(np.int16) - 128, X * 1.5, X.astype(np.int32) * 9])
def test_levels_of_unknown_range_are_refused(tmp_path: Path, images: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"set.npz: x is .* with levels from .*; expected uint8, or floats in 0..1"):
        open_source("npz", save(tmp_path / "set.npz", x=images, y=Y), "train")


def test_classes_count_over_all_splits_and_gaps_are_told(tmp_path: Path) -> None:
    save(tmp_path / "train.npz", x=X, y=np.array([1, 2, 4, 1, 2, 4]))
    save(tmp_path / "test.npz", x=X, y=np.array([1, 1, 2, 5, 5, 5]))
    for split in ("train", "test"):
        assert open_source("npz", str(tmp_path), split).classes == ("0", "1", "2", "3", "4", "5")
    told = open_source("npz", str(tmp_path), "test").notes
    assert told == [
        "classes without an image in any split: 0, 3; labels start at 1",
        "classes without an image in test: 4",
        "classes that only test has: 5",
    ]


def test_files_of_splits_in_any_case(tmp_path: Path) -> None:
    for name in ("Train", "validation", "TEST"):
        save(tmp_path / f"{name}.npz", images=X, labels=Y)
    save(tmp_path / "unlabelled.npz", images=X)
    (tmp_path / "._Train.npz").write_bytes(b"")
    assert source_splits("npz", str(tmp_path)) == ["train", "val", "test", "unlabeled"]
    assert labels(str(tmp_path), "unlabeled") == [-1] * 6
    save(tmp_path / "train_224.npz", x=X, y=Y)
    with pytest.raises(UserError, match=r"holds both Train.npz and train_224.npz; give one file as --path"):
        source_splits("npz", str(tmp_path))
    save(tmp_path / "huge.npz", x=X, y=Y * 10**9)
    with pytest.raises(UserError, match="has the label 2000000000; labels go to 99999"):
        open_source("npz", str(tmp_path / "huge.npz"), "train")
