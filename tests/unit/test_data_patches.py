"""Patches of one photograph as a data set."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_defend.cli import main
from dist_defend.data.patches import NUM_PATCHES, SIDE, PatchSource, open_photographs
from dist_defend.data.sources import open_source, source_splits
from dist_defend.data.store import open_dataset
from dist_defend.errors import UserError


def photograph(path: Path, seed: int = 0, size: tuple[int, int] = (160, 200), red: bool = False) -> Path:
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    if red:
        noise[..., 1:] = 0
    Image.fromarray(noise).save(path)
    return path


def test_patches_are_the_same_every_time_and_unlike_each_other(tmp_path: Path) -> None:
    path = str(photograph(tmp_path / "photo.png"))
    source, again = (open_source("one_image", path, "train") for _ in range(2))
    assert len(source) == NUM_PATCHES and source_splits("one_image", path) == ["train"]
    patches = [source[row] for row in range(6)]
    assert {label for _, label in patches} == {-1}
    assert all(patch.shape == (SIDE, SIDE, 3) and patch.dtype == np.uint8 for patch, _ in patches)
    assert all(np.array_equal(again[row][0], patch) for row, (patch, _) in enumerate(patches))
    assert len({patch.tobytes() for patch, _ in patches}) == 6


def test_a_folders_photographs_take_turns(tmp_path: Path) -> None:
    photograph(tmp_path / "b.png")
    photograph(tmp_path / "a.png", red=True)
    source = open_source("one_image", str(tmp_path), "train")
    green = [source[row][0][..., 1].mean() for row in range(6)]
    assert max(green[::2]) < min(green[1::2])


def test_small_parts_are_enlarged_and_large_ones_shrunk() -> None:
    """A checkerboard of single pixels: the area shares 1/500 to 1 of the window give smooth and busy patches."""
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    source = PatchSource([Image.fromarray(np.repeat(board[..., None], 3, axis=2))])
    busy = [np.abs(np.diff(source[row][0][:, :, 0].astype(int), axis=1)).mean() for row in range(40)]
    assert max(busy) > 3 * min(busy)


def test_prepared_at_the_size_asked_for(tmp_path: Path) -> None:
    path = photograph(tmp_path / "photo.png")
    out = tmp_path / "patches"
    command = ["data", "prepare", "one_image", "--path", str(path), "--out", str(out), "--image-size", "24"]
    assert main([*command, "--max-samples", "9"]) == 0
    data = open_dataset(out / "train")
    assert (len(data), data.image_shape, set(data.labels)) == (9, (24, 24, 3), {-1})


def test_without_a_path_there_are_scikit_learns_photographs() -> None:
    assert [picture.size for picture in open_photographs(None)[0]] == [(640, 427)] * 2


@pytest.mark.parametrize(
    ("name", "told"),
    [("nowhere", "no such file"), ("empty", "no picture"), ("text.png", "not a picture"), ("small.png", "40x30 px")],
)
def test_what_is_no_photograph_costs_one_line(name: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no")
    photograph(tmp_path / "small.png", size=(30, 40))
    with pytest.raises(UserError, match=told) as caught:
        open_source("one_image", str(tmp_path / name), "train")
    assert "\n" not in str(caught.value)
