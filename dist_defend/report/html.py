"""report.html: everything in one file that opens anywhere and asks nobody for anything."""

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup

from dist_defend.report import detectors, insides, masks, overview, plots, shared, tables, tradeoff
from dist_defend.report.runs import Run
from dist_defend.report.sheet import Sheet, plain_sheet
from dist_defend.report.tables import Line

_Name = Callable[[str, str], str]  # (task, run) -> how the page calls this task


@dataclass(frozen=True)
class Pictures:
    """A task's trigger: one image of two rows, clean above triggered."""

    task: str
    target: str
    sheet: str  # PNG data URI
    others: int = 0  # tasks of other runs that look the same


@dataclass(frozen=True)
class Map:
    """A task's features: one panel per encoder, or where there are many runs one thumbnail (PNG data URI)."""

    task: str
    has_target: bool
    panels: list[tuple[str, Any]]  # kind, panel or thumbnail


class Page(NamedTuple):
    """What was rendered: the text, and the figures, pictures (name, PNG data URI) and tables in it."""

    text: str
    panels: list[plots.Panel]
    pictures: list[tuple[str, str]]
    sheets: list[Sheet]


def render(
    runs: Sequence[Run],
    lines: Sequence[Line],
    alarms: Sequence[str],
    notices: Sequence[str],
    embedding: Literal["pca", "tsne"],
) -> Page:
    """The page, as HTML text without a single address in it, and what it shows."""
    has_runs, is_large = len({line.run for line in lines}) > 1, len(runs) > shared.MOST_OWN

    def name(task: str, run: str) -> str:
        return f"{task} ({run})" if has_runs else task

    configurations = shared.configurations(runs) if is_large else [(run.label, run.config_text) for run in runs]
    found = detectors.cells(runs)
    shown: dict[str, Any] = dict(
        rates=overview.rates(lines) if lines else None,
        retuned=overview.retuned(lines),
        stories=overview.stories(runs, lines),
        tradeoffs=_tradeoffs(lines),
        definitions=overview.definitions(lines) if lines else {},
        detected=plain_sheet("detectors", [detectors.HEAD, *found], detectors.MEANING) if found else None,
        found=[(run.label, plots.data_uri(run.found)) for run in runs[: shared.MOST_OWN] if run.found],
        alarms=alarms,
        notices=notices,
        is_large=is_large,
        embedding=embedding,
        colours=plots,
        **(_shared(runs, name, embedding) if is_large else _own(runs, name, embedding)),
        provenance=plain_sheet("runs", tables.provenance(runs)),
        runs=runs,
        configurations=[each for each in configurations if each[1]],
    )
    return Page(fill("page.html", **shown), *_parts(shown))


def _parts(shown: dict[str, Any]) -> tuple[list[plots.Panel], list[tuple[str, str]], list[Sheet]]:
    """Figures, pictures (name, PNG data URI) and tables among what a page shows."""
    panels = [panel for _, panel in [*shown["tradeoffs"], *shown["sweeps"], *shown["masks"]]]
    panels += [panel for *_, own in shown["curves"] for panel in own]
    panels += [panel for map_ in shown["maps"] for _, panel in map_.panels if isinstance(panel, plots.Panel)]
    panels += [panel for *_, panel in shown["confusions"]]
    pictures = [(f"trigger {item.task}", item.sheet) for item in shown["pictures"]]
    pictures += [(f"{what} {run}", uri) for what in ("generated", "found", "cams") for run, uri in shown[what]]
    for run, each in shown["perturbations"]:
        pictures += [(f"trigger alone {run}", each.trigger), (f"perturbation {run}", each.perturbation)]
    sheets = [shown[name] for name in ("rates", "retuned", "detected", "provenance") if shown[name] is not None]
    return panels, pictures, [*sheets, *(sheet for _, sheet in shown["stops"])]


def fill(template: str, **values: Any) -> str:
    """A page of this folder's template with style and script in it, which is all that the page lets a browser run."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = lambda panel: Markup(panel.svg)  # our own drawing, its texts escaped by matplotlib
    script = (folder / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    own = {"style": Markup((folder / "page.css").read_text(encoding="utf-8")), "script": Markup(script)}
    policy = f"{policy}; base-uri 'none'; form-action 'none'"
    return environment.get_template(template).render(**own, policy=policy, **values).lstrip()


def _tradeoffs(lines: Sequence[Line]) -> list[tuple[str, plots.Panel]]:
    found = [(task, tradeoff.points_of(own)) for task, own in overview.by_task(lines)]
    return [(task, tradeoff.panel(points, task)) for task, points in found if points]


def _own(runs: Sequence[Run], name: _Name, embedding: Literal["pca", "tsne"]) -> dict[str, Any]:
    """What the page shows of each run."""

    def draw(clean: np.ndarray, triggered: np.ndarray, is_target: np.ndarray | None, told: str) -> plots.Panel:
        return plots.feature_map(clean, triggered, is_target, embedding, told)

    return {
        "pictures": _alike(runs, name, plots.image_grid),
        "generated": [(run.label, plots.data_uri(run.generated)) for run in runs if run.generated],
        "maps": [map_ for run in runs for map_ in _maps(run, name, draw)],
        "sweeps": [(run.label, plots.sweep(run.sweep, run.label)) for run in runs if run.sweep],
        "masks": [(run.label, masks.histogram(run.masks, run.sweep, run.label)) for run in runs if run.masks],
        "stops": [(run.label, masks.stops_sheet(run.sweep, run.label)) for run in runs if run.sweep],
        "confusions": [(run.label, *each) for run in runs for each in insides.confusions(run)],
        "cams": [(run.label, uri) for run in runs for _, uri in insides.cams(run)],
        "perturbations": [(run.label, each) for run in runs for each in insides.perturbations(run)],
        "curves": [
            (run.label, run.result.get("method", ""), panels)
            for run in runs
            if (panels := plots.curves(run.metrics[0], run.label, run.befores))
        ],
    }


def _shared(runs: Sequence[Run], name: _Name, embedding: Literal["pca", "tsne"]) -> dict[str, Any]:
    """What it shows of many: thumbnails, and figures of a method's runs together."""

    def draw(clean: np.ndarray, triggered: np.ndarray, is_target: np.ndarray | None, told: str) -> str:
        return shared.feature_map(clean, triggered, is_target, embedding)

    return {
        "pictures": _alike(runs, name, lambda rows: shared.thumbnail([images[0] for images in rows])),
        "generated": [(run.label, shared.generated(run.generated)) for run in runs if run.generated],
        "maps": [map_ for run in runs for map_ in _maps(run, name, draw)],
        "sweeps": shared.sweeps(runs),
        **{name: [] for name in ("masks", "stops", "confusions", "cams", "perturbations")},
        "curves": [(method, "", panels) for method, panels in shared.curves(runs)],
    }


def _alike(runs: Sequence[Run], name: _Name, draw: Callable[[list[np.ndarray]], str]) -> list[Pictures]:
    """The runs' pictures, each look once."""
    alike: dict[tuple[str, str], Pictures] = {}
    for run in runs:
        for each in _pictures(run, name, draw):
            known = alike.get((each.target, each.sheet))
            alike[each.target, each.sheet] = each if known is None else replace(known, others=known.others + 1)
    return list(alike.values())


def _pictures(run: Run, name: _Name, draw: Callable[[list[np.ndarray]], str]) -> list[Pictures]:
    tasks = [key.removesuffix("/clean") for key in run.examples if key.endswith("/clean")]
    found = []
    for task in tasks:
        triggered = run.examples.get(f"{task}/triggered")
        if triggered is not None:
            sheet = draw([run.examples[f"{task}/clean"], triggered])
            found.append(Pictures(name(task, run.label), run.target_name(task), sheet))
    return found


def _maps(run: Run, name: _Name, draw: Callable[..., Any]) -> list[Map]:
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
            panels.append((kind, draw(clean, triggered, is_target, f"{run.label}/{kind}/{task}")))
        if panels:
            maps.append(Map(name(task, run.label), target is not None, panels))
    return maps
