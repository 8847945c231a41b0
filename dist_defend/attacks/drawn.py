"""Patterns drawn from a seed, for triggers whose published pictures are not ours to ship.

They keep what is known of the originals: bounding box, number of pixels, range and L2 norm (of [0, 1] values). All are
uint8 arrays; full-image ones are drawn at 32 x 32 and resized to other sizes by nearest neighbour.
"""

import numpy as np
from PIL import Image

SIDE = 32  # pixels of the originals


def noise(image_size: int, seed: int) -> np.ndarray:
    """Uniform noise (H, W, 3): the random key pattern of Chen et al. 2017."""
    return _generator(seed, 0).integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)


def trojan_square(seed: int) -> np.ndarray:
    """(9, 9, 3) colour noise of norm 8.66 whose last row is dark, at most 46."""
    rng = _generator(seed, 1)
    dark = rng.integers(1, 47, (1, 9, 3), dtype=np.uint8)
    rest = (8.66**2 - np.sum((dark / 255.0) ** 2)) ** 0.5
    return np.concatenate([at_norm(rng.random((8, 9, 3)), 255, rest), dark])


def trojan_watermark(seed: int) -> np.ndarray:
    """(32, 32, 3), norm 8.74, 321 pixels: a ring with a leaf in rows 9..26, columns 10..28, and faint dots in 0..29."""
    rng = _generator(seed, 2)
    row, column = np.mgrid[0:SIDE, 0:SIDE]
    radius = np.hypot((row - 19.5) / 7, (column - 19) / 9.1)
    leaf = (row >= 9) & (row < 13) & (abs(column + row - 30) <= 1)
    stroke = ((radius > 0.78) & (radius <= 1)) | leaf
    pattern = np.where(stroke[..., None], at_norm(_tinted(rng, stroke), 255, 8.74), 0).astype(np.uint8)
    free = np.flatnonzero(~stroke & (row < 30) & (column < 30))
    corners = np.array([0, 29 * SIDE + 29])  # they span the bounding box
    dots = rng.permutation(np.setdiff1d(free, corners))[: 321 - stroke.sum() - 2]
    pattern.reshape(-1, 3)[np.concatenate([dots, corners])] = rng.integers(1, 4, (len(dots) + 2, 3))
    return pattern


def trojan_patch(seed: int) -> np.ndarray:
    """(3, 3, 3) of colours 0..250."""
    return _generator(seed, 3).integers(0, 251, (3, 3, 3), dtype=np.uint8)


def smooth_blotches(seed: int) -> np.ndarray:
    """(32, 32, 3), 0..68, norm 3.22, 905 pixels that are not black: as diffuse as l2_inv."""
    rng = _generator(seed, 4)
    field = _smooth(rng, 1)
    field = np.maximum(field - np.sort(field, axis=None)[SIDE * SIDE - 905 - 1], 0)
    return at_norm(field / field.max() * (0.5 + 0.5 * _smooth(rng, 3)), 68, 3.22)


def low_frequency(seed: int) -> np.ndarray:
    """(32, 32, 3), 0..51, of norm 1022 / 255: a universal pattern after a low-pass filter."""
    return at_norm(_smooth(_generator(seed, 5), 3), 51, 1022 / 255)


def coloured_cells(seed: int) -> np.ndarray:
    """(80, 80, 3): 5 x 5 random colours, enlarged (Pillow, bicubic), as large as SSLBKD's pictures."""
    cells = _generator(seed, 6).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(cells).resize((80, 80), Image.Resampling.BICUBIC))


def oval(image_size: int) -> np.ndarray:
    """(H, W, 3), a grey oval on black in rows 120..203 and columns 128..194 of 224, scaled: where TrojanNN works."""
    centre, axes = (161.5, 161.0), (42.0, 33.5)
    at = (np.arange(image_size) + 0.5) * 224 / image_size - 0.5
    inside = ((at[:, None] - centre[0]) / axes[0]) ** 2 + ((at[None] - centre[1]) / axes[1]) ** 2 <= 1
    return np.repeat(np.where(inside, 128, 0).astype(np.uint8)[..., None], 3, 2)


def resized(pattern: np.ndarray, image_size: int) -> np.ndarray:
    """A pattern (H, W, 3) uint8 at another size, by nearest neighbour."""
    return np.asarray(Image.fromarray(pattern).resize((image_size, image_size), Image.Resampling.NEAREST))


def at_norm(shape: np.ndarray, peak: int, norm: float) -> np.ndarray:
    """Grey levels ceil(peak * shape^p), shape in [0, 1], with p such that the norm of levels / 255 is as asked."""
    low, high = 0.01, 100.0
    for _ in range(50):
        middle = (low * high) ** 0.5
        levels: np.ndarray = np.ceil(peak * shape**middle)
        low, high = (middle, high) if np.linalg.norm(levels / 255) > norm else (low, middle)
    return levels.astype(np.uint8)


def _generator(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, stream])


def _smooth(rng: np.random.Generator, channels: int) -> np.ndarray:
    """(32, 32, channels) in [0, 1] with at most three waves along each side."""
    wave = 2 * np.pi * np.outer(np.arange(SIDE), np.arange(4)) / SIDE
    basis = np.concatenate([np.cos(wave), np.sin(wave)], 1)
    field = np.einsum("hi,wj,ijc->hwc", basis, basis, rng.normal(size=(8, 8, channels)))
    low, high = field.min((0, 1)), field.max((0, 1))
    return np.asarray((field - low) / (high - low))


def _tinted(rng: np.random.Generator, stroke: np.ndarray) -> np.ndarray:
    return stroke[..., None] * (0.5 + 0.5 * rng.random((SIDE, SIDE, 3)))
