"""What detectors say of models, as a table: report page, Markdown and terminal show the same."""

from collections.abc import Sequence

from dist_defend.aligned import aligned
from dist_defend.report.runs import Run

HEAD = ("run", "detector", "score", "range", "backdoored if", "verdict", "truth", "note")
MEANING = (
    "The score is the median over the detector's seeds, the range their least and largest. Truth is what the model's "
    "card says; a defended model is neither clean nor backdoored. No mask found is no verdict."
)


def cells(runs: Sequence[Run]) -> list[list[str]]:
    """A row for each detector of each run; nothing where there is none."""
    return [
        [
            run.label, f"{one.detector}: {one.quantity}", _number(one.score),
            "–" if one.low == one.high else f"{_number(one.low)} to {_number(one.high)}",
            f"{one.flags} {one.bound:g}", one.verdict or "none", one.truth, one.note,
        ]
        for run in runs
        for one in run.detections
    ]  # fmt: skip


def to_text(table: Sequence[Sequence[str]], width: int | None = None) -> str:
    """The table for a terminal of so many letters in a line."""
    return aligned([HEAD, *table], 2, width, numbers=False)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
