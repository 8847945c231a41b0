"""The counts of a zoo's model: the same integers whenever they are counted on the same images."""

import tempfile
from pathlib import Path
from typing import Any

from dist_defend.config import build_section
from dist_defend.data.loader import DatasetConfig, LoaderConfig
from dist_defend.engine import dist
from dist_defend.engine.context import Context
from dist_defend.errors import UserError
from dist_defend.methods.measure import probe
from dist_defend.models.artifact import read_card
from dist_defend.results import COUNTS
from dist_defend.trial import Trial

Counts = dict[str, dict[str, dict[str, int]]]
_KIND = "model"  # of a probe's encoder


def count(folder: Path, measure: dict[str, Any], where: Path) -> tuple[Counts, dict[str, str]]:
    """Task -> acc, asr, asr_all, ra as {correct, n}, and the digests of the data by role.

    measure: see entry.Entry; where: the file that says so, for messages. The attack is the one that the card names.
    UserError for data that is missing or does not fit, and for an encoder's probe that would train something.
    """
    card = read_card(folder)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            context = Context(dist.start("fp32", None), 100, LoaderConfig(), Path(scratch))
            if card.kind == "classifier":
                trial = Trial(str(folder), context)
                examination = trial.test_on(build_section(DatasetConfig, measure, where, "measure."), None)
                rows = [examination.row(_KIND, examination.measure(trial.model))]
            else:
                section = {**measure, "encoders": {_KIND: str(folder)}}
                config = build_section(probe.Config, section, where, "measure.")
                if config.kind != "knn":
                    raise UserError(f"{where}: key 'measure.kind' is {config.kind}; only knn counts without training")
                rows = probe.build(config, context).result()["rows"]
        finally:
            dist.stop()
    return {row["task"]: {name: row[name] for name in COUNTS} for row in rows}, dict(context.digests)


def differences(then: Counts, now: Counts) -> list[str]:
    """What is not the same integer, a line each."""
    found = []
    for task in sorted({*then, *now}):
        for name in COUNTS:
            old, new = (counts.get(task, {}).get(name) for counts in (then, now))
            if old != new:
                found.append(f"{name} on {task}: {told(new)} now, {told(old)} when it was added")
    return found


def told(count: dict[str, int] | None) -> str:
    """A count in words."""
    return "nothing" if count is None else f"{count['correct']} of {count['n']}"
