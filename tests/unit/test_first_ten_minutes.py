"""The script for a first GPU, which nothing runs until there is one: its words exist, it goes on, and ends in time."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dist_defend import bench
from tests.gpu import table

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "gpu" / "first_ten_minutes.sh"
PARTS = re.findall(r'^(tests|bench) (\d+) ("[^"]+"|\S+)(.*)$', SCRIPT.read_text(), re.MULTILINE)


def test_it_ends_within_ten_minutes() -> None:
    """The parts' limits, three seconds for each to die, and what comes before them."""
    text = SCRIPT.read_text()
    assert "timeout -k 3" in text and "set -u" in text
    before = sum(map(int, re.findall(r"timeout (\d+) ", text)))
    assert len(PARTS) > 5 and sum(int(limit) + 3 for _, limit, _, _ in PARTS) + before < 600


def test_benches_exist() -> None:
    names = [name for kind, _, name, _ in PARTS if kind == "bench"]
    assert names and set(names) <= set(bench.NAMES)


def test_each_choice_of_tests_chooses_some() -> None:
    """Names are looked up in the files, which are collected on GPUs alone."""
    for kind, _, _, rest in PARTS:
        if kind != "tests":
            continue
        file = re.search(r"tests/gpu/\w+\.py", rest)
        assert file is not None
        text = (ROOT / file[0]).read_text()
        chosen = re.search(r'-k (?:"([^"]+)"|(\S+))', rest)
        words = re.findall(r"\w+", (chosen[1] or chosen[2]) if chosen else "")
        cases = (ROOT / "tests" / "capture" / "cases.py").read_text()
        for word in set(words) - {"and", "or", "not"}:
            assert re.search(rf"def test_\w*{word}", text) or f'"{word}' in cases, word
        assert "def test_" in text


def test_a_part_that_fails_stops_no_other(tmp_path: Path) -> None:
    """With a python that knows nothing, no wheel, and a GPU that is not there."""
    tools, out = tmp_path / "bin", tmp_path / "out"
    tools.mkdir()
    for name, text in {
        "python": 'case "$*" in *table*) echo "a table";; *waits*) sleep 60;; *bench*ibau*) ;; *) exit 3;; esac',
        "nvidia-smi": 'echo "a card, 1 MiB, 1, 1 MHz"',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    (out).mkdir()
    (out / "graphs.json").write_text("[]")
    own = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": "python", "OUT": str(out), "MOST": "1"}
    done = subprocess.run(
        [shutil.which("bash") or "bash", str(SCRIPT)],
        env=own,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    told = re.findall(r"^PART (.+) rc=(\d+) \d+ s of 1(.*)$", (out / "summary.txt").read_text(), re.MULTILINE)
    assert done.returncode == 1 and len(told) == len(PARTS), done.stdout + done.stderr
    codes = {name: code for name, code, _ in told}
    assert codes["no step waits"] == "124" and codes["bench ibau"] == "0"
    assert set(codes.values()) == {"0", "3", "124"}
    assert (out / "table.md").read_text() == "a table\n" and "a card" in done.stdout
    assert f"{len(PARTS) - 1} parts failed" in done.stdout


def test_the_page_has_the_table_of_the_rows_that_are_kept() -> None:
    rows = json.loads(table.ROWS.read_text())
    page = table.PAGE.read_text()
    assert table.filled(page, rows) == page
    assert rows or "No GPU has run this code yet" in page


def test_rows_fill_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table, "ROWS", tmp_path / "gpu.json")
    monkeypatch.setattr(table, "PAGE", tmp_path / "gpu.md")
    table.PAGE.write_text(f"before\n{table.BEGIN}old\n{table.END}after\n")
    row = {"name": "graphs-ibau-outer", "ours_ms": 1.25, "baseline_ms": 5.0, "ratio": 4.0, "device": "a card",
           "batch_size": 100, "matrix_share": 0.21, "copy_share": 1.1, "peak_flop": 4e14,
           "peak_bytes": 4.3e12}  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    table.main([str(tmp_path / "rows.json"), "--keep"])
    page = table.PAGE.read_text()
    line = "| I-BAU, VGG, B = 100: outer step | 1.92 (0.27) | <= 1.5 "
    line += "| 1.25 | 5.00 | 4.00 | 21% | 110% | a card, batch 100 |"
    assert line in page and line in capsys.readouterr().out
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert json.loads(table.ROWS.read_text()) == [row] and "\nPeaks: 400 TFLOP/s, 4.30 TB/s.\n" in page
    assert page.count(" - | - | - | - | - | - |") == len(table.ESTIMATES) - 1


def test_the_files_compile_without_what_a_gpu_machine_may_lack() -> None:
    """Collected with neither xdist nor pytest-timeout, as if there were a GPU."""
    code = (
        "import pytest, torch\n"
        "from importlib.machinery import PathFinder\n"
        "missing, find = {'ffcv', 'deepspeed', 'xdist', 'pytest_timeout', 'open_clip'}, PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *rest: None if name.split('.')[0] in missing else find(name, *rest)\n"
        "torch.cuda.is_available = lambda: True\n"
        "raise SystemExit(pytest.main(['tests/gpu', '--collect-only', '-q', '-p', 'no:cacheprovider']))\n"
    )
    own = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=own, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    collected = re.search(r"^(\d+) tests collected", done.stdout, re.MULTILINE)
    assert collected is not None and int(collected[1]) > 60
