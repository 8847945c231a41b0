"""A trigger from the user's own file: which of its pixels count, and their place in the image."""

import logging
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dist_defend.attacks.array_file import npz_names
from dist_defend.attacks.badencoder_npz import check_size, load_triggers
from dist_defend.attacks.pattern_file import Pattern, check_shape, open_pattern, read_mask, refuse_noise, shown_size
from dist_defend.attacks.trigger import Additive, Replacing, Trigger, TriggerOptions, Wrapping, as_images, replacing
from dist_defend.errors import UserError

log = logging.getLogger(__name__)

_PLACE = "say where it goes as a patch (corner and margin, or row and column)"
_REMEDY = f"{_PLACE}, make it that size with key 'size', or use one of that size"

Corner = Literal["upper_left", "upper_right", "lower_left", "lower_right", "centre"]


@dataclass(frozen=True)
class FromFile(TriggerOptions):
    """The user's own trigger. A patch needs a place: row and column of its upper left corner, or a corner and margin.

    Keys:
        file: a picture, npy or npz, or BadEncoder's npz with t and tm
        how: replace: the pattern's pixels replace the image's; add: added and clipped, npy and npz may be negative;
            wrap: added modulo 256; replace_channels, BackdoorBench's rule: as replace, but channels that are 0 keep the
            image's
        mask: a file of the pattern's size that says which pixels count; null: alpha does. Without alpha: of a pattern
            of the images' size the pixels that are not black, of a patch with a place all. A mask file and alpha are
            multiplied
        size: pixels of the longer side, to which a picture and its mask are resized; null: as they are
        row: row of the patch's upper edge; negative ones count from the image's lower border
        column: column of its left edge; negative ones count from the right border
        corner: corner of the image for the patch, instead of row and column
        margin: pixels left free at the corner's borders
    """

    file: str
    name: Literal["file"] = "file"
    how: Literal["replace", "replace_channels", "add", "wrap"] = "replace"
    mask: str | None = None
    size: int | None = None
    row: int | None = None
    column: int | None = None
    corner: Corner | None = None
    margin: int = 0

    def __post_init__(self) -> None:
        if self.mask is not None and self.how != "replace":
            raise ValueError(f"key 'mask' is {self.mask!r}; only how: replace has a mask")
        if self.size is not None and self.size < 1:
            raise ValueError(f"key 'size' is {self.size}; it must be at least 1 pixel")
        if (self.row is None) != (self.column is None):
            here, other = ("row", "column") if self.column is None else ("column", "row")
            raise ValueError(f"key '{here}' is {getattr(self, here)}; it needs '{other}' as well")
        if self.corner is not None and self.row is not None:
            raise ValueError(f"key 'corner' is {self.corner!r}; give either a corner, or row and column")
        if self.margin < 0 or (self.margin and self.corner in (None, "centre")):
            raise ValueError(
                f"key 'margin' is {self.margin}; it is the distance in pixels from the borders of a corner"
            )

    def build(self, image_size: int) -> Replacing | Additive | Wrapping:
        """UserError for a file that is missing, damaged or pickled, does not fit, or changes no pixel or all."""
        if self._is_published:
            return self._published(image_size)[0]
        pattern, mask = self._read(image_size)
        place = self._place(pattern, image_size)
        levels, mask = (_on_canvas(part, place, image_size) for part in (pattern.levels, mask))
        shares = mask if mask.ndim == 3 else mask[..., None]
        is_replaced = self.how.startswith("replace")
        self._check(shares if is_replaced else shares * levels, is_replaced)
        if is_replaced:
            return replacing(mask, levels)
        return (Wrapping if self.how == "wrap" else Additive)(as_images(shares * levels))

    def build_each(self, image_size: int) -> list[Trigger]:
        """All triggers of BadEncoder's npz; else the one of the file."""
        return list(self._published(image_size)) if self._is_published else [self.build(image_size)]

    @property
    def _is_published(self) -> bool:
        return self.how == "replace" and self.mask is None and _has_keep_mask(self.file)

    def _read(self, image_size: int) -> tuple[Pattern, np.ndarray]:
        """The pattern at its final size, and which of it counts, (H, W) or (H, W, 3) in [0, 1]."""
        pattern = open_pattern(self.file, lowest=-255 if self.how == "add" else 0)
        size = pattern.size if self.size is None else _scaled(pattern.size, self.size)
        if pattern.is_picture and self.size is not None and max(size) > image_size:  # before it is made that large
            shape = shown_size((image_size, image_size))
            raise UserError(
                f"pattern {self.file} is {shown_size(size)} px but the images are {shape} px: make it smaller with key "
                "'size'"
            )
        if not self._has_place and self.mask is None:
            refuse_noise(pattern, f"save it as PNG, {'give a mask, ' * (self.how == 'replace')}or {_PLACE}")
            if self.how == "replace" and pattern.opacity is None:
                pattern = replace(pattern, opacity=np.where(pattern.levels.any(2), 255, 0).astype(np.uint8))
        own = pattern.size
        pattern = pattern.resized(*size)  # which refuses arrays, before a mask of that size is made
        mask = np.ones(size) if self.mask is None else read_mask(self.mask, own, "its pattern is", size)
        if pattern.alpha is not None:
            mask = mask * (pattern.alpha if mask.ndim == 2 else pattern.alpha[..., None])
        if self.how == "replace_channels":
            mask = (pattern.levels > 0) * mask[..., None]
        return pattern, mask

    @property
    def _has_place(self) -> bool:
        return self.corner is not None or self.row is not None

    def _published(self, image_size: int) -> list[Replacing]:
        """The triggers of BadEncoder's npz, which holds masks of the images' size."""
        if self._has_place or self.size is not None:
            raise UserError(f"trigger {self.file} holds t and tm, with a place of their own: leave out size and place")
        triggers = load_triggers(self.file)
        for trigger in triggers:
            check_size(trigger, image_size, self.file)
        return triggers

    def _place(self, pattern: Pattern, image_size: int) -> tuple[int, int]:
        """Row and column of the pattern's upper left corner."""
        height, width = pattern.size
        if max(height, width) > image_size:
            remedy = "make it smaller with key 'size'" if pattern.is_picture else "use one that fits"
            check_shape(pattern, (image_size, image_size), "the images are", remedy)
        if not self._has_place:
            check_shape(pattern, (image_size, image_size), "the images are", _REMEDY)
            return 0, 0
        if self.row is not None and self.column is not None:
            row, column = (at + image_size * (at < 0) for at in (self.row, self.column))
        elif self.corner == "centre":
            row, column = (image_size - height) // 2, (image_size - width) // 2
        else:
            assert self.corner is not None
            vertical, _, horizontal = self.corner.partition("_")
            row = self.margin if vertical == "upper" else image_size - self.margin - height
            column = self.margin if horizontal == "left" else image_size - self.margin - width
        if min(row, column) < 0 or row + height > image_size or column + width > image_size:
            asked = (
                f"row {self.row}, column {self.column}"
                if self.corner is None
                else f"{self.corner}, {self.margin} px in"
            )
            raise UserError(
                f"trigger {self.file}: {shown_size(pattern.size)} px at {asked} do not fit into the images of "
                f"{shown_size((image_size, image_size))} px: change the place, or key 'size'"
            )
        return row, column

    def _check(self, changes: np.ndarray, is_replaced: bool) -> None:
        """UserError for a trigger that does nothing, and for one that leaves nothing. changes: (H, W, 1 or 3)."""
        where = np.argwhere(changes.any(2))
        if not len(where):
            raise UserError(
                f"trigger {self.file} changes no pixel: it is black or transparent everywhere, or its mask is 0"
            )
        if is_replaced and changes.min() >= 1:
            raise UserError(
                f"trigger {self.file} replaces every pixel, so that all images become the same: give a mask or "
                "transparency, make it smaller, or use the trigger 'blended'"
            )
        (top, left), (bottom, right) = where.min(0), where.max(0)
        told = "trigger %s: %d of %d pixels, in rows %d to %d and columns %d to %d"
        log.info(told, self.file, len(where), changes.shape[0] * changes.shape[1], top, bottom, left, right)


def _scaled(size: tuple[int, int], longer: int) -> tuple[int, int]:
    """Height and width whose longer one is as asked, in the same proportion."""
    height, width = (max(1, round(side * longer / max(size))) for side in size)
    return height, width


def _on_canvas(part: np.ndarray, place: tuple[int, int], image_size: int) -> np.ndarray:
    """(h, w) or (h, w, 3) on zeros of the images' size."""
    canvas = np.zeros((image_size, image_size, *part.shape[2:]))
    canvas[place[0] : place[0] + part.shape[0], place[1] : place[1] + part.shape[1]] = part
    return canvas


def _has_keep_mask(path: str) -> bool:
    """Whether the file is an npz in BadEncoder's layout."""
    try:
        return {"t", "tm"} <= set(npz_names(path))
    except Exception:  # OSError, zipfile's own, UserError
        return False  # open_pattern says what is wrong
