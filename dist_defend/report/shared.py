"""Figures for many runs: all of a method in one, and thumbnails, so that a page of hundreds of runs stays small."""

import difflib
import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image, ImageColor

from dist_defend.counts import Count
from dist_defend.report import plots
from dist_defend.report.runs import Run

MOST_OWN = 12  # runs, up to which each has its own figures
_MOST_PANELS = 24
_POSITIONS = 60  # at which runs are compared
_PERCENTILES = (10, 50, 90)
_SIDE, _COLOURS = 32, 64  # pixels and colours of a picture's thumbnail
_MAP_SIDE = 64  # pixels
_MAP_COLOURS = ("#000000", plots.CLEAN, plots.TARGET, plots.TRIGGERED)  # the first is transparent

_Series = tuple[np.ndarray, np.ndarray]


def curves(runs: Sequence[Run]) -> list[tuple[str, list[plots.Panel]]]:
    """By method: a panel per stage for what the steps log, another for evaluations; at most 24, what most runs have."""
    groups: dict[tuple[str, str, bool], dict[str, list[_Series]]] = {}
    for run in runs:
        for (stage, is_training), rows in plots.by_stage(run.metrics[0]).items():
            group = groups.setdefault((_method(run), stage, is_training), {})
            for key, series in plots.scalars(rows).items():
                group.setdefault(key, []).append(series)
    counts = {name: max(map(len, group.values())) for name, group in groups.items() if group}
    found: dict[str, list[plots.Panel]] = {}
    for method, stage, is_training in sorted(counts, key=lambda name: -counts[name])[:_MOST_PANELS]:
        every = groups[method, stage, is_training]
        bands = {key: _band(every[key]) for key in list(every)[: plots.MOST_LINES]}
        title = stage if is_training else f"{stage}, evaluated"
        panel = plots.curve_panel({key: band for key, band in bands.items() if len(band[0])}, title, f"all/{method}")
        found.setdefault(method, []).append(panel)
    return list(found.items())


def sweeps(runs: Sequence[Run]) -> list[tuple[str, plots.Panel]]:
    """By method: ACC and ASR in percent against the threshold, or the number of pruned neurons."""
    groups: dict[tuple[str, str], dict[str, list[_Series]]] = {}
    for run in runs:
        axis = "threshold" if any(stop.get("threshold") is not None for stop in run.sweep) else "pruned"
        group = groups.setdefault((_method(run), axis), {})
        for key, label in plots.SWEPT.items():
            stops = [stop for stop in run.sweep if stop.get(axis) is not None and key in stop]
            if stops:
                percents = [Count(stop[key]["correct"], stop[key]["n"]).percent for stop in stops]
                group.setdefault(label, []).append(
                    (np.array([stop[axis] for stop in stops], float), np.array(percents))
                )
    panels = []
    for (method, axis), every in groups.items():
        bands = {label: band for label, series in every.items() if len((band := _band(series))[0])}
        if bands:
            title = f"{max(map(len, every.values()))} runs"
            panels.append((method, plots.curve_panel(bands, title, f"all/{method}/{axis}", axis)))
    return panels


def _method(run: Run) -> str:
    return str(run.result.get("method", "–"))


def _band(every: Sequence[_Series]) -> tuple[np.ndarray, ...]:
    """Positions (P,) and the runs' median, 10th and 90th percentile there, each (P,); a run counts where it was."""
    every = [(x[order], y[order]) for x, y in every if len(order := np.argsort(x, kind="stable"))]
    first, last = min(x[0] for x, _ in every), max(x[-1] for x, _ in every)
    positions = np.unique(np.linspace(first, last, _POSITIONS))
    values = np.array([np.interp(positions, x, y, left=np.nan, right=np.nan) for x, y in every])
    is_known = ~np.isnan(values).all(axis=0)
    low, median, high = np.nanpercentile(values[:, is_known], _PERCENTILES, axis=0)
    return positions[is_known], median, low, high


def thumbnail(pictures: Sequence[np.ndarray]) -> str:
    """PNG data URI of pictures (H, W, 3) uint8 of one size below each other, small and in few colours."""
    image = Image.fromarray(np.concatenate(pictures))
    image.thumbnail((_SIDE, _SIDE * len(pictures)))
    return _png(image.quantize(_COLOURS))


def generated(png: bytes) -> str:
    """The same of a grid of images that a generator made."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        return thumbnail([np.asarray(image.convert("RGB"))])


def feature_map(
    clean: np.ndarray, triggered: np.ndarray, is_target: np.ndarray | None, method: Literal["pca", "tsne"]
) -> str:
    """PNG data URI of what plots.feature_map draws, a pixel for each image. Arguments as there."""
    points, _ = plots.project(np.concatenate([clean, triggered]).astype(np.float64), method)
    low, high = points.min(axis=0), points.max(axis=0)
    places = np.rint((points - low) / np.where(high > low, high - low, 1) * (_MAP_SIDE - 1)).astype(int)
    kinds = np.full(len(points), 3, np.uint8)
    kinds[: len(clean)] = 1 if is_target is None else 1 + is_target
    canvas = np.zeros((_MAP_SIDE, _MAP_SIDE), np.uint8)
    for kind in (1, 2, 3):
        own = places[kinds == kind]
        canvas[_MAP_SIDE - 1 - own[:, 1], own[:, 0]] = kind
    image = Image.fromarray(canvas, "P")
    image.putpalette([level for colour in _MAP_COLOURS for level in ImageColor.getrgb(colour)])
    return _png(image, transparency=0)


def _png(image: Image.Image, **options: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True, **options)
    return plots.data_uri(buffer.getvalue())


def configurations(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Name and text: the first run of a method has its whole configuration, the others what differs from that one."""
    first: dict[str, Run] = {}
    found = []
    for run in runs:
        model = first.setdefault(_method(run), run)
        text = run.config_text
        if model is not run:
            lines = difflib.unified_diff(model.config_text.splitlines(), text.splitlines(), lineterm="", n=0)
            changed = [line for line in list(lines)[2:] if not line.startswith("@@")]
            text = "\n".join([f"as {model.label}" + (", but for:" if changed else ""), *changed])
        found.append((run.label, text))
    return found
