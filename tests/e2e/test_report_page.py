"""The report's page in headless Chromium: at no width is a column, a figure or a word cut off."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_defend.cli import main
from dist_defend.sweep import collect, report
from dist_defend.sweep.grid import Sweep
from tests.unit.test_report import ROWS, detected, write_defence, write_run, write_story
from tests.unit.test_sweep_report import sweep as sweep

ROOT = Path(__file__).parents[2]
CHROMIUM = next((found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None)
WIDTHS = (390, 768, 1024, 1440, 2560)
PRINTED = 718  # pixels between the margins of A4, as Chromium prints it
pytestmark = pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="Chromium is not installed")
MEASURE = """
const found = {};
for (const frame of document.querySelectorAll("iframe")) {
  const page = frame.contentDocument, width = page.documentElement.clientWidth, cut = [];
  for (const element of page.querySelectorAll("body, table, tr, th, td, figure, svg, img, pre, p, dd, dt, h3, div")) {
    const style = frame.contentWindow.getComputedStyle(element), box = element.getBoundingClientRect();
    if (style.display === "inline" || element.closest("thead") && frame.dataset.cards) continue;
    const isIn = box.right <= width + 0.5 && box.left >= -0.5;
    const isWhole = element.tagName === "svg" || element.scrollWidth <= element.clientWidth + 1;
    const isSeen = box.width > 0 || element.closest("details:not([open])");
    if (!isIn || !isWhole || !isSeen) {
      cut.push(`${element.tagName} ${element.textContent.trim().slice(0, 40)} ${box.left} ${box.right}`);
    }
  }
  const labels = [...page.querySelectorAll("table.sheet td")].filter(
    cell => frame.contentWindow.getComputedStyle(cell, "::before").content !== JSON.stringify(cell.dataset.label));
  found[frame.id] = { width, cut, unnamed: labels.length, cells: page.querySelectorAll("table.sheet td").length };
}
const told = document.createElement("pre");
told.id = "measured";
told.textContent = JSON.stringify(found);
document.body.replaceChildren(told);
"""


def framed(page: str, width: int, name: str, has_cards: bool) -> str:
    """The page in a frame of so many pixels, whose width its media queries see."""
    cards = ' data-cards="yes"' if has_cards else ""
    source = html.escape(page)
    return f'<iframe id="{name}"{cards} style="width:{width}px;height:900px;border:0" srcdoc="{source}"></iframe>'


def measured(page: str, folder: Path) -> dict[str, Any]:
    """What each frame's elements reach beyond, by the frame's name."""
    assert CHROMIUM is not None, "CI installs it"
    frames = [framed(page, width, str(width), has_cards=width < 896) for width in WIDTHS]
    printed = page.replace("@media screen", "@media speech").replace("@media print", "@media all")
    frames.append(framed(printed, PRINTED, "print", has_cards=False))
    frame_page = f"<!doctype html><body>{''.join(frames)}<script>onload = () => {{ {MEASURE} }}</script></body>"
    (folder / "frames.html").write_text(frame_page, encoding="utf-8")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
    ]
    command += ["--window-size=2700,1000", "--dump-dom", (folder / "frames.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    told = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    assert told is not None, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(told.group(1)))
    return found


def check(found: dict[str, Any]) -> None:
    assert set(found) == {*map(str, WIDTHS), "print"}
    for name, frame in found.items():
        assert frame["width"] == (PRINTED if name == "print" else int(name))
        assert frame["cut"] == [], f"at {name}: {frame['cut'][:5]}"
        assert frame["cells"] > 0
        if name.isdigit() and int(name) < 896:  # where a row is a card, each cell says what it is
            assert frame["unnamed"] == 0


def test_no_column_is_cut_at_any_width(tmp_path: Path) -> None:
    """A run for each table that there is, with long names, several seeds and all that re-activation counts."""
    write_story(tmp_path / "runs/demo")
    write_defence(tmp_path / "runs/a_folder_with_a_rather_long_name")
    more = {
        name: {"correct": 20, "n": 40} for name in ("asr_retuned", "asr_retuned_clean", "asr_retuned_control",
                                                    "asr_queried", "asr_queried_control")
    }  # fmt: skip
    rows = [row | more | {"acc_retuned": {"correct": 45 + row["seed"] % 2, "n": 50}} for row in ROWS]
    write_run(tmp_path / "runs/again_with_a_name_that_is_long_too", rows, method="reactivate", targets={"digits": "x"})
    run = write_run(tmp_path / "runs/decree", [detected(0.07, "backdoored")], method="decree", world_size=8,
                    code_version="0.1.0+0123456789ab+", config_sha256="c0ffee" * 10, data={"train": "deadbeef" * 8,
                    "test": "deadbeef" * 8, "defence": "deadbeef" * 8})  # fmt: skip
    Image.fromarray(np.zeros((6, 9, 3), np.uint8)).save(run / "found.png")
    assert main(["report", str(tmp_path / "runs")]) == 0
    check(measured((tmp_path / "runs/report.html").read_text(), tmp_path))


def test_the_readmes_picture_is_drawn(tmp_path: Path) -> None:
    write_story(tmp_path / "demo")
    assert main(["report", str(tmp_path / "demo")]) == 0
    command = [str(ROOT / "launch/picture"), "demo/report.html", "drawn.png"]
    given = os.environ | {"SIZE": "700,500"}
    done = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == str(tmp_path / "drawn.png")
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert drawn.size == (1050, 750) and len(drawn.getcolors(1 << 20) or []) > 20
    absent = subprocess.run([*command[:1], "no.html"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert absent.returncode == 2 and "no.html is not there" in absent.stderr


def test_no_column_of_a_sweeps_report_is_cut(sweep: Sweep, tmp_path: Path) -> None:
    report.write(sweep, collect.table(sweep))
    check(measured((sweep.folder / "report.html").read_text(), tmp_path))
