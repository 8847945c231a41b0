"""RNP's and ANP's masks as a histogram, and a pruning sweep's stops as a table."""

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

from dist_defend.counts import Count
from dist_defend.report import plots
from dist_defend.report.sheet import Cell, Head, Row, Sheet
from dist_defend.report.tables import signed

_BINS = 40
_HEAD = (
    Head("stop", "what was pruned; the first stop prunes nothing", is_number=False),
    Head("pruned", "neurons"),
    Head("ACC %, defender's", "on the defender's own images, which is what chooses the stop"),
    Head("ACC %"), Head("ΔACC", "since stop 0"), Head("ASR %"), Head("ΔASR", "since stop 0"),
    Head("chosen", is_number=False),
)  # fmt: skip


@matplotlib.rc_context(plots.STYLE)
def histogram(masks: Sequence[float], stops: Sequence[dict[str, Any]], name: str) -> plots.Panel:
    """How many neurons have which mask in [0, 1]; a solid line at the chosen threshold, a dotted one at the oracle's.

    stops: as Run.sweep reads them.
    """
    figure, axes = plots.blank(3.7, 2.4)
    axes.hist(masks, np.linspace(0, 1, _BINS + 1).tolist(), color=plots.CLEAN)
    axes.set(xlabel="mask", ylabel="neurons", yscale="log", xlim=(-0.02, 1.02))
    for key, style in (("chosen", "-"), ("oracle", ":")):
        for place in {stop["threshold"] for stop in stops if stop.get(key) and stop["threshold"] is not None}:
            axes.axvline(place, color=plots.INK, linewidth=1, linestyle=style)
    chosen = ", ".join(f"threshold {s['threshold']:g}" for s in stops if s.get("chosen") and s["threshold"] is not None)
    title = f"masks of {len(masks)} neurons" + (f", {chosen}" if chosen else "")
    return plots.panel(figure, title, f"{name}/masks", f"histogram of the masks that {name} learned")


def stops_sheet(stops: Sequence[dict[str, Any]], name: str) -> Sheet:
    """A row per stop in the order of the file, whose first, stop 0, is the model before anything is pruned."""
    rows = []
    for number, stop in enumerate(stops):
        rates = [_percent(stop, key) for key in ("acc_defence", "acc", "asr")]
        first = [_percent(stops[0], key) for key in ("acc", "asr")]
        threshold = stop["threshold"]
        told = f"mask ≤ {threshold:.4g}" if threshold is not None else "–"
        marks = [text for key, text in (("chosen", "chosen"), ("oracle", "by the oracle")) if stop.get(key)]
        changes = [rates[1] - first[0], rates[2] - first[1]]
        cells = [
            Cell(f"{number}: {'nothing pruned' if not stop['pruned'] else told}", number),
            Cell(str(stop["pruned"])),
        ]
        cells += [Cell(_told(rates[0]), rates[0])]
        for rate, change in zip(rates[1:], changes, strict=True):
            cells += [Cell(_told(rate), rate), Cell(signed(change), change)]
        rows.append(Row([*cells, Cell(", ".join(marks))]))
    return Sheet(f"stops {name}", _HEAD, [("", rows)])


def _percent(stop: dict[str, Any], key: str) -> float:
    return Count(stop[key]["correct"], stop[key]["n"]).percent if key in stop else math.nan


def _told(rate: float) -> str:
    return "–" if math.isnan(rate) else f"{rate:.1f}"
