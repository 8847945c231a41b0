"""Triggers as jinyuan-jia/BadEncoder's npz files have them: x tm + t, with t in 0..255."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from dist_defend.attacks.trigger import Replacing


def save_trigger_npz(path: Path, triggers: Sequence[Replacing]) -> None:
    """Write triggers of one size; tm is int64 where nothing is blended."""
    masks = np.concatenate([_rows(t.mask.expand_as(t.pattern)) for t in triggers])
    patterns = np.concatenate([_rows(t.pattern) for t in triggers])
    keep = 1 - masks
    tm = keep.astype(np.int64) if np.isin(keep, (0, 1)).all() else keep
    np.savez(path, t=255 * patterns * masks, tm=tm, info=np.array(["replace", "trigger"]))


def _rows(images: Tensor) -> np.ndarray:
    """(1, 3, H, W) -> (1, H, W, 3) float64."""
    return images.permute(0, 2, 3, 1).double().numpy()
