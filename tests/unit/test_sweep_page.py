"""A sweep's page: the leaderboard's own numbers, plots from the points, what is missing, links to runs."""

import json
from pathlib import Path

import pytest

from dist_defend.report import plots
from dist_defend.sweep import collect, page, report
from dist_defend.sweep.comparison import Comparison
from dist_defend.sweep.grid import Sweep
from tests.unit.test_report import Links
from tests.unit.test_sweep_report import sweep as sweep


def text_of(panel: plots.Panel) -> list[str]:
    return [text.get_text() for text in panel.figure.axes[0].texts]


def test_the_page_has_the_leaderboards_numbers_and_what_is_missing(sweep: Sweep) -> None:
    (sweep.folder / "points/defence1/report.html").write_text("")
    report.write(sweep, collect.table(sweep))
    text = (sweep.folder / "report.html").read_text()
    assert '<td data-label="ACC" class="number">82.0 ± 2.8</td>' in text
    assert '<td data-label="oracle ASR" class="number">4.0 ± 0.0</td>' in text
    assert '<td data-label="model" class="name">rnp</td>' in text  # bold in a card, as the first cell is
    assert text.index('title="clean test') < text.index(">oracle ACC<")  # the defender's columns come first
    assert "5 of 6 points are done, 1 are missing" in text
    assert "<li>defence defence5 trigger=badnets seed=2 defence=ibau: missing</li>" in text
    links = Links()
    links.feed(text)
    assert sorted(target for target in links.targets if target.startswith("points")) == [
        "points/attack0/", "points/attack3/", "points/defence1/report.html", "points/defence2/", "points/defence4/",
    ]  # fmt: skip
    rest = [target for target in links.targets if not target.startswith("points")]
    assert all(target.startswith(("#", "data:image/png;base64,")) for target in rest)
    assert links.tags.count("svg") == 1 + 2 and links.tags.count("script") == 1


def test_defences_are_drawn_with_what_was_before(sweep: Sweep) -> None:
    """RNP's ACC is 80 and 84, its ASR 40; I-BAU's 88 and 2, after 90 and 100 %."""
    ((title, panel),) = page.tradeoffs(Comparison(sweep, collect.table(sweep)))
    axes = panel.figure.axes[0]
    assert title == "t, trigger=badnets" and sorted(text_of(panel)) == ["ibau", "rnp"]
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in crosses] == [(100.0, 90.0)]  # type: ignore[misc]
    points = {(*line.get_xdata(), *line.get_ydata()) for line in axes.lines if line.get_marker() == "o"}  # type: ignore[misc]
    assert points == {(40.0, 82.0), (2.0, 88.0)}


def test_a_heat_map_has_means_over_networks(sweep: Sweep) -> None:
    asr, acc = sorted(page.heat_maps(Comparison(sweep, collect.table(sweep))), key=lambda panel: panel.title)[::-1]
    assert (asr.title, acc.title) == ("ASR, %", "ACC, %")
    assert text_of(asr) == ["40.0", "2.0"] and text_of(acc) == ["82.0", "88.0"]


def test_names_from_results_do_nothing_on_the_page(sweep: Sweep) -> None:
    file = sweep.run_folder(sweep.points[1]) / "result.json"
    content = json.loads(file.read_text())
    content["rows"][0] |= {"kind": "<img src=x>$\\frac$", "task": "<script>alert(1)</script>"}
    file.write_text(json.dumps(content))
    report.write(sweep, collect.table(sweep))
    links = Links()
    links.feed((sweep.folder / "report.html").read_text())
    assert "img" not in links.tags and links.tags.count("script") == 1


@pytest.mark.parametrize("has_results", [True, False])
def test_a_page_of_nothing_is_a_page(sweep: Sweep, has_results: bool, tmp_path: Path) -> None:
    for point in sweep.points[1:] if has_results else sweep.points:
        (sweep.run_folder(point) / "result.json").unlink(missing_ok=True)
    report.write(sweep, collect.table(sweep))
    text = (tmp_path / "report.html").read_text()
    assert ("No point has counted anything yet" in text) is not has_results
    assert f"{int(has_results)} of 6 points are done" in text
