"""Tables on a terminal: a wide one comes in parts, and no column and no row is lost or wrapped."""

import io
import re
import sys
from pathlib import Path

import pytest

from dist_defend.aligned import aligned, width_of
from dist_defend.cli import main
from dist_defend.sweep import collect, report
from dist_defend.sweep.grid import Sweep
from tests.unit.test_report import write_defence
from tests.unit.test_sweep_report import sweep as sweep

TABLE = [
    ["task", "run", "ACC %", "ΔACC", "ASR %"],
    ["digits", "poisoned", "96.9", "–", "100.0"],
    ["digits", "unlearned", "91.1", "−5.8", "5.9"],
    ["shirts", "unlearned", "9.1", "−5.8", "5.9"],
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def words(text: str) -> list[list[str]]:
    return [re.split(r" {2,}", line) for line in text.splitlines()]


def test_columns_stand_below_each_other() -> None:
    assert aligned(TABLE, 2, by_first=True).splitlines() == [
        "task    run        ACC %  ΔACC  ASR %",
        "",
        "digits  poisoned    96.9     –  100.0",
        "digits  unlearned   91.1  −5.8    5.9",
        "",
        "shirts  unlearned    9.1  −5.8    5.9",
    ]
    assert aligned(TABLE[:2], 2, numbers=False).splitlines()[1] == "digits  poisoned  96.9   –     100.0"


@pytest.mark.parametrize("width", [20, 26, 31, 36, 37, 80])
def test_a_table_that_is_too_wide_comes_in_parts(width: int) -> None:
    told = aligned(TABLE, 2, width)
    assert max(map(len, told.splitlines())) <= max(width, 26)  # names keep twelve letters at least
    parts = [words(part) for part in told.split("\n\n")]
    assert (len(parts) == 1) == (width >= 37)
    assert all(len(part) == len(TABLE) and [row[:2] for row in part] == [row[:2] for row in TABLE] for part in parts)
    for number, row in enumerate(TABLE):
        assert [cell for part in parts for cell in part[number][2:]] == row[2:]


def test_a_long_name_keeps_its_end() -> None:
    table = [["run", "ACC %"], ["runs/demo/a_folder_with_a_long_name/unlearned", "91.1"]]
    assert aligned(table, 1, 30).splitlines()[1] == "..._long_name/unlearned   91.1"
    assert aligned(table, 1).splitlines()[1].startswith("runs/demo/")


def test_only_a_terminal_has_a_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    assert (width_of(Terminal()), width_of(io.StringIO())) == (72, None)


def test_the_reports_table_fits_eighty_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_defence(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    told = Terminal()
    monkeypatch.setattr(sys, "stdout", told)
    assert main(["report", str(tmp_path)]) == 0
    table = told.getvalue().split("\nnote:")[0].split("\nreport:")[0]
    assert max(map(len, table.splitlines())) <= 80
    shown = {cell for row in words(table) for cell in row}
    assert {"ACC %", "ΔACC", "ASR %", "ΔASR", "ASR-all %", "RA %", "DER %", "n", "seeds", "50 / 40"} <= shown


def test_the_sweeps_tables_fit_eighty_letters(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    told = Terminal()
    monkeypatch.setattr(sys, "stdout", told)
    report.write(sweep, collect.table(sweep))
    text = told.getvalue().partition("Missing: ")[0]
    assert max(map(len, text.splitlines())) <= 80 and "|" not in text
    shown = {cell for row in words(text) for cell in row}
    assert {*report.cells(report.leaderboard(sweep, collect.table(sweep)))[0], "Leaderboard"} <= shown
    assert "Missing: 1 of 6 points" in told.getvalue()
