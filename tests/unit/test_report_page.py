"""What the page shows beyond the counts: changes, cost, weak attacks, axes, and what it lets a browser run."""

import base64
import hashlib
import html
import io
import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image
from safetensors.numpy import save_file

from dist_defend.cli import main
from dist_defend.report import insides, plots, runs, tradeoff
from tests.unit.test_report import ROWS, row, write_defence, write_run, write_story


def cells_of(page: str, kind: str) -> dict[str, str]:
    """Heading -> what the page's first row of this kind shows below it."""
    row = re.search(rf'<th scope="row">{re.escape(kind)}.*?</tr>', page, re.DOTALL)
    assert row is not None
    cells = re.findall(r'<td data-label="(.*?)".*?>(.*?)(?:<i .*?)?</td>', row.group())
    return {name: re.sub("<.*?>", "", text) for name, text in cells}


def test_the_page_tells_what_a_defence_changed_and_cost(tmp_path: Path) -> None:
    """RNP: 43 of 50 right and 2 of 40 to the target, after 90 and 100 %; 61.2 s."""
    main(["report", str(write_defence(tmp_path))])
    page = (tmp_path / "report.html").read_text()
    found = cells_of(page, "rnp <span>")
    assert (found["ACC %"], found["ΔACC"], found["ASR %"], found["ΔASR"]) == ("86.0", "−4.0", "5.0", "−95.0")
    assert found["cost"] == "61 s"
    assert cells_of(page, "backdoored")["ΔACC"] == "–" and cells_of(page, "rnp (oracle)")["cost"] == "–"
    assert "<p>rnp: ASR 5.0 % (−95.0), ACC 86.0 % (−4.0)</p>" in page
    assert "<p>ASR 100.0 %, ACC 90.0 %</p>" in page and "<p>rnp: 61 s</p>" in page
    assert "weak attack" not in page


def test_a_purified_encoder_is_compared_with_the_backdoored_one(tmp_path: Path) -> None:
    """84 - 90 and 10 - 97.5 %, means over the seeds; the cost is MIMIC's, not the probe's."""
    write_story(tmp_path / "demo")
    (tmp_path / "demo/probe/config.yaml").write_text("probe:\n  encoders: {purified: elsewhere/mimic/model}\n")
    write_run(tmp_path / "demo/mimic", method="mimic", work_seconds=7.0)
    main(["report", str(tmp_path / "demo")])
    found = cells_of((tmp_path / "demo/report.html").read_text(), "purified")
    assert (found["ΔACC"], found["ΔASR"], found["cost"]) == ("−6.0", "−87.5", "7 s")


@pytest.mark.parametrize(("hits", "is_weak"), [(35, True), (36, False)])
def test_an_attack_that_did_not_take_is_marked(tmp_path: Path, hits: int, is_weak: bool) -> None:
    """36 of 40 are 90 %."""
    write_run(tmp_path / "attack", [row("backdoored", 100, 45, hits, hits, 0)], method="classifier")
    before = {"acc_before": 90.0, "asr_before": 100 * hits / 40}
    write_run(tmp_path / "ibau", [row("ibau", 100, 45, 1, 1, 36)], method="ibau", metrics=before)
    main(["report", str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<em>weak attack</em>") == 2 * is_weak and page.count('<tr class="weak">') == 2 * is_weak
    assert ("weak attack, ASR below 90 %" in (tmp_path / "report.md").read_text()) == is_weak


def test_the_page_lets_nothing_run_but_its_own_script(tmp_path: Path) -> None:
    main(["report", str(write_run(tmp_path / "probe", ROWS))])
    page = html.unescape((tmp_path / "probe/report.html").read_text())
    script = page[page.index("<script>") + 8 : page.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_rates_have_a_linear_axis_and_start_at_what_was_before() -> None:
    """As step 0 lies where matplotlib's data are put: the point is the only marker that is hollow."""
    rows: list[dict[str, Any]] = [{"step": s, "stage": "a", "acc": 90.0 / s, "asr": 1.0 / s} for s in (1, 2, 40)]
    rows += [{"step": 9, "stage": "a", "images_per_second": 1.0, "loss": v} for v in (1.0, 40.0)]
    rates, losses = plots.curves(rows, "run", {"acc": 95.0, "asr": math.nan})
    axes = rates.figure.axes[0]
    assert axes.get_yscale() == "linear" and axes.get_ylim() == (-3, 103)
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in hollow] == [(0, 95.0)]  # type: ignore[misc]
    assert losses.figure.axes[0].get_yscale() == "log"


def test_more_than_five_curves_are_folded() -> None:
    row = {"step": 1, "stage": "a", "images_per_second": 1.0, "loss": 1.0}
    panels = plots.curves([row | {f"norm_{number}": 1.0 for number in range(6)} | {"aux_loss": 1.0}], "run", {})
    assert [len(panel.figure.axes[0].lines) for panel in panels] == [5, 3]
    assert [panel.is_folded for panel in panels] == [False, True]
    shown = [line.get_label() for line in panels[0].figure.axes[0].lines]
    assert shown == ["loss", "aux_loss", "norm_0", "norm_1", "norm_2"]


def test_names_beside_points_do_not_meet() -> None:
    points = [tradeoff.Point(f"defence {n}", f"d{n}", 2.0 + n / 4, 90.0, (99.0, 92.0)) for n in range(8)]
    panel = tradeoff.panel(points, "task")
    axes = panel.figure.axes[0]
    panel.figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines that lead to the points
    assert len(boxes) == 8 and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert axes.get_xlim() == axes.get_ylim() == (-3, 103)
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in crosses] == [(99.0, 92.0)]  # type: ignore[misc]


def test_what_a_classifier_does_inside_is_shown(tmp_path: Path) -> None:
    """Triggered images of classes 1 and 2 are all taken for class 0."""
    run = write_run(tmp_path / "ibau", [row("ibau", 100, 45, 1, 1, 36)], method="ibau")
    labels, zeros = np.array([0, 1, 1, 2]), np.zeros(4, np.int64)
    features: dict[str, np.ndarray] = {
        f"ibau/digits/{name}": np.eye(4, 5, dtype=np.float32) for name in ("clean", "triggered")
    }
    features |= {"ibau/digits/labels": labels, "ibau/digits/clean_classes": labels}
    features |= {"ibau/digits/triggered_labels": labels, "ibau/digits/triggered_classes": zeros}
    save_file(features, run / "features.safetensors")
    images = np.full((2, 4, 4, 3), 100, np.uint8)
    shown = {f"digits/{name}": images for name in ("clean", "triggered", "cam_clean", "cam_triggered")}
    changed = images.copy()
    changed[:, 0, 0] = 200
    save_file(shown | {"digits/triggered": changed, "digits/perturbation": images[:1]}, run / "examples.safetensors")
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    for heading in ("Confusion", "Features", "Where the network looks", "What the defence took for the trigger"):
        assert f"<h2>{heading}</h2>" in page
    found, *_ = runs.find_runs([run])
    ((model, panel),) = insides.confusions(found[0])
    texts = [[int(t.get_text()) for t in axes.texts if t.get_text()] for axes in panel.figure.axes]
    assert model == "ibau/digits" and texts == [[1, 2, 1], [1, 2, 1]]
    assert [axes.get_title(loc="left") for axes in panel.figure.axes] == ["clean, 4 images", "triggered, 4 images"]
    places = [t.get_position() for t in panel.figure.axes[1].texts if t.get_text()]
    assert places == [(0, 0), (0, 1), (0, 2)]  # column, row
    (each,) = insides.perturbations(found[0])
    png = base64.b64decode(each.trigger.removeprefix("data:image/png;base64,"))
    pixels = np.asarray(Image.open(io.BytesIO(png)))
    assert page.count('alt="mean change that the trigger makes"') == 1
    assert pixels[0, 0, :3].tolist() == [255] * 3 and pixels[1, 1, :3].tolist() == [128] * 3


def confused(folder: Path, classes: list[str], target: str) -> plots.Panel:
    """The matrices of a run whose data set has these classes: images of classes 0 and 1, triggered ones taken for 1."""
    told = {"targets": {"digits": target}, "classes": {"digits": classes}}
    run = write_run(folder / "ibau", [row("ibau", 100, 45, 1, 1, 36)], method="ibau", **told)
    (run / "config.yaml").write_text("method: ibau\n")
    labels, ones = np.array([0, 1, 1, 0]), np.ones(4, np.int64)
    kept = {"labels": labels, "clean_classes": labels, "triggered_labels": labels, "triggered_classes": ones}
    maps = {name: np.eye(4, 5, dtype=np.float32) for name in ("clean", "triggered")}
    save_file({f"ibau/digits/{name}": own for name, own in (kept | maps).items()}, run / "features.safetensors")
    found, *_ = runs.find_runs([run])
    ((_, panel),) = insides.confusions(found[0])
    return panel


def test_confusion_names_the_classes_and_marks_the_target(tmp_path: Path) -> None:
    panel = confused(tmp_path, ["zero", "one", "_a class with a very long name"], "one")
    for axes in panel.figure.axes:
        assert [t.get_text() for t in axes.get_xticklabels()] == ["zero", "one", " _a class with ..."]
        assert [t.get_color() == plots.TRIGGERED for t in axes.get_xticklabels()] == [False, True, False]
        assert axes.images[0].get_size() == (3, 3)  # also of a class that nothing was classified as
    assert panel.figure.axes[0].get_yticklabels()[0].get_text() == "zero"
    assert main(["report", str(tmp_path / "ibau")]) == 0
    assert "clean, of the target class" in (tmp_path / "ibau/report.html").read_text()


@pytest.mark.parametrize(
    ("classes", "target", "is_marked"),
    [([], "one", False), (["same"] * 3, "same", False), (list("abcdefghijklmnopqrstuvwxyz"), "b", False)],
)
def test_confusion_without_fit_names_has_numbers(
    classes: list[str], target: str, is_marked: bool, tmp_path: Path
) -> None:
    figure = confused(tmp_path, classes, target).figure
    figure.draw_without_rendering()
    axes = figure.axes[0]
    shown = [t.get_text() for t in axes.get_xticklabels()]
    assert all(text == "same" or text.strip("−").replace(".", "").isdigit() for text in shown if text)
    assert any(t.get_color() == plots.TRIGGERED for t in axes.get_xticklabels()) == is_marked


def test_pictures_that_look_the_same_are_shown_once(tmp_path: Path) -> None:
    images = np.full((2, 4, 4, 3), 100, np.uint8)
    for name, grey in (("a", 100), ("b", 100), ("c", 90)):
        run = write_run(tmp_path / name, [row("ibau", 100, 45, 1, 1, 36)], method="ibau", targets={"digits": "x"})
        save_file({"digits/clean": images, "digits/triggered": images - (100 - grey)}, run / "examples.safetensors")
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count("clean above, triggered below") == 2 and page.count("and 1 more like it") == 1
