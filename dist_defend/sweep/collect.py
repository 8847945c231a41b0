"""Results of a sweep's points as one table: Parquet for queries, CSV for eyes.

A row is what one run counted for one kind of model, task and seed; a run that counts nothing (pretraining) has one row
without rates; a point without a result has one whose ``state`` says so. Query it with anything that reads Parquet.
"""

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd

from dist_defend.counts import ORACLE, Count, rating
from dist_defend.detection import KIND
from dist_defend.errors import UserError
from dist_defend.removal import removal_seconds
from dist_defend.results import COUNTS as RATES
from dist_defend.results import RETUNED, Detected, read_result
from dist_defend.screen import cell
from dist_defend.sweep.grid import Point, Sweep

MOST_TOLD = 20  # points without a result that are named on the terminal
_COSTS = (
    "wall_seconds",
    "device_seconds",
    "work_seconds",
    "peak_memory_bytes",
    "world_size",
    "device",
    "code_version",
    "config_sha256",
)


def table(sweep: Sweep) -> pd.DataFrame:
    """One row per point, kind, task and seed; rates in percent. UserError where every result.json is damaged.

    Columns: key, stage, name, parent, state (done, missing or damaged), method, one per axis (``stage.key``), kind,
    task, seed, chosen_by (defender or oracle), acc, asr, asr_all, ra, der, acc_before, asr_before, n_clean,
    n_triggered, and what the run cost, among it removal_seconds; ``reason`` where something is damaged. What a point of
    method reactivate has counted (results.RETUNED) stands in its own row and in that of the defence before it.
    A row of kind detector has detector, quantity, score, low, high, bound, flags, verdict and truth instead of rates.
    """
    rows = pd.DataFrame(_with_retuned([row for point in sweep.points for row in _rows(sweep, point)]))
    damaged = rows[rows["state"] == "damaged"]
    if len(damaged) and not (rows["state"] == "done").any():
        raise UserError(damaged["reason"].iloc[0])
    for axis in dict.fromkeys(axis for point in sweep.points for axis in point.labels):
        if rows[axis].map(type).nunique() > 1:  # a Parquet column has one type
            rows[axis] = rows[axis].map(lambda label: label if _is_nothing(label) else str(label))
    return rows


def write(sweep: Sweep, rows: pd.DataFrame) -> int:
    """results.parquet and results.csv in the sweep's folder; prints how many points they hold and names the others.

    Returns the number of points whose results are damaged and left out.
    """
    sweep.folder.mkdir(parents=True, exist_ok=True)
    for name, save in (("results.parquet", rows.to_parquet), ("results.csv", spreadsheet(rows).to_csv)):
        aside = sweep.folder / f".{name}"
        save(aside, index=False)
        aside.replace(sweep.folder / name)
    lacking = rows[rows["state"] != "done"].sort_values("state", kind="stable")  # damaged ones first
    print(f"{len(sweep.points) - len(lacking)} of {len(sweep.points)} points -> {sweep.folder / 'results.parquet'}")
    for row in lacking.head(MOST_TOLD).to_dict("records"):
        reason = f": {row['reason']}" if row["state"] == "damaged" else ""
        print(f"{row['state']} {row['stage']} {row['key']} ({row['name']}){reason}")
    if len(lacking) > MOST_TOLD:
        print(f"and {len(lacking) - MOST_TOLD} more: column 'state' of results.csv")
    return int((rows["state"] == "damaged").sum())


def spreadsheet(rows: pd.DataFrame) -> pd.DataFrame:
    """The table with no text that a spreadsheet would take for a formula, in cells or headings."""
    return rows.map(cell).rename(columns=cell)


def _rows(sweep: Sweep, point: Point) -> Iterator[dict[str, Any]]:
    head = {
        "key": point.key,
        "stage": point.stage,
        "name": point.name,
        "parent": point.parent.key if point.parent else None,
        "method": point.experiment.method,
        "seed": point.experiment.seed,
        **point.labels,
    }
    if not sweep.is_done(point):
        yield {**head, "state": "missing"}
        return
    folder = sweep.run_folder(point)
    try:
        result = read_result(folder / "result.json", "delete it and resubmit")
        removed = removal_seconds(folder, result)
    except UserError as error:
        yield {**head, "state": "damaged", "reason": str(error)}
        return
    costs = {**{key: result.get(key) for key in _COSTS}, "removal_seconds": removed}
    before = {f"{name}_before": result["metrics"].get(f"{name}_before") for name in ("acc", "asr")}
    detected = [{"kind": KIND, "task": one.task, **_detected(one)} for one in result["detections"]]
    for row in [_rated(row, before) for row in result["rows"]] + detected or [{}]:
        yield {**head, "state": "done", **row, **before, **costs}


def _detected(one: Detected) -> dict[str, Any]:
    numbers = {name: _number(getattr(one, name)) for name in ("score", "low", "high", "bound")}
    texts = {name: getattr(one, name) for name in ("detector", "quantity", "flags", "verdict", "truth")}
    return {**texts, **numbers}


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)


def _rated(row: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    counts = {name: Count(**row[name]) for name in RATES}
    counts |= {name: Count(**row[name]) for name in RETUNED if name in row}
    kind = row["kind"]
    rates = {name: None if math.isnan(count.percent) else count.percent for name, count in counts.items()}
    drops = [
        before[f"{name}_before"] - rates[name] if _are(before[f"{name}_before"], rates[name]) else math.nan
        for name in ("asr", "acc")
    ]
    der = 100 * rating(drops[0] / 100, drops[1] / 100)
    return {
        "kind": kind.removesuffix(ORACLE),
        "chosen_by": "oracle" if kind.endswith(ORACLE) else "defender",
        "task": row["task"],
        "seed": row["seed"],
        **rates,
        "der": None if math.isnan(der) else der,
        "n_clean": counts["acc"].n,
        "n_triggered": counts["asr"].n,
    }


def _with_retuned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows; the defender's row of a point has what the one point after it found by re-tuning its model."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if "asr_retuned" in row and row["parent"] is not None:
            found.setdefault(row["parent"], []).append({name: row[name] for name in RETUNED if name in row})
    lent = {key: own[0] for key, own in found.items() if len(own) == 1}
    return [row | lent.get(row["key"], {}) if row.get("chosen_by") == "defender" else row for row in rows]


def _are(*values: float | None) -> bool:
    return all(value is not None for value in values)


def _is_nothing(label: Any) -> bool:
    return label is None or (isinstance(label, float) and math.isnan(label))
