"""What the rest of a sweep costs, by the points that are done."""

import statistics
from collections import defaultdict

from dist_defend.errors import UserError
from dist_defend.results import read_result
from dist_defend.sweep.grid import Point, Sweep


def told(sweep: Sweep) -> list[str]:
    """A line per stage that has results: how many points are left, and for how many device-hours.

    A point is taken to cost the mean of those that have its place in the stage's own grid; where none of them is done,
    of its stage.
    """
    lines = []
    for stage in sweep.config.stages:
        points = sweep.stage(stage)
        costs = {point.key: cost for point in points if (cost := _seconds(sweep, point)) is not None}
        left = [point for point in points if not sweep.is_done(point)]
        if not costs:
            continue
        columns: dict[tuple[int, ...], list[float]] = defaultdict(list)
        for point in points:
            if point.key in costs:
                columns[point.column].append(costs[point.key])
        usual = statistics.fmean(costs.values())
        hours = sum(statistics.fmean(columns.get(point.column) or [usual]) for point in left) / 3600
        lines.append(
            f"stage {stage}: {len(points) - len(left)} of {len(points)} done, {usual:.1f} device-seconds each; "
            f"the other {len(left)} will take about {hours:.2g} device-hours"
        )
    return lines


def _seconds(sweep: Sweep, point: Point) -> float | None:
    """Device-seconds of a point, None where there is no result that can be read."""
    try:
        found = read_result(sweep.run_folder(point) / "result.json", "") if sweep.is_done(point) else {}
    except UserError:
        return None
    seconds = found.get("device_seconds")
    return None if seconds is None else float(seconds)
