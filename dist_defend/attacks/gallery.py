"""One picture of every trigger: images, the same stamped, and what changed."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from dist_defend.attacks import patterns
from dist_defend.attacks.drawn import oval
from dist_defend.attacks.input_aware import Generators, InputAwareTrigger
from dist_defend.attacks.random_patch import RandomPatch
from dist_defend.attacks.stamping import stamp_pixels, to_bytes, to_images
from dist_defend.attacks.trigger import Trigger, Wrapping
from dist_defend.attacks.trojan_nn import optimise_pattern

_TILE, _MARGIN, _CAPTION = 72, 4, 190  # pixels


def triggers(image_size: int) -> list[tuple[str, Trigger]]:
    """Every trigger by caption. Those that training makes come from networks with fresh, seeded weights."""
    grids = [patterns.BadNets(pattern=p) for p in ("checker", "grid", "four_corner", "one_pixel")]
    configs: list[tuple[str, patterns.TriggerConfig]] = [
        ("badnets: square (BackdoorBench)", patterns.BadNets()),
        ("badnets: square 3, margin 1 (RNP)", patterns.BadNets(margin=1)),
        ("badnets: square 4, margin 1 (I-BAU)", patterns.BadNets(size=4, margin=1)),
        *((f"badnets: {grid.pattern}", grid) for grid in grids),
        ("blended: noise, alpha 0.2", patterns.Blended()),
        ("sig", patterns.Sig()),
        ("sig_wrapped", patterns.SigWrapped()),
        ("trojan: square", patterns.Trojan()),
        ("trojan: watermark", patterns.Trojan(pattern="watermark")),
        ("trojan: patch, wrapped", patterns.Trojan(pattern="patch", wrap=True)),
        ("l0_inv", patterns.L0Inv()),
        ("l2_inv", patterns.L2Inv()),
        ("label_consistent", patterns.LabelConsistent()),
        ("low_frequency", patterns.LowFrequency()),
        ("wanet", patterns.WaNet()),
        ("bpp", patterns.Bpp()),
        ("bpp: dithered", patterns.Bpp(dithering=True)),
        ("ctrl", patterns.Ctrl(window=image_size, positions=(image_size // 2 - 1, image_size - 1))),
        ("random_patch", RandomPatch(size=image_size // 4)),
    ]
    built: list[tuple[str, Trigger]] = [(caption, config.build(image_size)) for caption, config in configs]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if image_size % 4 == 0:
            generators = Generators(image_size, "none").eval().requires_grad_(False)
            built.append(("input_aware (untrained)", InputAwareTrigger(generators)))
        net = nn.Sequential(nn.Conv2d(3, 16, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        net.append(nn.Linear(64, 10))
    start = to_images(oval(image_size)[None])
    pattern, _ = optimise_pattern(net, "4", start, iterations=20)
    return [*built, ("trojan_nn (untrained network)", Wrapping(pattern))]


def draw(images: np.ndarray, named: Sequence[tuple[str, Trigger]]) -> Image.Image:
    """A line per trigger: caption, each image of (N, H, W, 3) uint8 beside its stamped copy, the first difference."""
    return draw_pairs([(caption, images, stamp_pixels(images, trigger)) for caption, trigger in named])


def draw_pairs(lines: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> Image.Image:
    """Lines of caption, images and their stamped copies, each (N, H, W, 3) uint8, and the first one's difference.

    The difference is around mid grey and scaled so that its largest value is black or white.
    """
    width = _CAPTION + (2 * len(lines[0][1]) + 1) * (_TILE + _MARGIN)
    sheet = Image.new("RGB", (width, len(lines) * (_TILE + _MARGIN) + _MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for line, (caption, images, stamped) in enumerate(lines):
        top = _MARGIN + line * (_TILE + _MARGIN)
        pen.text((_MARGIN, top + _TILE // 2 - 6), caption, fill="black")
        change = stamped[0].astype(np.float64) - images[0]
        contrast = (127.5 * (1 + change / max(1.0, np.abs(change).max()))).astype(np.uint8)
        tiles = [tile for pair in zip(images, stamped, strict=True) for tile in pair]
        for column, tile in enumerate([*tiles, contrast]):
            picture = Image.fromarray(tile).resize((_TILE, _TILE), Image.Resampling.NEAREST)
            sheet.paste(picture, (_CAPTION + column * (_TILE + _MARGIN), top))
    return sheet


def sample_images(count: int = 3, side: int = 32) -> np.ndarray:
    """Smooth colour images (count, side, side, 3) uint8 for when there is no data set."""
    rng = np.random.default_rng(0)
    corners = torch.from_numpy(rng.uniform(0, 1, (count, 3, 4, 4)))
    smooth = nn.functional.interpolate(corners, (side, side), mode="bicubic", align_corners=True)
    return to_bytes(smooth.clamp(0, 1))
