"""report.html: everything in one file that opens anywhere and asks nobody for anything."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
from markupsafe import Markup

from dist_defend.report import plots, tables
from dist_defend.report.runs import Run
from dist_defend.report.tables import Line

_Name = Callable[[str, str], str]  # (task, run) -> how the page calls this task


@dataclass(frozen=True)
class Pictures:
    """A task's trigger: one image of two rows, clean above triggered."""

    task: str
    target: str
    sheet: str  # PNG data URI


@dataclass(frozen=True)
class Map:
    """A task's features: one panel per encoder."""

    task: str
    has_target: bool
    panels: list[tuple[str, plots.Panel]]  # kind, panel


def render(
    runs: Sequence[Run],
    lines: Sequence[Line],
    alarms: Sequence[str],
    notices: Sequence[str],
    embedding: Literal["pca", "tsne"],
) -> str:
    """The page, as HTML text without a single address in it."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["svg"] = lambda panel: Markup(panel.svg)  # our own drawing, its texts escaped by matplotlib
    has_runs = len({line.run for line in lines}) > 1

    def name(task: str, run: str) -> str:
        return f"{task} ({run})" if has_runs else task

    values: dict[str, Any] = {
        "style": Markup((folder / "page.css").read_text(encoding="utf-8")),
        "groups": _groups(lines),
        "has_runs": has_runs,
        "metrics": tables.columns(lines),
        "definitions": tables.definitions(lines),
        "spread": tables.spread(lines),
        "alarms": alarms,
        "notices": notices,
        "pictures": [pictures for run in runs for pictures in _pictures(run, name)],
        "generated": [(run, plots.data_uri(run.generated)) for run in runs if run.generated],
        "maps": [map_ for run in runs for map_ in _maps(run, name, embedding)],
        "embedding": embedding,
        "colours": plots,
        "sweeps": [(run, plots.sweep(run.sweep, run.label)) for run in runs if run.sweep],
        "curves": [(run, panels) for run in runs if (panels := plots.curves(run.metrics[0], run.label))],
        "provenance": tables.provenance(runs),
        "runs": runs,
    }
    return environment.get_template("page.html").render(values)


def _groups(lines: Sequence[Line]) -> list[tuple[str, list[Line]]]:
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.task, []).append(line)
    return list(groups.items())


def _pictures(run: Run, name: _Name) -> list[Pictures]:
    tasks = [key.removesuffix("/clean") for key in run.examples if key.endswith("/clean")]
    found = []
    for task in tasks:
        triggered = run.examples.get(f"{task}/triggered")
        if triggered is not None:
            sheet = plots.image_grid([run.examples[f"{task}/clean"], triggered])
            found.append(Pictures(name(task, run.label), run.target_name(task), sheet))
    return found


def _maps(run: Run, name: _Name, embedding: Literal["pca", "tsne"]) -> list[Map]:
    maps = []
    lines = tables.summarise([run])
    for task in dict.fromkeys(line.task for line in lines):
        target, panels = run.target_class(task), []
        for kind in dict.fromkeys(line.kind for line in lines if line.task == task):
            clean, triggered, labels = (
                run.features.get(f"{kind}/{task}/{w}") for w in ("clean", "triggered", "labels")
            )
            if clean is None or triggered is None or len(clean) + len(triggered) < 3:
                continue
            is_target = None if labels is None or target is None else labels == target
            panels.append(
                (kind, plots.feature_map(clean, triggered, is_target, embedding, f"{run.label}/{kind}/{task}"))
            )
        if panels:
            maps.append(Map(name(task, run.label), target is not None, panels))
    return maps
