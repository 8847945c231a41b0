"""The npz files of jinyuan-jia/BadEncoder: triggers (t, tm), and reference images with their classes (x, y)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dist_defend.attacks.array_file import TooLarge, read_npz
from dist_defend.attacks.trigger import Replacing, Trigger
from dist_defend.errors import UserError

MAX_VALUES = 2**21  # of the triggers in one file


def check_size(trigger: Replacing, image_size: int | tuple[int, int], path: str | Path) -> None:
    """UserError unless the trigger, read from `path`, has the images' size (pixels) and changes some of them."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if trigger.image_size != (height, width):
        own = "x".join(map(str, trigger.image_size))
        raise UserError(f"trigger {path} is {own} px but the images are {height}x{width} px: use one of that size")
    if not trigger.mask.any():
        raise UserError(f"trigger {path} changes no pixel: tm is 1 everywhere, make it 0 where t replaces the image")


def load_triggers(path: str | Path) -> list[Replacing]:
    """Read `t` (K, H, W, 3) in 0..255 and `tm` of that shape; upstream stamps x tm + t. UserError for anything else."""
    arrays = _read_npz(path, ("t", "tm"))
    t, keep = arrays["t"], arrays["tm"]
    if max(t.size, keep.size) > MAX_VALUES:
        raise UserError(f"trigger {path} holds {t.size} values, more than {MAX_VALUES:,}: keep the triggers in use")
    if max(t.ndim, keep.ndim) > 4:
        raise UserError(f"trigger {path}: t has {t.ndim} dimensions: it must be (triggers, H, W, 3)")
    if t.ndim != 4 or t.shape[-1] != 3 or t.shape != keep.shape or not t.size:
        raise UserError(f"trigger {path}: t is {t.shape} and tm is {keep.shape}: both must be (triggers, H, W, 3)")
    for key, array in arrays.items():
        if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
            raise UserError(f"trigger {path}: {key} must hold finite numbers, not {array.dtype}")
    mask, added = 1 - keep.astype(np.float64), t.astype(np.float64) / 255
    if mask.min() < 0 or mask.max() > 1 or added.min() < 0 or (added > mask + 1e-9).any():
        raise UserError(f"trigger {path}: tm must lie in 0..1 and t in 0..255 (1 - tm), so that x tm + t is an image")
    pattern = np.clip(np.divide(added, mask, out=np.zeros_like(mask), where=mask > 0), 0, 1)
    return [Replacing(_to_images(m), _to_images(p)) for m, p in zip(mask, pattern, strict=True)]


def load_references(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Reference inputs: x (K, H, W, 3) uint8 and y (K,) int64 (downstream labels). UserError for anything else."""
    arrays = _read_npz(path, ("x", "y"))
    x, y = arrays["x"], arrays["y"]
    if max(x.ndim, y.ndim) > 4:
        raise UserError(f"reference file {path}: x has {x.ndim} dimensions: it must be uint8 (references, H, W, 3)")
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3 or not len(x):
        raise UserError(f"reference file {path}: x is {x.dtype} {x.shape}: it must be uint8 (references, H, W, 3)")
    if y.dtype.kind not in "iu" or y.size != len(x):
        raise UserError(f"reference file {path}: y is {y.dtype} {y.shape}: it must hold one integer for each of x")
    return x, y.reshape(-1).astype(np.int64)


def pair_references_triggers(references: np.ndarray, triggers: Sequence[Trigger], path: str | Path) -> list[Trigger]:
    """The trigger of each reference, by position. UserError if the trigger file `path` holds fewer than references."""
    if len(references) > len(triggers):
        told = f"{len(references)} references need as many triggers; {path} holds {len(triggers)}"
        raise UserError(f"{told}: add some, or say one_trigger: true")
    return list(triggers[: len(references)])


def _to_images(array: np.ndarray) -> Tensor:
    """(H, W, 3) -> (1, 3, H, W) float32."""
    return torch.from_numpy(array).permute(2, 0, 1)[None].float().contiguous()


def _read_npz(path: str | Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The named arrays; nothing is ever unpickled."""
    wanted = f"an npz file with arrays {' and '.join(keys)}"
    try:
        arrays = read_npz(path, keys)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: it must be {wanted}") from None
    except UserError:
        raise
    except TooLarge as error:
        raise UserError(f"{path} holds {error} values, more than a file of its size: it must be {wanted}") from error
    except Exception as error:  # numpy, zipfile, zlib and pickle each have their own
        raise UserError(f"{path} is damaged, pickled or no npz file: it must be {wanted} of numbers") from error
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise UserError(f"{path} has no array '{missing[0]}': it must be {wanted}")
    return arrays
