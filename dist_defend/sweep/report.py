"""A collected sweep to a leaderboard, a trade-off plot and the list of what is missing."""

import sys
import textwrap
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from dist_defend import screen
from dist_defend.aligned import aligned, width_of
from dist_defend.files import write_atomic
from dist_defend.results import COUNTS, RETUNED
from dist_defend.sweep import detectors, page
from dist_defend.sweep.collect import MOST_TOLD, spreadsheet
from dist_defend.sweep.comparison import ATTACK, RATES, SETTING, Comparison, making, told_once
from dist_defend.sweep.expectation import Outcome, outcomes
from dist_defend.sweep.grid import Sweep, shorten

_LAST_NAMES = ("task", "model", "metric", "detector")  # of the columns that say what a line is
CHOOSERS = ("defender", "oracle")
_RETUNED = dict(
    zip(RETUNED, ("ACC re-tuned", "ASR re-tuned", "q = 0", "control", "queried", "its control"), strict=True)
)
_NOTE = (
    "Mean ± sample standard deviation over n seeds, in percent. The defender chose with clean data alone; the oracle "
    "chose by the attack's success on the test set, which no defender has. device-s: mean seconds times devices of one "
    "point, without those it comes after. ASR re-tuned: after a few steps on few poisoned images, which needs the "
    "trigger; beside it the same without poisoned images (q = 0) and from a clean network (control)."
)
_PAIRED = (
    "ΔACC, ΔASR: mean difference to {reference}, the first setting of the file, on the same networks, ± half of its "
    "95 % interval (Student's t over networks; no correction for many comparisons)."
)
_SIDE = (
    "All networks of the sweep together, mean ± sample standard deviation. × cheapest: device-seconds by the lowest. "
    "MAD: median absolute deviation of ACC and of ASR over the method's settings (of each attack, over the networks "
    "that all settings have), mean over attacks; – for a method with one setting."
)


BESIDE = (
    "ours: mean ± sample standard deviation over n rows, in percent; difference: ours less that, in points. PASS: "
    "it is within the tolerance that the sweep file gives; NOT RUN: nothing was counted yet."
)


def write(sweep: Sweep, rows: pd.DataFrame) -> None:
    """report.html, leaderboard.md and .csv, defences.csv, tradeoff.svg in the sweep's folder; prints the leaderboard.

    Every combination of the sweep's axes but the seeds is a line for each stage, kind of model and task.
    """
    comparison = Comparison(sweep, rows)
    board, table = leaderboard(sweep, rows), comparison.table()
    paired = _PAIRED.format(reference=screen.markdown(" ".join(comparison.reference or ("nothing",))))
    beside, lacking = side_by_side(table), rows[rows["state"] != "done"]
    compared = outcomes_of(sweep, rows)
    lines = [
        f"# {screen.markdown(sweep.path.stem)}",
        "",
        markdown(board),
        "",
        _NOTE,
        "",
        *(["## Defences side by side", "", _lines(beside), "", _SIDE, paired, ""] if len(table) else []),
        *(["## Published and ours", "", beside_published(compared), "", BESIDE, ""] if compared else []),
        *detectors.lines(rows),
    ]
    missing = [f"Missing: {len(lacking)} of {len(sweep.points)} points" + ("\n" if len(lacking) else "")]
    for row in lacking.to_dict("records"):
        reason = f": {screen.markdown(row['reason'])}" if row["state"] == "damaged" else ""
        missing.append(f"- {row['stage']} `{row['key']}` {screen.markdown(row['name'])}{reason}")
    lines += missing
    write_atomic(sweep.folder / "leaderboard.md", "\n".join(lines) + "\n")
    spreadsheet(board).to_csv(sweep.folder / "leaderboard.csv", index=False)
    spreadsheet(table).to_csv(sweep.folder / "defences.csv", index=False)
    plot(board).savefig(sweep.folder / "tradeoff.svg", metadata={"Date": None})
    tables = [("leaderboard", cells(board), _NOTE)]
    if len(table):
        told = _PAIRED.format(reference=" ".join(comparison.reference or ("nothing",)))
        tables.append(("defences side by side", beside, f"{_SIDE} {told}"))
    if compared:
        tables.append(("published and ours", published_cells(compared), BESIDE))
    if detected := detectors.cells(rows):
        tables.append(("detectors", detected, detectors.NOTE))
    sheets = [page.sheet(*each) for each in tables]
    write_atomic(sweep.folder / "report.html", page.render(sweep, rows, comparison, sheets))
    width = width_of(sys.stdout)
    named = missing[: 1 + MOST_TOLD]
    if len(lacking) > MOST_TOLD:
        named.append(f"- and {len(lacking) - MOST_TOLD} more: leaderboard.md names them")
    print("\n".join([*(lines[2 : -len(missing)] if width is None else [in_text(tables, width)]), *named]))
    print(f"\n{sweep.folder / 'report.html'}, leaderboard.md, leaderboard.csv, defences.csv, tradeoff.svg")


def in_text(tables: Sequence[tuple[str, Sequence[Sequence[str]], str]], width: int) -> str:
    """Names, tables and captions for a terminal of so many letters in a line."""
    out = []
    for name, table, caption in tables:
        told = "No point has counted anything yet.\n"
        if table:
            names = 1 + max(i for i, text in enumerate(table[0]) if text in _LAST_NAMES)
            told = f"{aligned(table, names, width)}\n\n{textwrap.fill(caption, width)}\n"
        out.append(f"{name.capitalize()}\n\n{told}")
    return "\n".join(out)


def leaderboard(sweep: Sweep, rows: pd.DataFrame) -> pd.DataFrame:
    """One line per stage, axes, kind and task: mean, std and n of each rate for defender and oracle, and the cost.

    A defence's line has its differences to the reference too.
    Within each network's labels (seeds apart) and task, the lowest ASR that a defender reached comes first.
    """
    axes = [axis for axis in dict.fromkeys(a for p in sweep.points for a in p.labels) if not axis.endswith(".seed")]
    if "chosen_by" not in rows:
        return pd.DataFrame()
    counted = told_once(rows[rows["chosen_by"].notna()])  # a detector's rows have no rates
    comparison = Comparison(sweep, rows)
    place = comparison.places.set_index("key")
    rates = (*COUNTS, "der", *(name for name in RETUNED if name in counted))
    lines = []
    for names, group in counted.groupby([*axes, "stage", "kind", "task"], dropna=False, sort=False):
        line = dict(zip([*axes, "stage", "kind", "task"], names, strict=True))
        for chooser in CHOOSERS:
            own = group[group["chosen_by"] == chooser]
            line[f"n_{chooser}"] = len(own)
            for rate in rates:
                line[f"{rate}_{chooser}"], line[f"{rate}_{chooser}_std"] = own[rate].mean(), own[rate].std()
        line["device_seconds"] = group.drop_duplicates("key")["device_seconds"].mean()
        if (key := group["key"].iloc[0]) in place.index:
            line |= comparison.differences((place[SETTING][key], str(line["kind"])), place[ATTACK][key])
        lines.append(line)
    board = pd.DataFrame(lines)
    made = making(sweep)
    attacks = [axis for axis in axes if axis.partition(".")[0] in made]
    groups = board.groupby([*attacks, "task"], dropna=False, sort=False).ngroup()
    return board.assign(_group=groups).sort_values(["_group", "asr_defender"], kind="stable").drop(columns="_group")


def markdown(board: pd.DataFrame) -> str:
    """The leaderboard as a Markdown table."""
    return "No point has counted anything yet." if board.empty else _lines(cells(board))


def cells(board: pd.DataFrame) -> list[list[str]]:
    """Header and lines of the leaderboard, the defender's choice before the oracle's; nothing of an empty one."""
    if board.empty:
        return []
    axes = list(board.columns[: board.columns.get_loc("stage")])
    short = shorten(axes)
    has_oracle = bool(board["n_oracle"].any())
    has_pairs = "acc_diff" in board and bool(board["acc_diff"].notna().any())
    head = [*short, "model", "task", "ACC", "ASR", "RA", "DER", "n"]
    retuned = {name: told for name, told in _RETUNED.items() if f"{name}_defender" in board}
    head += [*["ΔACC", "ΔASR"] * has_pairs, *retuned.values(), *["oracle ACC", "oracle ASR"] * has_oracle, "device-s"]
    table = [head]
    for line in board.to_dict("records"):
        own = ["" if pd.isna(line[axis]) else str(line[axis]) for axis in axes] + [line["kind"], line["task"]]
        own += [_score(line, rate, "defender") for rate in ("acc", "asr", "ra", "der")] + [str(line["n_defender"])]
        own += [difference(line, rate) for rate in RATES] * has_pairs
        own += [_score(line, rate, "defender") for rate in retuned]
        own += [_score(line, rate, "oracle") for rate in RATES] * has_oracle
        table.append([*own, f"{line['device_seconds']:.0f}"])
    return table


def side_by_side(table: pd.DataFrame) -> list[list[str]]:
    """Header and lines of the defences' table."""
    head = ["setting", "model", "networks", "ACC", "ASR", "ΔACC", "ΔASR", "device-s", "× cheapest"]
    found = [[*head, "MAD ACC", "MAD ASR"]]
    for line in table.to_dict("records"):
        own = [line["setting"], line["kind"], str(line["networks"])]
        own += [mean_std(line[rate], line[f"{rate}_std"]) for rate in RATES]
        own += [difference(line, rate) for rate in RATES]
        own += [mean_std(line["device_seconds"], line["device_seconds_std"]), mean_std(line["times"])]
        found.append([*own, *(mean_std(line[f"{rate}_mad"]) for rate in RATES)])
    return found


def outcomes_of(sweep: Sweep, rows: pd.DataFrame) -> list[Outcome]:
    """What came of each figure that the sweep's file expects at its scale."""
    labels = {point.key: point.labels for point in sweep.points}
    return outcomes(sweep.config.expect, labels, rows.to_dict("records"))


def beside_published(compared: Sequence[Outcome]) -> str:
    """Published figures, or those that a scale expects, and what came of them, as Markdown."""
    return _lines(published_cells(compared))


def published_cells(compared: Sequence[Outcome]) -> list[list[str]]:
    """The same as header and lines of text."""
    figure = "published" if all(outcome.expectation.scale is None for outcome in compared) else "expected"
    found = [["what", "metric", figure, "tolerance", "ours", "n", "difference", "", "source"]]
    for outcome in compared:
        own = outcome.expectation
        ours = [mean_std(outcome.mean, outcome.std), f"{len(outcome.values)} of {outcome.points}"]
        gap = f"{outcome.difference:+.1f}" if outcome.values else "–"
        told = [own.name, own.metric, f"{own.published:g}", f"{own.tolerance:g}"]
        found.append([*told, *ours, gap, outcome.verdict, own.source])
    return found


def difference(line: Mapping[Hashable, Any], rate: str) -> str:
    """A signed difference with half of its interval, which two networks at least give."""
    mean, half = line.get(f"{rate}_diff"), line.get(f"{rate}_diff_half")
    if mean is None or pd.isna(mean):
        return "–"
    return f"{mean:+.1f}" if half is None or pd.isna(half) else f"{mean:+.1f} ± {half:.1f}"


def _lines(table: Sequence[Sequence[str]]) -> str:
    head, *body = [f"| {' | '.join(map(screen.markdown, own))} |" for own in table]
    return "\n".join([head, f"| {' | '.join(['---'] * len(table[0]))} |", *body])


def plot(board: pd.DataFrame) -> Figure:
    """ASR across, ACC up: a defence wants to be in the upper left corner. A colour per kind, hollow for an oracle."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, group) in enumerate(board.groupby("kind", sort=False) if len(board) else ()):
        kind = screen.printable(name, 60).replace("$", r"\$")  # no formula
        kind = f" {kind}" if kind.startswith("_") else kind  # which matplotlib hides
        for chooser, marker in zip(CHOOSERS, ("o", "D"), strict=True):
            own = group[group[f"n_{chooser}"] > 0]
            if len(own):
                label = kind if chooser == "defender" else f"{kind} (oracle)"
                values = [own[f"{rate}_{chooser}{part}"] for rate in ("asr", "acc") for part in ("", "_std")]
                axes.errorbar(
                    values[0], values[2], values[3].fillna(0), values[1].fillna(0), fmt=marker, color=f"C{number}",
                    markerfacecolor=f"C{number}" if chooser == "defender" else "none", label=label, capsize=2,
                )  # fmt: skip
    axes.set(xlabel="ASR (%)", ylabel="ACC (%)")
    if axes.has_data():
        axes.legend()
    return figure


def _score(line: Mapping[Hashable, Any], rate: str, chooser: str) -> str:
    return mean_std(line[f"{rate}_{chooser}"], line[f"{rate}_{chooser}_std"])


def mean_std(mean: float, std: float | None = None) -> str:
    """One decimal each; what is nan is left out."""
    if pd.isna(mean):
        return "–"
    return f"{mean:.1f}" if std is None or pd.isna(std) else f"{mean:.1f} ± {std:.1f}"
