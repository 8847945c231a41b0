"""Pictures for the page: loss curves and feature maps as inline SVG, images as PNG data URIs.

SVG is inlined so that its text and axes take the page's colour, in light and dark. Whatever names an address in an SVG
(DOCTYPE, metadata, name spaces) is dropped: HTML needs none of it.
"""

import base64
import html
import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dist_defend.counts import Count
from dist_defend.screen import printable

INK = "#010203"  # stands for the page's text colour until the SVG is inlined
PALETTE = ["#4477aa", "#ee8866", "#228833", "#aa3377", "#bbbb44", "#66ccee"]  # after Paul Tol's colour-blind safe sets
CLEAN, TARGET, TRIGGERED = "#9db2c8", "#2f6cb0", "#cc4433"
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,
}
SWEPT = {"acc": "ACC", "asr": "ASR", "acc_defence": "ACC, defender's images"}
_LABELS = SWEPT | {"asr_all": "ASR-all", "ra": "RA"}
RATE_COLOURS = {"acc": TARGET, "asr": TRIGGERED, "asr_all": PALETTE[1], "ra": PALETTE[2]}
IMPORTANT = ("acc", "asr", "loss", "ra", "asr_all")
MOST_LINES = 5
_SHORT = 13  # letters of names of which three fit beside each other
_MAGNIFIED = 2.2  # at most, of a figure on the page
_NOT_DRAWN = {"step", "stage", "epoch", "time", "work_seconds", "images_per_second", "grad_norm"}
_MOST_POINTS = 300


@dataclass(frozen=True)
class Panel:
    """A picture of its own, so that a page can put several side by side or below each other.

    svg: for the page. figure: the same for files of its own, whose name it gives. is_folded: shown when asked for.
    """

    title: str
    svg: str
    name: str
    figure: Figure = field(repr=False)
    is_folded: bool = False


def curves(rows: Sequence[dict[str, Any]], name: str, before: Mapping[str, float]) -> list[Panel]:
    """A run's scalars over its steps: a panel per stage for what the steps log, another for what evaluations log.

    rows: lines of metrics.jsonl; those of training steps have images_per_second. ``name`` tells runs apart. before:
    percent by metric of the model that the run was given, where known. A panel has five lines at most, the first of
    IMPORTANT; the other scalars of its stage come in folded panels.
    """
    panels = []
    for (stage, is_training), group in by_stage(rows).items():
        series = list(scalars(group).items())
        title, known = (stage, {}) if is_training else (f"{stage}, evaluated", before)
        for start in range(0, len(series), MOST_LINES):
            part, told = dict(series[start : start + MOST_LINES]), f"{title}, more" if start else title
            panel = curve_panel(part, told, f"{name}/{start}" if start else name, before=known)
            panels.append(replace(panel, is_folded=start > 0))
    return panels


def by_stage(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, bool], list[dict[str, Any]]]:
    """Lines of metrics.jsonl by their stage, and by whether a training step logged them."""
    groups: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["stage"], "images_per_second" in row), []).append(row)
    return groups


@matplotlib.rc_context(STYLE)
def curve_panel(
    series: Mapping[str, tuple[np.ndarray, ...]],
    title: str,
    name: str,
    axis: str = "step",
    before: Mapping[str, float] | None = None,
) -> Panel:
    """Lines in one figure. series: what it is -> (x, y), or (x, y, low, high) with a band around y, each (P,).

    Rates in percent have a linear axis from 0 to 100. before: what they were at step 0, as a hollow point.
    """
    figure, axes = blank(3.7, 2.2)
    values = np.concatenate([each[1] for each in series.values()])
    if is_rates := all(is_rate(key) for key in series) and values.max() <= 100 and values.min() >= 0:
        axes.set(ylim=(-3, 103), ylabel="%")
    elif values.min() > 0 and values.max() > 30 * values.min():
        axes.set_yscale("log")
    for (key, (x, y, *band)), colour in zip(series.items(), itertools.cycle(PALETTE), strict=False):
        is_main = key in ("loss", "acc", "asr") or len(series) == 1
        colour = RATE_COLOURS.get(key, colour) if is_rates else colour
        first = (before or {}).get(key, math.nan)
        if is_rates and not math.isnan(first):
            axes.plot([0], [first], "o", color=colour, markerfacecolor="none", markersize=5)
            axes.plot([0, x[0]], [first, y[0]], color=colour, linewidth=0.8, linestyle=":")
        marker = "" if len(x) > 20 else "."
        label = _LABELS.get(key, plain(key)) if is_rates else plain(key)
        axes.plot(x, y, color=colour, linewidth=1.4 if is_main else 0.8, label=label, marker=marker)
        if band:
            axes.fill_between(x, band[0], band[1], color=colour, alpha=0.2, linewidth=0)
    axes.set_xlabel("pruned neurons" if axis == "pruned" else axis)
    is_narrow = max(map(len, series)) <= _SHORT
    figure.legend(loc="outside upper left", ncols=3 if is_narrow else 2)
    return panel(figure, title, f"{name}/{title}", f"{', '.join(series)} of {title}")


def is_rate(name: str) -> bool:
    """Whether a scalar of an evaluation is a rate in percent; train_acc, which steps log, is in [0, 1]."""
    parts = name.split("/")[-1].split("_")
    return ("acc" in parts or "asr" in parts or name == "ra" or name in SWEPT.values()) and parts[0] != "train"


@matplotlib.rc_context(STYLE)
def sweep(rows: Sequence[dict[str, Any]], name: str) -> Panel:
    """ACC and ASR in percent against the threshold, or the number of pruned neurons where there are no thresholds.

    rows: as Run.sweep reads them; counts "acc" and "asr" are of test images, "acc_defence" of the defender's. Stops
    without a threshold are left out of a sweep over thresholds. The panel's title tells the chosen stop.
    """
    by_threshold = any(row.get("threshold") is not None for row in rows)
    axis = "threshold" if by_threshold else "pruned"
    stops = sorted((row for row in rows if row.get(axis) is not None), key=lambda row: (row["pruned"], row[axis]))
    figure, axes = blank(3.7, 2.4)
    for (key, label), colour in zip(SWEPT.items(), (TARGET, TRIGGERED, CLEAN), strict=True):
        points = [(row[axis], Count(row[key]["correct"], row[key]["n"]).percent) for row in stops if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=label, marker=".", linewidth=1.2)
    for key, style in (("chosen", "-"), ("oracle", ":")):
        for place in {row[axis] for row in stops if row.get(key)}:
            axes.axvline(place, color=INK, linewidth=0.8, linestyle=style)
    axes.set(xlabel="threshold" if by_threshold else "pruned neurons", ylabel="%", ylim=(-3, 103))
    if axes.has_data():
        figure.legend(loc="outside upper left", ncols=3)
    title = ", ".join(f"{row['pruned']} pruned" for row in rows if row.get("chosen"))
    return panel(figure, title, f"{name}/sweep", f"ACC and ASR of {name} at each stop of the pruning")


def _importance(name: str) -> int:
    """Less comes first: rates and the loss, then other losses, then all else as it comes."""
    if name in IMPORTANT:
        return IMPORTANT.index(name)
    return len(IMPORTANT) + (not name.endswith("loss") and not is_rate(name))


def plain(name: str) -> str:
    """A name from a file as the text of a figure: no formula, and not hidden for its underscore."""
    told = printable(name, 60).replace("$", r"\$")
    return f" {told}" if told.startswith("_") else told


def scalars(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """key -> (steps, values) of everything finite, IMPORTANT first, averaged into at most 300 points."""
    out = {}
    keys = dict.fromkeys(key for row in rows for key in row if key not in _NOT_DRAWN)
    for key in sorted(keys, key=_importance):
        pairs = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
        points = np.array([pair for pair in pairs if np.isfinite(pair[1])], dtype=float)
        if len(points):
            blocks = np.array_split(points, min(len(points), _MOST_POINTS))
            out[key] = tuple(np.array([block.mean(axis=0) for block in blocks]).T)
    return out


@matplotlib.rc_context(STYLE)
def feature_map(
    clean: np.ndarray, triggered: np.ndarray, is_target: np.ndarray | None, method: Literal["pca", "tsne"], name: str
) -> Panel:
    """One encoder's view of a task's test images, clean and triggered, projected together to two dimensions.

    clean and triggered: (M, D); is_target: (M,) bool, clean images of the target class, None when it is not known.
    The panel's title says how much of the variance a PCA shows.
    """
    points, share = project(np.concatenate([clean, triggered]).astype(np.float64), method)
    of_target = np.zeros(len(clean), bool) if is_target is None else is_target
    figure, axes = blank(2.7, 2.4)
    at_clean, at_triggered = points[: len(clean)], points[len(clean) :]
    for places, colour, size in (
        (at_clean[~of_target], CLEAN, 14),
        (at_clean[of_target], TARGET, 14),
        (at_triggered, TRIGGERED, 3),
    ):
        axes.scatter(places[:, 0], places[:, 1], s=size, color=colour, alpha=0.6, linewidths=0, rasterized=True)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, alpha=0.3)
    return panel(figure, share, f"{name}/features", f"features of {name}: clean and triggered test images")


def project(points: np.ndarray, method: str) -> tuple[np.ndarray, str]:
    from sklearn.decomposition import PCA  # imported here: it costs a second, and not every report has features
    from sklearn.manifold import TSNE

    if method == "tsne":
        perplexity = min(30.0, (len(points) - 1) / 3)
        return TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(points), ""
    pca = PCA(2, random_state=0)
    with np.errstate(invalid="ignore"):  # identical points have no variance to explain
        projected = pca.fit_transform(points)
    share = np.nan_to_num(pca.explained_variance_ratio_).sum()
    return projected, f"{share:.0%} of the variance"


def image_grid(rows: Sequence[np.ndarray], gap: int = 2) -> str:
    """PNG data URI of rows of images, each (N, H, W, 3) uint8, at their own size with transparent gaps."""
    count, height, width, _ = rows[0].shape
    sheet = np.zeros((len(rows) * (height + gap) - gap, count * (width + gap) - gap, 4), np.uint8)
    for i, images in enumerate(rows):
        for j, image in enumerate(images):
            top, left = i * (height + gap), j * (width + gap)
            sheet[top : top + height, left : left + width, :3] = image
            sheet[top : top + height, left : left + width, 3] = 255
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "png", optimize=True)
    return data_uri(buffer.getvalue())


def data_uri(png: bytes) -> str:
    """The picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def blank(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches, and its axes."""
    figure = Figure(figsize=(width, height), dpi=160)
    return figure, figure.subplots()


def panel(figure: Figure, title: str, name: str, description: str) -> Panel:
    """The figure as a panel. The name keeps its ids apart from other figures' on the page, and is its file's."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    box = re.search(r'viewBox="[^"]*"', svg)
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r' id="[A-Za-z][\w.]*_\d+"', "", body)
    body = re.sub(r" font-family: [^;\"]*;", "", body)  # page.css has the page's own for all of them
    widest = round(_MAGNIFIED * 72 * figure.get_figwidth())  # of px on the page
    head = f'<svg {box.group() if box else ""} style="max-width:{widest}px" role="img" '
    head += f'aria-label="{html.escape(description)}">'
    return Panel(title, head + body.replace(INK, "currentColor"), name, figure)
