"""Figures that were published, beside what a sweep found: a sweep file's ``expect``."""

import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dist_defend.bounds import not_negative

PASS, FAIL, NOT_RUN = "PASS", "FAIL", "NOT RUN"


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """One figure, and which rows of the sweep's table have to meet it, in the mean.

    Keys:
        at: axis -> label of the points; an axis may be named by its last part
        metric: column of the table
        published: the figure, in percent
        tolerance: how far the mean may be from it, in points
        source: where it was published
        kind: of the rows' model; null: of any
        chosen_by: whose choice the rows are
        scale: at which of the sweep's scales it holds; null: without one
    """

    at: dict[str, Any] = field(default_factory=dict)
    metric: Literal["acc", "asr", "asr_all", "ra", "der", "acc_before", "asr_before"]
    published: float
    tolerance: float
    source: str
    kind: str | None = None
    chosen_by: Literal["defender", "oracle"] = "defender"
    scale: str | None = None

    def __post_init__(self) -> None:
        not_negative(self, "tolerance")

    @property
    def name(self) -> str:
        """For people: where it holds."""
        return " ".join([*(f"{axis}={label}" for axis, label in self.at.items()), *([self.kind] if self.kind else [])])

    def selects(self, labels: Mapping[str, Any]) -> bool:
        """Whether a point with these labels is meant."""
        return all(
            any(label == wanted for own, label in labels.items() if own == axis or own.endswith(f".{axis}"))
            for axis, wanted in self.at.items()
        )


@dataclass(frozen=True)
class Outcome:
    """What came of an expectation. values: one per row that was found; points: how many should have rows."""

    expectation: Expectation
    values: tuple[float, ...]
    points: int

    @property
    def mean(self) -> float:
        """nan where nothing was found."""
        return statistics.fmean(self.values) if self.values else float("nan")

    @property
    def std(self) -> float:
        """Sample standard deviation; nan of fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else float("nan")

    @property
    def difference(self) -> float:
        """Ours less the published figure, in points."""
        return self.mean - self.expectation.published

    @property
    def verdict(self) -> str:
        """NOT RUN without any row, PASS where the mean is within the tolerance, or FAIL."""
        if not self.values:
            return NOT_RUN
        return PASS if abs(self.difference) <= self.expectation.tolerance + 1e-9 else FAIL


def outcomes(
    expectations: Sequence[Expectation],
    labels: Mapping[str, Mapping[str, Any]],
    rows: Sequence[Mapping[Hashable, Any]],
) -> list[Outcome]:
    """One for each. labels: of each point, by its key; rows: of sweep.collect.table."""
    made = []
    for expectation in expectations:
        keys = {key for key, own in labels.items() if expectation.selects(own)}
        own = [
            row
            for row in rows
            if row["key"] in keys
            and row["state"] == "done"
            and row.get("chosen_by") == expectation.chosen_by
            and expectation.kind in (None, row["kind"])
        ]
        found = [row.get(expectation.metric) for row in own]
        values = [float(value) for value in found if value is not None and value == value]  # nan is not itself
        made.append(Outcome(expectation, tuple(values), len(keys)))
    return made
