"""Static triggers against numpy transcriptions of their definitions on uint8 images, cell by cell."""

from typing import Any

import numpy as np
import pytest
import torch

from dist_defend.attacks import drawn
from dist_defend.attacks.patterns import (
    BadNets,
    Blended,
    L0Inv,
    L2Inv,
    LabelConsistent,
    LowFrequency,
    Sig,
    SigWrapped,
    Trojan,
    WaNet,
)
from dist_defend.attacks.stamping import to_bytes, to_images
from dist_defend.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
PIXELS[0], PIXELS[1] = 0, 255


def stamp(config: Any, pixels: np.ndarray = PIXELS) -> np.ndarray:
    return to_bytes(config.build(pixels.shape[1])(to_images(pixels)))


def cells(config: Any, size: int = 32) -> dict[tuple[int, int], int]:
    """Grey level of every cell that a trigger of grey cells replaces, found on a black and a white image."""
    black, white = stamp(config, np.stack([np.zeros((size, size, 3)), np.full((size, size, 3), 255)]).astype(np.uint8))
    assert (black == black[..., :1]).all()
    replaced = np.argwhere((black == white).all(-1))
    return {(int(r), int(c)): int(black[r, c, 0]) for r, c in replaced}


def corner(rows: tuple[int, ...], columns: tuple[int, ...], levels: list[list[int]]) -> dict[tuple[int, int], int]:
    return {(r, c): levels[i][j] for i, r in enumerate(rows) for j, c in enumerate(columns)}


@pytest.mark.parametrize(
    ("config", "first", "last"),
    [(BadNets(), 29, 31), (BadNets(size=3, margin=1), 28, 30), (BadNets(size=4, margin=1), 27, 30)],
    ids=["backdoorbench", "rnp", "ibau"],
)
def test_white_squares_of_the_three_repositories(config: BadNets, first: int, last: int) -> None:
    assert cells(config) == {(r, c): 255 for r in range(first, last + 1) for c in range(first, last + 1)}


def test_grids() -> None:
    checker = corner((29, 30, 31), (29, 30, 31), [[255, 1, 255], [1, 255, 1], [255, 1, 255]])
    assert cells(BadNets(pattern="checker")) == checker
    grid = {(31, 31): 255, (31, 29): 255, (30, 30): 255, (29, 31): 255}
    grid |= {(29, 29): 0, (29, 30): 0, (30, 29): 0, (30, 31): 0, (31, 30): 0}
    assert cells(BadNets(pattern="grid")) == grid
    upper_left = corner((1, 2, 3), (1, 2, 3), [[255, 0, 255], [0, 255, 0], [255, 0, 0]])
    lower_left = corner((31, 30, 29), (1, 2, 3), [[255, 0, 255], [0, 255, 0], [255, 0, 0]])
    upper_right = corner((1, 2, 3), (31, 30, 29), [[255, 0, 255], [0, 255, 0], [255, 0, 0]])
    assert cells(BadNets(pattern="four_corner")) == grid | upper_left | lower_left | upper_right
    assert cells(BadNets(pattern="one_pixel")) == {(16, 16): 255}
    assert cells(BadNets(pattern="one_pixel"), 28) == {(14, 14): 255}


def test_l0_inv_is_the_published_row() -> None:
    expected = PIXELS.copy()
    for column, colour in zip(
        range(23, 32),
        [(0, 0, 0), (255, 0, 255), (0, 0, 255), (255, 255, 0), (255, 255, 255), (0, 255, 255), (0, 255, 255),
         (255, 0, 0), (255, 255, 255)],
        strict=True,
    ):  # fmt: skip
        expected[:, 31, column] = colour
    assert (stamp(L0Inv()) == expected).all()


@pytest.mark.parametrize(("size", "delta", "frequency"), [(32, 40, 6), (28, 20, 3)])
def test_sig_adds_a_clipped_wave(size: int, delta: float, frequency: float) -> None:
    pixels = PIXELS[:, :size, :size]
    expected = np.zeros(pixels.shape)
    for column in range(size):
        wave = np.float32(delta * np.sin(2 * np.pi * column * frequency / size))
        expected[:, :, column] = pixels[:, :, column].astype(np.float32) + wave
    assert (stamp(Sig(delta=delta, frequency=frequency), pixels) == np.clip(expected, 0, 255).astype(np.uint8)).all()


def test_wrapped_sig_blends_an_unsigned_wave() -> None:
    wave = np.array([int(20 * np.sin(0.8 * column)) for column in range(32)])
    unsigned = wave.astype(np.uint8).astype(np.int64)
    assert unsigned[4] == 256 - 1 and unsigned[5] == 256 - 15 and wave.min() == -19
    tenths = 8 * PIXELS.astype(np.int64) + 2 * unsigned[None, None, :, None]
    assert (stamp(SigWrapped()) == tenths // 10).all()


@pytest.mark.parametrize("tenths", [1, 2, 5])
def test_blended_truncates_like_integers(tenths: int) -> None:
    key = drawn.noise(32, 7).astype(np.int64)
    expected = ((10 - tenths) * PIXELS.astype(np.int64) + tenths * key) // 10
    assert (stamp(Blended(alpha=tenths / 10, seed=7)) == expected).all()
    assert len(np.unique(key)) == 256 and not np.array_equal(key, drawn.noise(32, 8))


def padded(patch: np.ndarray, first: int) -> np.ndarray:
    full = np.zeros((32, 32, 3), np.int64)
    full[first : first + len(patch), first : first + len(patch)] = patch
    return full


def test_additive_trojans_clip_or_wrap() -> None:
    whole = PIXELS.astype(np.int64)
    square, patch = padded(drawn.trojan_square(3), 21), padded(drawn.trojan_patch(3), 25)
    assert (stamp(Trojan(seed=3)) == np.minimum(whole + square, 255)).all()
    assert (stamp(Trojan(pattern="patch", seed=3)) == np.minimum(whole + patch, 255)).all()
    wrapped = stamp(Trojan(pattern="patch", wrap=True, seed=3))
    assert (wrapped == (whole + patch) % 256).all()
    assert (wrapped[1] != np.minimum(whole + patch, 255)[1]).any()
    assert (stamp(Trojan(pattern="watermark", wrap=True)) == (whole + drawn.trojan_watermark(0)) % 256).all()


def test_label_consistent_corners() -> None:
    left = [[1, -1, -1], [-1, 1, -1], [1, -1, 1]]
    signs = np.zeros((32, 32), np.int64)
    for rows in ((0, 1, 2), (29, 30, 31)):
        for i, row in enumerate(rows):
            for j in range(3):
                signs[row, j] = signs[row, 31 - j] = left[i][j]
    for amplitude in (1.0, 0.25):
        expected = np.clip(PIXELS + 255 * amplitude * signs[None, :, :, None], 0, 255)
        assert (stamp(LabelConsistent(amplitude=amplitude)) == expected.astype(np.uint8)).all()
    assert (stamp(LabelConsistent(amplitude=0)) == PIXELS).all()
    doubled = LabelConsistent().build(64).pattern
    assert (doubled[0, 0].numpy() == np.kron(signs, np.ones((2, 2)))).all()


@pytest.mark.parametrize(
    ("make", "norm", "pixels", "box", "peak"),
    [
        (drawn.trojan_square, 8.66, 81, (0, 8), 255),
        (drawn.trojan_watermark, 8.74, 321, (0, 29), 255),
        (drawn.smooth_blotches, 3.22, 905, (0, 31), 68),
        (drawn.low_frequency, 1022 / 255, 1024, (0, 31), 51),
    ],
)
@pytest.mark.parametrize("seed", [0, 5])
def test_drawn_patterns_keep_what_is_known_of_the_originals(
    make: Any, norm: float, pixels: int, box: tuple[int, int], peak: int, seed: int
) -> None:
    pattern = make(seed)
    assert np.linalg.norm(pattern / 255) == pytest.approx(norm, abs=0.005)
    where = np.argwhere(pattern.any(-1))
    assert (len(where), where.min(), where.max(), pattern.dtype) == (pixels, *box, np.uint8)
    assert 0.5 * peak < pattern.max() <= peak
    assert not np.array_equal(pattern, make(seed + 1)) and np.array_equal(pattern, make(seed))


def test_details_of_the_drawn_patterns() -> None:
    assert drawn.trojan_square(0)[-1].max() <= 46
    strokes = np.argwhere(drawn.trojan_watermark(0).max(-1) > 3)
    assert (strokes.min(0).tolist(), strokes.max(0).tolist()) == ([9, 10], [26, 28])
    inside = np.argwhere(drawn.oval(224)[..., 0])
    assert (inside.min(0).tolist(), inside.max(0).tolist()) == ([120, 128], [203, 194])


def test_full_image_patterns_fit_any_size_and_add() -> None:
    for config, make in ((L2Inv(seed=2), drawn.smooth_blotches), (LowFrequency(seed=2), drawn.low_frequency)):
        assert (stamp(config) == np.minimum(PIXELS.astype(np.int64) + make(2), 255)).all()
        assert config.build(28).image_size == (28, 28)


@pytest.mark.parametrize("config", [Trojan(), Blended(), Trojan(wrap=True), WaNet(), BadNets()])
def test_triggers_move_to_another_precision(config: Any) -> None:
    images = to_images(PIXELS)
    trigger = config.build(32)
    moved = trigger.to("cpu", torch.float64)
    stamped = moved(images.double())
    assert stamped.dtype is torch.float64 and trigger(images).dtype is torch.float32
    torch.testing.assert_close(stamped.float(), trigger(images), atol=1e-5, rtol=0)
    assert moved.image_size == trigger.image_size == (32, 32)


def test_triggers_do_not_write_into_their_input() -> None:
    for config in (BadNets(), Sig(), Trojan(wrap=True), WaNet()):
        images = to_images(PIXELS)
        config.build(32)(images)
        assert images.equal(to_images(PIXELS))


@pytest.mark.parametrize(
    ("config", "size"),
    [(BadNets(pattern="grid"), 7), (L0Inv(), 8), (Trojan(), 10), (Trojan(pattern="patch"), 6), (BadNets(size=9), 8)],
)
def test_images_too_small_are_user_errors(config: Any, size: int) -> None:
    with pytest.raises(UserError, match=f"{size}"):
        config.build(size)


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: BadNets(pattern="grid", size=4), "pattern"),
        (lambda: Blended(alpha=1.5), "alpha"),
        (lambda: LabelConsistent(amplitude=-0.1), "amplitude"),
        (lambda: WaNet(cells=1), "cells"),
        (lambda: WaNet(cross_ratio=-1), "cross_ratio"),
    ],
)
def test_values_that_mean_nothing_are_refused(make: Any, key: str) -> None:
    with pytest.raises(ValueError, match=f"^key '{key}' is "):
        make()
