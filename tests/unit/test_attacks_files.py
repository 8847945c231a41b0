"""Triggers from users' files: what they stamp, and one line for each way a file can be wrong."""

import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_defend.attacks.own_trigger import FromFile
from dist_defend.attacks.pattern_file import open_images, read_mask, read_pattern
from dist_defend.attacks.patterns import Blended, TrojanNN
from dist_defend.attacks.stamping import to_bytes, to_images
from dist_defend.errors import UserError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
LEVELS = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)
LEVELS[:8] = 0
WHOLE = PIXELS.astype(np.int64)


def stamp(config: Any) -> np.ndarray:
    return to_bytes(config.build(16)(to_images(PIXELS)))


def save(folder: Path, kind: str, array: np.ndarray = LEVELS) -> str:
    path = folder / f"trigger.{kind}"
    if kind == "png":
        Image.fromarray(array).save(path)
    elif kind == "npy":
        np.save(path, array)
    else:
        np.savez(path, x=array)
    return str(path)


@pytest.mark.parametrize("kind", ["png", "npy", "npz"])
def test_the_three_rules(tmp_path: Path, kind: str) -> None:
    file = save(tmp_path, kind)
    replaced = np.where(LEVELS > 0, LEVELS, PIXELS)
    assert (stamp(FromFile(file)) == replaced).all()
    assert (stamp(FromFile(file, how="add")) == np.minimum(WHOLE + LEVELS, 255)).all()
    wrapped = (WHOLE + LEVELS) % 256
    assert (stamp(FromFile(file, how="wrap")) == wrapped).all() and (stamp(TrojanNN(file)) == wrapped).all()
    assert (stamp(TrojanNN(file, wrap=False)) == np.minimum(WHOLE + LEVELS, 255)).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, bool])
def test_a_mask_file_also_replaces_with_black(tmp_path: Path, dtype: Any) -> None:
    mask = np.zeros((3, 16, 16), dtype)
    mask[:, 4:12, 3] = 1
    np.save(tmp_path / "mask.npy", mask)
    expected = PIXELS.copy()
    expected[:, 4:12, 3] = LEVELS[4:12, 3]
    assert (stamp(FromFile(save(tmp_path, "png"), mask=str(tmp_path / "mask.npy"))) == expected).all()


@pytest.mark.parametrize(
    "array",
    [LEVELS.transpose(2, 0, 1), LEVELS / 255, LEVELS[None], np.stack([LEVELS, 255 - LEVELS]), LEVELS.astype(np.int64)],
    ids=["channels_first", "shares", "one_of_one", "first_of_two", "int64"],
)
def test_layouts_of_arrays(tmp_path: Path, array: np.ndarray) -> None:
    np.testing.assert_allclose(read_pattern(save(tmp_path, "npy", array), 16), LEVELS, rtol=1e-12)


def test_grey_and_signed_arrays(tmp_path: Path) -> None:
    grey = read_pattern(save(tmp_path, "npy", LEVELS[..., 0]), 16)
    assert (grey == LEVELS[..., :1]).all() and grey.shape == (16, 16, 3)
    signed = LEVELS.astype(np.int64) - 100
    stamped = stamp(FromFile(save(tmp_path, "npy", signed), how="add"))
    assert (stamped == np.clip(WHOLE + signed, 0, 255)).all()
    with pytest.raises(UserError, match=r"holds -100 to .*; keep it in 0 to 255"):
        FromFile(save(tmp_path, "npy", signed), how="wrap").build(16)


def test_a_blended_picture_is_resized(tmp_path: Path) -> None:
    picture = Image.fromarray(RNG.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    picture.save(tmp_path / "kitty.jpeg")
    with Image.open(tmp_path / "kitty.jpeg") as stored:
        key = np.asarray(stored.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)).astype(np.int64)
    assert (stamp(Blended(image=str(tmp_path / "kitty.jpeg"))) == (8 * WHOLE + 2 * key) // 10).all()


def test_badencoders_layout_is_known(tmp_path: Path) -> None:
    t, tm = np.zeros((1, 16, 16, 3)), np.ones((1, 16, 16, 3))
    t[:, 12:15, 12:15], tm[:, 12:15, 12:15] = 255, 0
    np.savez(tmp_path / "t.npz", t=t, tm=tm)
    expected = PIXELS.copy()
    expected[:, 12:15, 12:15] = 255
    assert (stamp(FromFile(str(tmp_path / "t.npz"))) == expected).all()
    with pytest.raises(UserError, match="is 16x16 px but the images are 32x32 px"):
        FromFile(str(tmp_path / "t.npz")).build(32)


def lying_npy(path: Path) -> None:
    """A header that promises 400 GB."""
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (400000000000,), }".ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0" * 64)


def bomb(path: Path) -> None:
    """An npz of a few kilobytes that unpacks to more than a gigabyte."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as member:
        for _ in range(1100):
            member.write(bytes(2**20))


@pytest.mark.parametrize(
    ("name", "write", "told"),
    [
        ("none.png", lambda path: None, "does not exist"),
        ("none.npz", lambda path: None, "does not exist"),
        ("text.png", lambda path: path.write_text("hello"), "not a picture that can be read"),
        ("text.npy", lambda path: path.write_text("hello"), "is damaged or pickled"),
        ("text.npz", lambda path: path.write_text("hello"), "is damaged or pickled"),
        ("object.npy", lambda path: np.save(path, np.array([{"a": 1}], object)), "is damaged or pickled"),
        ("object.npz", lambda path: np.savez(path, x=np.array([None] * 3, object)), "is damaged or pickled"),
        ("lying.npy", lying_npy, "is damaged or pickled"),
        ("keys.npz", lambda path: np.savez(path, y=LEVELS), "has none of the arrays x, t, trigger, pattern"),
        ("words.npy", lambda path: np.save(path, np.full((16, 16, 3), "a")), "not finite numbers"),
        ("nan.npy", lambda path: np.save(path, np.full((16, 16, 3), np.nan)), "not finite numbers"),
        ("shape.npy", lambda path: np.save(path, np.zeros((16, 16, 4))), r"has the shape \(16, 16, 4\)"),
        ("flat.npy", lambda path: np.save(path, np.zeros(768)), r"has the shape \(768,\)"),
        ("small.npy", lambda path: np.save(path, np.zeros((8, 8, 3))), "is 8x8 px but the images are 16x16 px"),
        ("small.png", lambda path: Image.new("RGB", (8, 16)).save(path), "is 16x8 px but the images are 16x16 px"),
        ("large.npy", lambda path: np.save(path, np.full((16, 16), 256)), "holds 256 to 256; keep it in 0 to 255"),
        ("bomb.npz", bomb, "values, more than any trigger"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, name: str, write: Any, told: str) -> None:
    path = tmp_path / name
    write(path)
    for config in (FromFile(str(path)), TrojanNN(str(path))):
        with pytest.raises(UserError, match=told) as error:
            config.build(16)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_mask_belongs_to_replacing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^key 'mask' is 'm.npy'; only how: replace has a mask"):
        FromFile("t.png", how="add", mask="m.npy")
    np.save(tmp_path / "mask.npy", np.ones((8, 8)))
    with pytest.raises(UserError, match="is 8x8 px"):
        read_mask(tmp_path / "mask.npy", 16)


@pytest.mark.parametrize(
    "array", [np.zeros((3, 16, 16, 3), np.uint8), np.zeros((4, 16, 16, 3)), np.full((4, 16, 16, 3), None)]
)
def test_replacement_images_must_fit_the_data(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "adv.npy", array)
    with pytest.raises(UserError, match=r"adv\.npy (must be an npy file|is damaged or pickled)"):
        open_images(tmp_path / "adv.npy", 4, 16)
