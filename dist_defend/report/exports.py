"""Every figure of a page as SVG and PDF, every table as CSV and LaTeX: files for a paper."""

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dist_defend.files import write_atomic
from dist_defend.report import plots
from dist_defend.report.sheet import Sheet

_MOST_LETTERS = 80
_PIXELS_PER_INCH = 72


def write(
    folder: Path, panels: Sequence[plots.Panel], pictures: Sequence[tuple[str, str]], sheets: Sequence[Sheet]
) -> int:
    """Files named after what they show, in ``folder``; returns how many. OSError as files have it.

    pictures: names and PNG data URIs. Files of an earlier report with the same names are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = [(panel.name, panel.figure) for panel in panels]
    figures += [(name, picture(uri)) for name, uri in pictures]
    taken: set[str] = set()
    for name, figure in figures:
        stem = file_name(name, taken)
        for kind in ("svg", "pdf"):
            buffer = io.BytesIO()
            metadata = {"Date": None} if kind == "svg" else {"CreationDate": None}
            with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "pdf.fonttype": 42}):
                figure.savefig(buffer, format=kind, metadata=metadata)
            write_atomic(folder / f"{stem}.{kind}", buffer.getvalue())
    for sheet in sheets:
        stem = file_name(f"table_{sheet.name}", taken)
        write_atomic(folder / f"{stem}.csv", sheet.to_csv())
        write_atomic(folder / f"{stem}.tex", sheet.to_latex())
    return 2 * (len(figures) + len(sheets))


def file_name(name: str, taken: set[str]) -> str:
    """A name that no folder is in, no file is hidden by, and no other figure has; it is added to ``taken``."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")[-_MOST_LETTERS:] or "figure"
    found, number = stem, 1
    while found.lower() in taken:
        number += 1
        found = f"{stem}_{number}"
    taken.add(found.lower())
    return found


def picture(uri: str) -> Figure:
    """A picture of pixels as a figure, each pixel as it is."""
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])), formats=["PNG"]) as image:
        pixels = np.asarray(image.convert("RGBA"))
    height, width = pixels.shape[:2]
    scale = max(1, round(200 / max(1, min(height, width))))
    figure = Figure(figsize=(scale * width / _PIXELS_PER_INCH, scale * height / _PIXELS_PER_INCH))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(pixels, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    return figure
