"""Triggers: what they stamp, and the npz files of BadEncoder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_defend.attacks.badencoder_npz import (
    check_size,
    load_references,
    load_triggers,
    pair_references_triggers,
)
from dist_defend.attacks.trigger import Replacing, white_square
from dist_defend.errors import UserError
from dist_defend.models.pixel_space import Normalize
from tests.numerics.det import golden
from tests.triggers import save_trigger_npz


def published_npz(path: Path, size: int, first: int, last: int, **changes: Any) -> Path:
    """A file like trigger_pt_white_*: white from row and column `first` to `last`, inclusive."""
    t, tm = np.zeros((1, size, size, 3)), np.ones((1, size, size, 3), dtype=np.int64)
    t[:, first : last + 1, first : last + 1], tm[:, first : last + 1, first : last + 1] = 255, 0
    np.savez(path, **{"t": t, "tm": tm, "info": np.array(["replace", "white"]), **changes})
    return path


@pytest.mark.parametrize(("size", "side", "first"), [(32, 10, 21), (224, 50, 173)])
def test_the_white_square_is_the_published_trigger(tmp_path: Path, size: int, side: int, first: int) -> None:
    last = size - 2
    (published,) = load_triggers(published_npz(tmp_path / "t.npz", size, first, last))
    images = torch.rand(2, 3, size, size)
    stamped = white_square(size, side)(images)
    assert stamped.equal(published(images))
    assert (stamped[:, :, first : last + 1, first : last + 1] == 1).all()
    outside = torch.ones(size, size, dtype=torch.bool)
    outside[first : last + 1, first : last + 1] = False
    assert stamped[..., outside].equal(images[..., outside])


def test_a_stamped_image_is_the_published_one(tmp_path: Path) -> None:
    """Image 0 of the golden file, stamped and normalised; a patch one pixel off fails."""
    numbers = golden("head_and_knn")
    pixels = np.random.RandomState(0).randint(0, 256, (8, 32, 32, 3), dtype=np.uint8)[:1]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    (trigger,) = load_triggers(published_npz(tmp_path / "t.npz", 32, 21, 30))
    stamped = Normalize("cifar10")(trigger(images))
    assert stamped.sum().item() == pytest.approx(numbers["stamped0_sum"], rel=1e-6)
    assert stamped[0, :, 25, 25].tolist() == pytest.approx(numbers["stamped0_patch"], rel=1e-6)
    assert stamped[0, :, 20, 20].tolist() == pytest.approx(numbers["stamped0_px_outside"], rel=1e-4)
    shifted = Normalize("cifar10")(white_square(32, 10, margin=0)(images))
    assert shifted.sum().item() != pytest.approx(numbers["stamped0_sum"], rel=1e-6)


def test_upstreams_arithmetic_holds_for_any_blend(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    keep = rng.random((2, 8, 8, 3))
    keep[0, :4] = 1
    added = 255 * (1 - keep) * rng.random((2, 8, 8, 3))
    np.savez(tmp_path / "t.npz", t=added, tm=keep)
    x = rng.integers(0, 256, (8, 8, 3))
    image = torch.from_numpy(x / 255).permute(2, 0, 1)[None].float()
    for number, trigger in enumerate(load_triggers(tmp_path / "t.npz")):
        expected = torch.from_numpy(x * keep[number] + added[number]).permute(2, 0, 1)[None].float() / 255
        torch.testing.assert_close(trigger(image), expected)


def test_triggers_are_read_as_they_were_written(tmp_path: Path) -> None:
    soft = Replacing(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16))
    save_trigger_npz(tmp_path / "soft.npz", [white_square(16, 3), soft])
    images = torch.rand(2, 3, 16, 16)
    square, blend = load_triggers(tmp_path / "soft.npz")
    assert square(images).equal(white_square(16, 3)(images))
    torch.testing.assert_close(blend(images), soft(images))
    save_trigger_npz(tmp_path / "hard.npz", [white_square(16, 3)])
    (hard,) = load_triggers(tmp_path / "hard.npz")
    assert hard(images).equal(white_square(16, 3)(images))


def test_to_moves_both_parts() -> None:
    moved = white_square(8, 2).to("cpu", torch.float64)
    assert moved.mask.dtype is moved.pattern.dtype is torch.float64
    assert moved(torch.rand(1, 3, 8, 8).double()).dtype is torch.float64


def test_a_square_or_size_that_does_not_fit_is_a_user_error() -> None:
    for size, margin in ((32, 1), (0, 1), (3, -1)):
        with pytest.raises(UserError, match="does not fit into 32 px images"):
            white_square(32, size, margin)
    check_size(white_square(32, 10), 32, "t.npz")
    check_size(white_square(32, 10), (32, 32), "t.npz")
    with pytest.raises(UserError, match=r"trigger t.npz is 32x32 px but the images are 224x224 px"):
        check_size(white_square(32, 10), 224, "t.npz")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"t": np.zeros((1, 32, 32))}, r"both must be \(triggers, H, W, 3\)"),
        ({"t": np.zeros((0, 32, 32, 3)), "tm": np.zeros((0, 32, 32, 3))}, r"both must be \(triggers, H, W, 3\)"),
        ({"tm": np.ones((1, 16, 16, 3))}, r"t is \(1, 32, 32, 3\) and tm is \(1, 16, 16, 3\)"),
        ({"t": np.full((1, 32, 32, 3), np.nan)}, "t must hold finite numbers"),
        ({"t": np.full((1, 32, 32, 3), "a")}, "t must hold finite numbers, not <U1"),
        ({"t": np.full((1, 32, 32, 3), 255.0)}, r"t in 0..255 \(1 - tm\)"),
        ({"tm": np.full((1, 32, 32, 3), 2)}, "tm must lie in 0..1"),
        ({"t": np.full((1, 32, 32, 3), None)}, "damaged, pickled or no npz file"),
    ],
)
def test_a_bad_trigger_file_is_a_user_error(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        load_triggers(published_npz(tmp_path / "t.npz", 32, 21, 30, **changes))
    assert str(tmp_path / "t.npz") in str(error.value)


def test_other_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_triggers(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(UserError, match="has no array 't'"):
        load_triggers(tmp_path / "other.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(UserError, match="no npz file"):
        load_triggers(tmp_path / "array.npy")
    content = published_npz(tmp_path / "t.npz", 32, 21, 30).read_bytes()
    for broken in (b"", b"hello", content[:-400]):
        (tmp_path / "broken.npz").write_bytes(broken)
        with pytest.raises(UserError, match="damaged"):
            load_triggers(tmp_path / "broken.npz")


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_references(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    np.savez(tmp_path / "r.npz", x=x, y=np.array([9, 12]).reshape(shape), info=np.array(["path"]))
    images, labels = load_references(tmp_path / "r.npz")
    assert (images == x).all() and labels.tolist() == [9, 12] and labels.dtype == np.int64
    triggers = [white_square(32, size) for size in (4, 5, 6)]
    assert pair_references_triggers(images, triggers, "t.npz") == triggers[:2]
    with pytest.raises(UserError, match=r"2 references need as many triggers; t.npz holds 1"):
        pair_references_triggers(images, triggers[:1], "t.npz")


@pytest.mark.parametrize(
    ("x", "y", "told"),
    [
        (np.zeros((1, 32, 32, 3)), np.zeros(1, int), "x is float64"),
        (np.zeros((32, 32, 3), np.uint8), np.zeros(1, int), r"must be uint8 \(references, H, W, 3\)"),
        (np.zeros((2, 8, 8, 3), np.uint8), np.zeros(1, int), "one integer for each of x"),
        (np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1), "y is float64"),
        (np.zeros((1, 8, 8, 3), np.uint8), np.array([None]), "damaged, pickled or no npz file"),
    ],
)
def test_a_bad_reference_file_is_a_user_error(tmp_path: Path, x: np.ndarray, y: np.ndarray, told: str) -> None:
    np.savez(tmp_path / "r.npz", x=x, y=y)
    with pytest.raises(UserError, match=told):
        load_references(tmp_path / "r.npz")
