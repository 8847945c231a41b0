"""ACC against ASR, one point per model with its name beside it; a defence wants to be in the upper left corner."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dist_defend.report import plots
from dist_defend.report.tables import Line

_MOST_NAMED = 24  # points, up to which each has its name beside it
_FONT = 7.5  # points
_LEADER: Any = {"arrowstyle": "-", "linewidth": 0.4, "color": plots.INK}
_STEPS = [(side, up) for up in (0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6) for side in (1, -1)]


class Point(NamedTuple):
    """Percent. before: ASR and ACC of the model that this one was made of, nan where not told.

    spread: standard deviations of ASR and ACC, nan where there are none.
    """

    name: str
    kind: str
    asr: float
    acc: float
    before: tuple[float, float] = (math.nan, math.nan)
    spread: tuple[float, float] = (math.nan, math.nan)
    is_hollow: bool = False  # of an oracle


def points_of(lines: Sequence[Line]) -> list[Point]:
    """A task's lines that have both rates. The name tells the run where a kind comes twice."""
    kinds = [line.kind for line in lines]
    found = []
    for line in lines:
        asr, acc = line.scores["asr"], line.scores["acc"]
        if not math.isnan(asr.mean) and not math.isnan(acc.mean):
            name = line.kind if kinds.count(line.kind) == 1 else f"{line.kind}, {line.run.rsplit('/', 1)[-1]}"
            before = (line.before["asr"], line.before["acc"])
            found.append(Point(name, line.kind.removesuffix(" (oracle)"), asr.mean, acc.mean, before,
                               (asr.std, acc.std), line.is_oracle))  # fmt: skip
    return found


@matplotlib.rc_context(plots.STYLE)
def panel(points: Sequence[Point], task: str) -> plots.Panel:
    """Axes from 0 to 100 %. A dotted line leads from the point before a defence, a cross, to the one after it."""
    figure, axes = plots.blank(4.9, 3.1)
    colours: dict[str, str] = {}
    for point in points:
        colours.setdefault(point.kind, plots.PALETTE[len(colours) % len(plots.PALETTE)])
    for before in dict.fromkeys(point.before for point in points if not math.isnan(sum(point.before))):
        axes.plot(*before, "x", color=plots.INK, markersize=6, markeredgewidth=1.2, zorder=3)
    for point in points:
        colour = colours[point.kind]
        if not math.isnan(sum(point.before)):
            axes.plot((point.before[0], point.asr), (point.before[1], point.acc), ":", color=colour, linewidth=0.8)
        spread = np.nan_to_num(point.spread)
        axes.errorbar(
            point.asr, point.acc, spread[1], spread[0], fmt="D" if point.is_hollow else "o", color=colour, markersize=5,
            markerfacecolor="none" if point.is_hollow else colour, elinewidth=0.7, zorder=4,
        )  # fmt: skip
    axes.set(xlabel="ASR, %", ylabel="ACC, %", xlim=(-3, 103), ylim=(-3, 103))
    axes.grid(alpha=0.2, linewidth=0.5)
    if len(points) <= _MOST_NAMED:
        name_points(figure, axes, points)
    else:
        for kind, colour in list(colours.items())[:_MOST_NAMED]:
            axes.plot([], [], "o", color=colour, label=plots.plain(kind))
        figure.legend(loc="outside right upper")
    return plots.panel(figure, "", f"tradeoff/{task}", f"ACC against ASR of each model on {task}")


def name_points(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Each point's name beside it, where it hides neither a point nor another name, with a thin line to it if far."""
    figure.draw_without_rendering()  # fixes where the axes lie
    per_point = figure.dpi / 72
    places = axes.transData.transform([(point.asr, point.acc) for point in points]) / per_point
    crosses = [point.before for point in points if not math.isnan(sum(point.before))]
    others = axes.transData.transform(crosses) / per_point if crosses else np.zeros((0, 2))
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in [*places, *others]]
    frame = axes.get_window_extent()
    left, right = frame.x0 / per_point, frame.x1 / per_point
    for point, (x, y) in zip(points, places, strict=True):
        name = plots.plain(point.name)
        width, height = 0.56 * _FONT * len(name), 1.15 * _FONT
        boxes = [_box(x, y, side, up * height, width, height) for side, up in _STEPS]
        fitting = [
            box for box in boxes if left <= box[0] and box[2] <= right and not any(_meets(box, t) for t in taken)
        ]
        box = fitting[0] if fitting else boxes[0]
        taken.append(box)
        up = (box[1] + box[3]) / 2 - y
        is_left = box[2] < x  # then the name ends at its box's end, however wide the page's letters are
        axes.annotate(
            name, (point.asr, point.acc), (box[2 if is_left else 0] - x, up), textcoords="offset points",
            fontsize=_FONT, ha="right" if is_left else "left", va="center", annotation_clip=False,
            arrowprops={**_LEADER, "visible": abs(up) > height},
        ).set_in_layout(False)  # fmt: skip


def _box(x: float, y: float, side: int, up: float, width: float, height: float) -> tuple[float, float, float, float]:
    """Left, bottom, right, top of a name beside (x, y): to the right of it if side is 1, else to the left."""
    start = x + 6 if side > 0 else x - 6 - width
    return start, y + up - height / 2, start + width, y + up + height / 2


def _meets(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    apart_x = first[2] <= second[0] or second[2] <= first[0]
    return not (apart_x or first[3] <= second[1] or second[3] <= first[1])
