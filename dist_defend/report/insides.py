"""What models do inside, drawn: confusion matrices, GradCAM, and triggers beside what defences took for them."""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np

from dist_defend.report import plots
from dist_defend.report.runs import Run
from dist_defend.screen import printable

_MOST_CLASSES = 100
_MOST_NAMED = 20  # classes, up to which each has its name beside its row and column
_LETTERS = 14  # of a class' name


class Perturbation(NamedTuple):
    """PNG data URIs: the trigger as measured, the mean change of the example images, and a defence's perturbation."""

    name: str
    trigger: str
    perturbation: str


def confusions(run: Run) -> list[tuple[str, plots.Panel]]:
    """A figure for each model of the run whose predictions it kept: clean images, and triggered ones."""
    found = []
    for key in [key for key in run.features if key.endswith("/clean_classes")]:
        start = key.removesuffix("clean_classes")
        names = {"clean": ("labels", "clean_classes"), "triggered": ("triggered_labels", "triggered_classes")}
        pairs: list[tuple[str, np.ndarray, np.ndarray]] = []
        for name, both in names.items():
            labels, seen = (run.features.get(f"{start}{own}") for own in both)
            if labels is not None and seen is not None and len(labels) == len(seen):
                pairs.append((name, labels, seen))
        fits = all(min(labels.min(), seen.min()) >= 0 for _, labels, seen in pairs if len(labels))
        most = max((int(max(labels.max(), seen.max())) for _, labels, seen in pairs if len(labels)), default=-1)
        if fits and 0 <= most < _MOST_CLASSES:
            task = start.strip("/").partition("/")[2]
            classes = run.class_names(task)
            count = len(classes) if most < len(classes) <= _MOST_CLASSES else most + 1
            matrices = [(name, confusion(labels, seen, count)) for name, labels, seen in pairs]
            named = classes if count == len(classes) <= _MOST_NAMED else []
            told = f"{run.label}/{start}confusion"
            found.append((start.strip("/"), _panel(matrices, told, named, run.target_class(task))))
    return found


def confusion(labels: np.ndarray, seen: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C): how many images of the row's class are classified as the column's. labels, seen (N,) below C."""
    counts: np.ndarray = np.bincount(
        labels.astype(np.int64) * num_classes + seen.astype(np.int64), minlength=num_classes**2
    )
    return counts.reshape(num_classes, num_classes)


@matplotlib.rc_context(plots.STYLE)
def _panel(
    matrices: Sequence[tuple[str, np.ndarray]], name: str, classes: Sequence[str], target: int | None
) -> plots.Panel:
    """classes: names, empty for numbers. target: its column's name or number is red."""
    names = [plots.plain(printable(text, _LETTERS)) for text in classes]
    figure, _ = plots.blank(4.6, 2.5 + 0.055 * max(map(len, names), default=0))
    figure.clear()
    shown = np.ravel(figure.subplots(1, len(matrices), sharey=True))
    for axes, (told, counts) in zip(shown, matrices, strict=True):
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if len(counts) <= 12:
            for (row, column), count in np.ndenumerate(counts):
                colour = "#ffffff" if shares[row, column] > 0.6 else "#1c2126"
                axes.text(column, row, count or "", ha="center", va="center", fontsize=5.5, color=colour)
        axes.set(xlabel="predicted", title=f"{told}, {counts.sum()} images")
        if names:
            axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=6.5)
            axes.set_yticks(range(len(names)), names, fontsize=6.5)
        elif len(counts) <= _MOST_NAMED:
            axes.set_xticks(range(len(counts)))
            axes.set_yticks(range(len(counts)))
        axes.tick_params(length=0)
        if target is not None and len(counts) <= _MOST_NAMED:
            axes.get_xticklabels()[target].set_color(plots.TRIGGERED)
        axes.spines[:].set(visible=False)
    shown[0].set_ylabel("label")
    return plots.panel(figure, "", name, f"confusion matrices of {name}")


def cams(run: Run) -> list[tuple[str, str]]:
    """Task and PNG data URI: clean images, GradCAM of them, triggered ones, and GradCAM of these."""
    found = []
    for key in [key for key in run.examples if key.endswith("/cam_clean")]:
        task = key.removesuffix("/cam_clean")
        rows = [run.examples.get(f"{task}/{name}") for name in ("clean", "cam_clean", "triggered", "cam_triggered")]
        own = [row for row in rows if row is not None]
        if len({row.shape for row in own}) == 1 and len(own) == 4:
            found.append((task, plots.image_grid(own)))
    return found


def perturbations(run: Run) -> list[Perturbation]:
    """Each task's trigger as it was measured, beside what the run's defence added to images instead."""
    found = []
    for key in [key for key in run.examples if key.endswith("/perturbation")]:
        task = key.removesuffix("/perturbation")
        clean, triggered = (run.examples.get(f"{task}/{name}") for name in ("clean", "triggered"))
        if clean is not None and triggered is not None:
            change = (triggered.astype(float) - clean).mean(axis=0)
            shown = (127.5 + 127.5 * change / max(np.abs(change).max(), 1e-12)).round().astype(np.uint8)
            uris = plots.image_grid([shown[None]]), plots.image_grid([run.examples[key]])
            found.append(Perturbation(task, *uris))
    return found
