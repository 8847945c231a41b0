"""A contact sheet: the first images of each class, each beside what a trigger makes of it."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from dist_defend.attacks.stamping import stamp_pixels
from dist_defend.attacks.trigger import Trigger
from dist_defend.data.store import PreparedDataset
from dist_defend.screen import printable

_TILE = 64  # pixels; smaller images are enlarged by a whole factor, larger ones shrunk
_COLUMNS = 8  # images per class
_MAX_ROWS = 50  # classes shown
_MARGIN = 4
_CAPTION = 120


def contact_sheet(dataset: PreparedDataset, triggers: Sequence[Trigger] = ()) -> Image.Image:
    """One line per class: its name, then for up to 8 images, the source's first, the image and its stamped copies."""
    lines = _lines(dataset)
    group = (1 + len(triggers)) * _TILE + _MARGIN
    size = (_CAPTION + _COLUMNS * group, len(lines) * (_TILE + _MARGIN) + _MARGIN)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for line, (name, rows) in enumerate(lines):
        top = _MARGIN + line * (_TILE + _MARGIN)
        draw.text((_MARGIN, top + _TILE // 2 - 6), printable(name[:18])[:18], fill="black")
        for column, row in enumerate(rows):
            image = dataset.image(int(row))
            for copy, pixels in enumerate([image, *(stamp_pixels(image[None], trigger)[0] for trigger in triggers)]):
                sheet.paste(_tile(pixels), (_CAPTION + column * group + copy * _TILE, top))
    return sheet


def _lines(dataset: PreparedDataset) -> list[tuple[str, np.ndarray]]:
    if not (dataset.labels >= 0).any():
        rows = np.arange(min(len(dataset), 8 * _COLUMNS))
        return [("unlabelled", rows[i : i + _COLUMNS]) for i in range(0, len(rows), _COLUMNS)]
    found = [(name, dataset.rows_of_class(c)[:_COLUMNS]) for c, name in enumerate(dataset.classes)]
    return [(name, rows) for name, rows in found if len(rows)][:_MAX_ROWS]


def _tile(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels)
    factor = _TILE // max(image.size)
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((_TILE, _TILE), Image.Resampling.BILINEAR)
    return image
