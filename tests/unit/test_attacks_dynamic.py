"""WaNet and BPP against numpy transcriptions, one pixel at a time."""

import numpy as np
import pytest
import torch

from dist_defend.attacks.patterns import BadNets, Bpp, WaNet
from dist_defend.attacks.stamping import to_images
from dist_defend.attacks.warp import Warp

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (5, 12, 12, 3), dtype=np.uint8)
ROWS = torch.arange(5)


def sampled(image: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Bilinear interpolation of (H, W, 3) at grid (H, W, 2) of (x, y) from -1 to 1 between the corner pixels."""
    height, width, _ = image.shape
    out = np.zeros(image.shape)
    for r in range(height):
        for c in range(width):
            x, y = (grid[r, c] + 1) / 2 * (width - 1, height - 1)
            left, top = min(int(x), width - 2), min(int(y), height - 2)
            u, v = x - left, y - top
            above = (1 - u) * image[top, left] + u * image[top, left + 1]
            below = (1 - u) * image[top + 1, left] + u * image[top + 1, left + 1]
            out[r, c] = (1 - v) * above + v * below
    return out


def test_wanet_samples_the_image_on_its_grid() -> None:
    warp = WaNet(seed=3).build(12)
    warped = warp.to("cpu", torch.float64)(to_images(PIXELS).double())
    for image, pixels in zip(warped, PIXELS, strict=True):
        expected = sampled(pixels / 255, warp.grid[0].double().numpy())
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_wanets_grid() -> None:
    """Four control points a side over four pixels: the flow at pixel (r, c) is control point (r, c) itself."""
    control = np.random.default_rng(5).uniform(-1, 1, (1, 2, 4, 4))[0]
    control /= np.abs(control).mean()
    line = np.linspace(-1, 1, 4)
    identity = np.stack([np.tile(line, (4, 1)), np.tile(line[:, None], (1, 4))], -1)  # (x, y)
    expected = np.clip(0.9 * (identity + 0.5 * control.transpose(1, 2, 0) / 4), -1, 1)
    grid = WaNet(seed=5, rescale=0.9).build(4).grid
    np.testing.assert_allclose(grid[0].numpy(), expected, atol=1e-6)
    still = WaNet(strength=0.0).build(12)
    torch.testing.assert_close(still(to_images(PIXELS)), to_images(PIXELS), atol=2e-6, rtol=0)


def test_wanets_noise_is_bounded_fixed_by_row_and_seed() -> None:
    warp, images = WaNet(seed=3).build(12), to_images(PIXELS)
    crossed = warp.cross(images, images, ROWS)
    assert crossed.equal(warp.cross(images, images.flip(0), ROWS))
    assert crossed[3:].equal(warp.cross(images[3:], images[3:], ROWS[3:]))
    assert not crossed.equal(warp.cross(images, images, ROWS + 1))
    assert not crossed.equal(Warp(warp.grid, 4).cross(images, images, ROWS))
    ramp = torch.arange(12.0).expand(1, 3, 12, 12) / 11  # its value is the x coordinate
    distance = (warp.cross(ramp, ramp, ROWS[:1]) - warp(ramp)).abs()
    assert 0.8 / 24 < distance.max() <= 1 / 24 + 1e-5  # U(-1, 1) / 12 on a scale of 2


def floyd_steinberg(pixels: np.ndarray, levels: int) -> np.ndarray:
    """Upstream's loop over one image (H, W, 3), grey levels."""
    x = pixels.astype(np.float64)
    height, width, _ = x.shape
    for r in range(height):
        for c in range(width):
            new = np.round(x[r, c] / 255 * (levels - 1)) / (levels - 1) * 255
            error = x[r, c] - new
            x[r, c] = new
            for down, right, share in ((0, 1, 7), (1, 1, 1), (1, 0, 5), (1, -1, 3)):
                if r + down < height and 0 <= c + right < width:
                    x[r + down, c + right] += error * share / 16
    return np.clip(x, 0, 255)


@pytest.mark.parametrize("levels", [2, 8])
@pytest.mark.parametrize("shape", [(12, 12), (5, 9), (9, 4), (1, 6)])
def test_dithering_is_the_serial_loop(levels: int, shape: tuple[int, int]) -> None:
    pixels = PIXELS[:, : shape[0], : shape[1]]
    made = Bpp(levels=levels, dithering=True).build(12)(to_images(pixels).double())
    expected = np.stack([floyd_steinberg(image, levels) for image in pixels])
    plain = np.round(pixels / 255 * (levels - 1)) / (levels - 1) * 255
    np.testing.assert_allclose(made.permute(0, 2, 3, 1).numpy() * 255, expected, atol=2e-5)
    assert not np.allclose(expected, plain)


@pytest.mark.parametrize("levels", [2, 8, 32])
def test_bpp_rounds_to_levels(levels: int) -> None:
    made = Bpp(levels=levels).build(12)(to_images(PIXELS)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(made, np.round(PIXELS / 255 * (levels - 1)) / (levels - 1), atol=1e-6)
    assert len(np.unique(made)) == levels


def test_bpps_negative_samples_carry_anothers_residual() -> None:
    trigger, images = Bpp().build(12), to_images(PIXELS)
    others = images.flip(0)
    expected = PIXELS / 255 + np.round(PIXELS[::-1] / 255 * 7) / 7 - PIXELS[::-1] / 255
    made = trigger.cross(images, others, ROWS).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(made, np.clip(expected, 0, 1), atol=1e-6)
    square = BadNets().build(12)
    with pytest.raises(TypeError, match="Replacing has no cross samples"):
        square.cross(images, others, ROWS)
    assert (BadNets().cross_ratio, Bpp().cross_ratio, WaNet().cross_ratio) == (0, 1, 2)
