"""A sweep's report.html: defences side by side and by attack, trade-offs, leaderboard, what is missing, runs."""

import math
import os
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd

from dist_defend.report import html, plots, tradeoff
from dist_defend.report.sheet import Cell, Head, Row, Sheet
from dist_defend.screen import printable
from dist_defend.sweep.comparison import ATTACK, SETTING, Comparison
from dist_defend.sweep.grid import Sweep

_NUMBERS = {
    "ACC", "ASR", "RA", "DER", "n", "ΔACC", "ΔASR", "oracle ACC", "oracle ASR", "device-s", "× cheapest", "MAD ACC",
    "MAD ASR", "ACC re-tuned", "ASR re-tuned", "q = 0", "control", "queried", "its control", "networks", "published",
    "expected", "tolerance", "ours", "difference", "AUC", "no score",
}  # fmt: skip
_MEANING = {
    "ACC": "clean test images classified as their label, percent",
    "ASR": "triggered test images whose label is not the target, classified as the target, percent",
    "RA": "triggered test images whose label is not the target, classified as their label, percent",
    "DER": "(max(0, drop of ASR) - max(0, drop of ACC) + 1) / 2, percent: 100 is perfect, 50 changes nothing",
    "device-s": "seconds times devices of one point, without those it comes after",
    "ΔACC": "mean difference to the first setting of the file on the same networks, and half of its 95 % interval",
    "ΔASR": "mean difference to the first setting of the file on the same networks, and half of its 95 % interval",
}
_MOST_PLOTS = 12
_MOST_LISTED = 3000  # points in the list of runs
_MOST_SHOWN = 60  # of them, up to which the list is open
_MOST_CELLS = 40  # rows or columns of a heat map


def sheet(name: str, table: Sequence[Sequence[str]], caption: str) -> Sheet:
    """A header and lines of text as a sheet that is sorted by the numbers its cells begin with."""
    head = [Head(text, _MEANING.get(text, ""), text in _NUMBERS) for text in (table[0] if table else ())]
    return Sheet(name, head, [("", [Row([Cell(printable(text)) for text in line]) for line in table[1:]])], caption)


def render(sweep: Sweep, rows: pd.DataFrame, comparison: Comparison, sheets: Sequence[Sheet]) -> str:
    """The page. sheets: the leaderboard first."""
    states = rows.drop_duplicates("key")["state"].value_counts().to_dict()
    seconds = rows.drop_duplicates("key")["device_seconds"].sum() if "device_seconds" in rows else 0.0
    lacking = rows[rows["state"] != "done"].to_dict("records")
    return html.fill(
        "sweep.html",
        name=printable(sweep.path.stem),
        done=states.get("done", 0),
        total=len(sweep.points),
        hours=f"{seconds / 3600:.1f}",
        leaderboard=sheets[0] if sheets[0].head else None,
        others=sheets[1:],
        tradeoffs=tradeoffs(comparison),
        heats=heat_maps(comparison),
        missing=[(row["stage"], row["key"], printable(row["name"]), _reason(row)) for row in lacking],
        runs=runs_sheet(sweep, rows),
        has_open_runs=len(sweep.points) <= _MOST_SHOWN,
    )


def _reason(row: dict[Any, Any]) -> str:
    return printable(row["reason"]) if row["state"] == "damaged" else str(row["state"])


def tradeoffs(comparison: Comparison) -> list[tuple[str, plots.Panel]]:
    """A panel per task and attack, the first twelve: each defence's mean over networks, and what was before it."""
    found: list[tuple[str, plots.Panel]] = []
    if not comparison.defences:
        return found
    for (task, attack), own in comparison.rows.groupby(["task", ATTACK], sort=False):
        if len(found) < _MOST_PLOTS and (points := _points(own)):
            title = printable(f"{task}, {attack}" if attack else task, 80)
            found.append((title, tradeoff.panel(points, title)))
    return found


def _points(rows: pd.DataFrame) -> list[tradeoff.Point]:
    points = []
    for (setting, kind), own in rows.groupby([SETTING, "kind"], sort=False):
        names = ["asr", "acc", "asr_before", "acc_before"]
        numbers = own[names].astype(float)
        asr, acc, *before = numbers.mean().tolist()
        if not math.isnan(asr + acc):
            spread = numbers[["asr", "acc"]].std().tolist()
            name = printable(setting if kind in str(setting).split() else f"{kind} {setting}", 40)
            points.append(tradeoff.Point(name, printable(kind, 40), asr, acc, (before[0], before[1]),
                                         (spread[0], spread[1])))  # fmt: skip
    return points


def heat_maps(comparison: Comparison) -> list[plots.Panel]:
    """ASR and ACC, a row per attack and a column per defence: means over networks and tasks, in percent."""
    panels = []
    for rate, wide in comparison.wide.items():
        means = wide.groupby(ATTACK, sort=False).mean().iloc[:_MOST_CELLS, :_MOST_CELLS]
        columns_of: list[Any] = means.columns.to_list()
        named = [(str(setting), str(kind)) for setting, kind in columns_of]
        columns = [setting if kind in setting.split() else f"{kind} {setting}" for setting, kind in named]
        panels.append(_heat_map(means.to_numpy(float), list(means.index), columns, rate))
    return panels


@matplotlib.rc_context(plots.STYLE)
def _heat_map(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], rate: str) -> plots.Panel:
    """values (R, C) in percent, nan where nothing was counted. Dark is bad: high ASR, low ACC."""
    names = [[plots.plain(printable(text or "–", 40)) for text in texts] for texts in (rows, columns)]
    height = 0.3 * len(rows) + 0.09 * max(map(len, names[1])) + 0.4
    figure, axes = plots.blank(0.55 * len(columns) + 0.075 * max(map(len, names[0])) + 0.6, max(height, 1.2))
    bad = values if rate == "asr" else 100 - values
    axes.imshow(bad, cmap="OrRd", vmin=0, vmax=100, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = "#ffffff" if bad[row, column] > 60 else "#1c2126"
        told = "–" if math.isnan(value) else f"{value:.1f}"
        axes.text(column, row, told, ha="center", va="center", fontsize=7.5, color=plots.INK if told == "–" else colour)
    axes.set_xticks(range(len(columns)), names[1], rotation=60, ha="right", fontsize=7.5)
    axes.set_yticks(range(len(rows)), names[0], fontsize=7.5)
    axes.spines[:].set(visible=False)
    axes.tick_params(length=0)
    title = f"{rate.upper()}, %"
    return plots.panel(figure, title, f"heat/{rate}", f"{title} of each defence against each attack")


def runs_sheet(sweep: Sweep, rows: pd.DataFrame) -> Sheet:
    """A line per point with its rates, cost and a link: to its own report if it is there, else to its folder."""
    head = [Head("point", is_number=False), Head("stage", is_number=False), Head("state", is_number=False)]
    head += [Head("ACC"), Head("ASR"), Head("device-s", _MEANING["device-s"]), Head("key", is_number=False)]
    folders = {point.key: sweep.run_folder(point) for point in sweep.points}
    defender = rows[rows["chosen_by"] != "oracle"] if "chosen_by" in rows else rows
    lines = []
    for row in defender.drop_duplicates("key").head(_MOST_LISTED).to_dict("records"):
        folder, numbers = folders[row["key"]], [_number(row, name) for name in ("acc", "asr", "device_seconds")]
        place = os.path.relpath(folder, sweep.folder).replace(os.sep, "/")
        link = f"{place}/report.html" if (folder / "report.html").is_file() else f"{place}/"
        name = Cell(printable(row["name"], 200) or row["key"], link="" if row["state"] == "missing" else link)
        told = ["–" if math.isnan(number) else f"{number:.1f}" for number in numbers]
        cells = [Cell(text, number) for text, number in zip(told, numbers, strict=True)]
        lines.append(Row([name, Cell(row["stage"]), Cell(row["state"]), *cells, Cell(row["key"])]))
    return Sheet("points", head, [("", lines)])


def _number(row: dict[Any, Any], name: str) -> float:
    value = row.get(name)
    return math.nan if value is None else float(value)
