"""Figures and tables as files of their own, and what pruning's figures show."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_defend.cli import main
from dist_defend.errors import UserError
from dist_defend.report import exports, masks, runs
from dist_defend.report.sheet import Cell, Head, Row, Sheet
from tests.unit.test_report import write_defence, write_story

SHEET = Sheet(
    "rates",
    [Head("model", is_number=False), Head("ACC %")],
    [("a_b & c", [Row([Cell("rnp", more="run_1"), Cell("85.0 ± 7.1", 85.0)]), Row([Cell("=x"), Cell("–")])])],
)


def test_a_sheet_as_latex() -> None:
    assert SHEET.to_latex().splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"model & ACC \% \\",
        r"\midrule",
        r"\multicolumn{2}{l}{\textit{a\_b \& c}} \\",
        r"rnp (run\_1) & 85.0 $\pm$ 7.1 \\",
        r"=x & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_a_sheet_as_csv() -> None:
    assert SHEET.to_csv().splitlines() == [
        "group,model,ACC %",
        "a_b & c,rnp (run_1),85.0 ± 7.1",
        "a_b & c,'=x,–",
    ]


def test_every_figure_and_table_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_story(tmp_path / "demo")
    write_defence(tmp_path)
    (tmp_path / "rnp/mask_values.txt").write_text("head\n0 \t bn \t 0 \t 0.0200 \n")
    assert main(["report", str(tmp_path), "--files"]) == 0
    folder = tmp_path / "report_files"
    stems = {file.stem for file in folder.glob("*.svg")}
    assert stems == {
        "clean_simclr", "clean_simclr_evaluated", "probe_clean_digits_features", "probe_backdoored_digits_features",
        "tradeoff_digits", "trigger_digits_probe", "rnp_sweep", "rnp_masks",
    }  # fmt: skip
    assert stems == {file.stem for file in folder.glob("*.pdf")}
    assert all(file.read_bytes().startswith(b"%PDF-") for file in folder.glob("*.pdf"))
    tables = {"table_rates", "table_runs", "table_stops_rnp"}
    assert {file.stem for file in folder.glob("*.tex")} == tables == {file.stem for file in folder.glob("*.csv")}
    assert f"22 files of figures and tables: {folder}" in capsys.readouterr().out


def test_names_of_files_lead_nowhere_and_differ() -> None:
    taken: set[str] = set()
    names = [exports.file_name(name, taken) for name in ("../../etc/x", "etc/x", ".hidden", "", "a" * 300, "ETC x")]
    assert names == ["etc_x", "etc_x_2", "hidden", "figure", "a" * 80, "ETC_x_3"]


def test_masks_are_counted_and_the_chosen_threshold_is_marked() -> None:
    stops: list[dict[str, Any]] = [
        {"threshold": None, "pruned": 0, "chosen": False, "oracle": False},
        {"threshold": 0.2, "pruned": 3, "chosen": True, "oracle": False},
        {"threshold": 0.4, "pruned": 4, "chosen": False, "oracle": True},
    ]
    panel = masks.histogram([0.01, 0.01, 0.02, 0.31, 0.99, 1.0], stops, "rnp")
    axes = panel.figure.axes[0]
    heights = {round(bar.get_x(), 3): bar.get_height() for bar in axes.patches if bar.get_height()}  # type: ignore[attr-defined]
    assert heights == {0.0: 3, 0.3: 1, 0.975: 2}
    assert [(line.get_xdata()[0], line.get_linestyle()) for line in axes.lines] == [(0.2, "-"), (0.4, ":")]  # type: ignore[index]
    assert panel.title == "masks of 6 neurons, threshold 0.2"


def test_the_table_of_stops_begins_with_nothing_pruned(tmp_path: Path) -> None:
    file = write_defence(tmp_path) / "rnp" / "sweep.json"
    stops = json.loads(file.read_text())
    for stop, acc, asr in ((stops[2], 40, 20), (stops[3], 35, 10)):  # of 50 and of 40
        stop["acc"]["correct"], stop["asr"]["correct"] = acc, asr
    file.write_text(json.dumps(stops))
    (run,) = runs.find_runs([file.parent])[0]
    (_, rows), *_ = masks.stops_sheet(run.sweep, "rnp").groups
    texts = [[cell.text for cell in row.cells] for row in rows]
    assert texts[0] == ["0: nothing pruned", "0", "90.0", "90.0", "+0.0", "100.0", "+0.0", ""]
    assert texts[1] == ["1: mask ≤ 0", "3", "90.0", "–", "–", "–", "–", ""]
    assert texts[2][3:] == ["80.0", "−10.0", "50.0", "−50.0", "chosen"]
    assert texts[3][3:] == ["70.0", "−20.0", "25.0", "−75.0", "by the oracle"]  # changes since nothing was pruned


@pytest.mark.parametrize("content", ["head\n0 bn 0 x\n", "head\n0 bn 0 1.5\n", "head\n0 bn 0 nan\n"])
def test_a_damaged_table_of_masks_is_told(tmp_path: Path, content: str) -> None:
    run = write_defence(tmp_path) / "rnp"
    (run / "mask_values.txt").write_text(content)
    with pytest.raises(UserError, match=r"mask_values\.txt: damaged"):
        runs.find_runs([run])
