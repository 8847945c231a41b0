"""How images are stamped: the one place where a trigger meets images, and where its output becomes uint8."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dist_defend.attacks.trigger import Trigger, grey_levels
from dist_defend.data.jpeg import through_jpeg


def stamp_images(images: Tensor, trigger: Trigger, rows: Tensor | None = None) -> Tensor:
    """Float images (B, 3, H, W) in [0, 1] with the trigger, on their device and in their dtype; nothing is rounded.

    rows (B,) int64: of their data set. A trigger that lies elsewhere in each image has a method ``at``, which gives the
    one of these rows; without them the images count as the first ones.
    """
    trigger = trigger.to(images.device, images.dtype)
    at: Callable[[Tensor], Trigger] | None = getattr(trigger, "at", None)
    return (trigger if at is None or rows is None else at(rows.to(images.device)))(images)


def stamp_pixels(pixels: np.ndarray, trigger: Trigger, rows: np.ndarray | None = None) -> np.ndarray:
    """Images (B, H, W, 3) uint8 with the trigger, truncated to whole grey levels as published code does.

    rows: as stamp_images'. A trigger whose published images stay floats says is_rounded; one whose published images are
    stored as JPEG has their quality as ``jpeg``.
    """
    places = None if rows is None else torch.from_numpy(rows)
    stamped = to_bytes(stamp_images(to_images(pixels), trigger, places), getattr(trigger, "is_rounded", False))
    quality: int | None = getattr(trigger, "jpeg", None)
    return stamped if quality is None else through_jpeg(stamped, quality)


def cross_pixels(pixels: np.ndarray, others: np.ndarray, rows: np.ndarray, trigger: Trigger) -> np.ndarray:
    """Images (B, H, W, 3) uint8 with a wrong trigger, as Trigger.cross makes it; truncated likewise."""
    return to_bytes(trigger.cross(to_images(pixels), to_images(others), torch.from_numpy(rows)))


def to_images(pixels: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.require(pixels, requirements="W")).permute(0, 3, 1, 2).float() / 255


def to_bytes(images: Tensor, is_rounded: bool = False) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8, truncated or rounded."""
    return grey_levels(images + 0.5 / 255 if is_rounded else images).to(torch.uint8).permute(0, 2, 3, 1).numpy()
