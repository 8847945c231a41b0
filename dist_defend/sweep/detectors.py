"""How well the detectors of a sweep tell backdoored models from clean ones."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dist_defend import screen
from dist_defend.detection import KIND, Detection, Separation, separation

if TYPE_CHECKING:
    import pandas as pd

NOTE = (
    "AUC: share of pairs of a backdoored and a clean model in which the backdoored one looks more suspicious, ties as "
    "halves; 1 separates them, 0.5 is chance. Truth is what the models' cards say; defended models are left out. "
    "Right: verdicts that agree with it, by the detector's own bound. No score: nothing was found, and no verdict."
)
_FIELDS = ("detector", "quantity", "score", "low", "high", "bound", "flags", "truth")


def separations(rows: "pd.DataFrame") -> Iterator[tuple[str, Separation]]:
    """Each detector's name with its quantity, and how it separates all models of the sweep that it scored."""
    if "detector" not in rows:
        return
    for (name, quantity), group in rows[rows["kind"] == KIND].groupby(["detector", "quantity"], sort=False):
        plain = group[list(_FIELDS)].astype(object)
        records: Any = plain.where(plain.notna(), None).to_dict("records")
        yield f"{name}: {quantity}", separation([Detection(**record) for record in records])


def cells(rows: "pd.DataFrame") -> list[list[str]]:
    """Header and a line per detector; nothing where no detector ran."""
    table = [["detector", "AUC", "backdoored right", "clean right", "no score"]]
    for name, one in separations(rows):
        area = "–" if one.auc != one.auc else f"{one.auc:.3f}"
        right = [f"{count.correct} of {count.n}" for count in (one.backdoored, one.clean)]
        table.append([name, area, *right, str(one.unscored)])
    return table if len(table) > 1 else []


def lines(rows: "pd.DataFrame") -> list[str]:
    """A section of the sweep's report, as Markdown; nothing where no detector ran."""
    table = cells(rows)
    if not table:
        return []
    head, *body = [f"| {' | '.join(map(screen.markdown, line))} |" for line in table]
    return ["## Detectors", "", head, f"| {' | '.join(['---'] * 5)} |", *body, "", NOTE, ""]
