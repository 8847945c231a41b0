"""The two functions that stamp: uint8 pixels are truncated by exact arithmetic, float images are not rounded."""

import numpy as np
import pytest
import torch

from dist_defend.attacks.input_aware import Generators, InputAwareTrigger
from dist_defend.attacks.stamping import cross_pixels, stamp_images, stamp_pixels
from dist_defend.attacks.trigger import Additive, as_images, replacing, white_square

RNG = np.random.default_rng(5)
PIXELS = RNG.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
KEY = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
BLEND = replacing(np.full((8, 8), 0.2), KEY)  # a fifth of the key: whole numbers can say what is right
EXACT = 4 * PIXELS.astype(int) + KEY  # times 1/5


def test_pixels_are_truncated_as_published() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    for key in range(0, 256, 15):
        made = stamp_pixels(levels, replacing(np.full((16, 16), 0.2), np.full((16, 16), key)))
        assert made.dtype == np.uint8
        np.testing.assert_array_equal(made, (4 * levels.astype(int) + key) // 5)
    np.testing.assert_array_equal(stamp_pixels(PIXELS, BLEND), EXACT // 5)


def test_sums_are_clipped_at_black_and_white() -> None:
    change = RNG.integers(-255, 256, (8, 8, 3))
    made = stamp_pixels(PIXELS, Additive(as_images(change)))
    np.testing.assert_array_equal(made, np.clip(PIXELS.astype(int) + change, 0, 255))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_float_images_are_not_rounded_and_keep_their_dtype(dtype: torch.dtype) -> None:
    images = (torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255).to(dtype)
    made = stamp_images(images, BLEND)
    assert made.dtype is dtype and BLEND.mask.dtype is torch.float32
    expected = torch.from_numpy(EXACT / 5 / 255).permute(0, 3, 1, 2)
    torch.testing.assert_close(made.double(), expected, rtol=0, atol=2e-2 if dtype is torch.bfloat16 else 1e-6)
    assert not (made.double() * 255 - (made.double() * 255).round()).abs().max() < 0.1


def test_pixels_that_cannot_be_written_are_read() -> None:
    kept = PIXELS.copy()
    kept.flags.writeable = False
    made = stamp_pixels(kept, white_square(8, 2, 0))
    np.testing.assert_array_equal(made[:, :6], kept[:, :6])
    assert (made[:, 6:, 6:] == 255).all() and (kept == PIXELS).all()


def test_cross_samples_of_a_trigger_without_them_are_an_error() -> None:
    with pytest.raises(TypeError, match="Replacing has no cross samples"):
        cross_pixels(PIXELS, PIXELS[::-1].copy(), np.arange(4), BLEND)


def test_generators_are_copied_only_to_move_them() -> None:
    trigger = InputAwareTrigger(Generators(8, "none").eval())
    assert trigger.to("cpu") is trigger
    moved = trigger.to("cpu", torch.float64)
    assert moved is not trigger and next(trigger.generators.parameters()).dtype is torch.float32
    assert stamp_images(torch.rand(2, 3, 8, 8).double(), trigger).dtype is torch.float64
