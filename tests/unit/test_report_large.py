"""A report of many runs: figures of all runs of a method together, thumbnails, and few bytes for each run."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dist_defend.cli import main
from dist_defend.report import runs, shared
from tests.unit.test_report import Links, row, write_run

BYTES = 10_000  # of a run more, so that 500 runs are 5 MB


def write_defence(parent: Path, number: int, method: str = "rnp") -> None:
    """A run of a pruning defence with all that a run folder may hold, of the size that real ones have."""
    random = np.random.default_rng(number)
    rows = [row(kind, number, 40 + number % 9, 4, 12, 30) for kind in ("backdoored", "purified")]
    folder = write_run(parent / f"{method}_{number}", rows, targets={"digits": "one"})
    result = json.loads((folder / "result.json").read_text()) | {"method": method, "seed": number}
    (folder / "result.json").write_text(json.dumps(result))
    config = "".join(f"  key_{i}: a value that all of them have\n" for i in range(60))
    text = f"method: {method}\nseed: {number}\n{method}:\n{config}probe:\n  tasks:\n    digits: {{target_class: 1}}\n"
    (folder / "config.yaml").write_text(text)
    lines: list[dict[str, Any]] = [
        {"step": s, "stage": "unlearn", "images_per_second": 9.0, "loss": number + 10.0 / s, "epoch": 0}
        for s in range(1, 301)
    ]
    lines += [{"step": s, "stage": "unlearn", "epoch": 1, "acc": 50.0 + number} for s in range(50, 301, 50)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    counts = {name: {"correct": number, "n": 40} for name in ("acc", "asr", "acc_defence")}
    stops = [{"threshold": t / 20, "pruned": t, "chosen": t == 4, "oracle": t == 5} | counts for t in range(1, 20)]
    (folder / "sweep.json").write_text(json.dumps(stops))
    features: dict[str, np.ndarray] = {}
    for kind in ("backdoored", "purified"):
        for part in ("clean", "triggered"):
            features[f"{kind}/digits/{part}"] = random.normal(size=(500, 8)).astype(np.float32)
        features[f"{kind}/digits/labels"] = np.arange(500) % 3
    save_file(features, folder / "features.safetensors")
    clean = (
        random.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8) if number % 2 else np.zeros((8, 64, 64, 3), np.uint8)
    )
    save_file({"digits/clean": clean, "digits/triggered": 255 - clean}, folder / "examples.safetensors")


def page(folder: Path) -> str:
    assert main(["report", str(folder)]) == 0
    return (folder / "report.html").read_text()


def test_each_run_more_is_few_bytes_and_the_figures_are_shared(tmp_path: Path) -> None:
    for number in range(13):
        write_defence(tmp_path, number)
    first = page(tmp_path)
    for number in range(13, 18):
        write_defence(tmp_path, number)
    more = page(tmp_path)
    assert (len(more.encode()) - len(first.encode())) / 5 <= BYTES
    links = Links()
    links.feed(more)
    assert links.tags.count("svg") == 4  # losses, evaluations and pruning of all eighteen; ACC against ASR
    assert links.tags.count("img") == 2 * 18 + 9 + 1  # features; triggers, of which nine are the same
    assert "rnp_0)</b>, target class “one”, and 8 more like it" in more
    assert all(target.startswith(("data:image/png;base64,", "#")) for target in links.targets)
    assert more.count("as rnp_0, but for:\n") == 17 and more.count("a value that all of them have") == 60
    assert re.search(r"-seed: 0\n\+seed: 17\b", more)
    assert (
        len(re.findall(r"<th scope=\"row\">", more)) == 36 + 18
    )  # nothing is left out of the tables of rates and runs


def test_few_runs_have_figures_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "MOST_OWN", 2)
    for number in range(2):
        write_defence(tmp_path, number)
    assert page(tmp_path).count("<svg") == 2 * (2 + 1 + 2) + 1
    write_defence(tmp_path, 2)
    assert page(tmp_path).count("<svg") == 4


def test_methods_are_told_apart(tmp_path: Path) -> None:
    for number in range(13):
        write_defence(tmp_path, number, "rnp" if number < 9 else "anp")
    found, *_ = runs.find_runs([tmp_path])
    assert [name for name, _ in shared.curves(found)] == ["rnp", "anp"]
    assert {name: panel.title for name, panel in shared.sweeps(found)} == {"rnp": "9 runs", "anp": "4 runs"}


def test_a_band_is_the_runs_percentiles_where_they_have_been() -> None:
    steps = np.arange(60.0)
    every = [(steps, steps + number) for number in range(11)] + [(steps[:30], steps[:30] + 100)]
    x, median, low, high = shared._band(every)
    assert x == pytest.approx(steps)
    assert median[40:] == pytest.approx(x[40:] + 5) and low[40:] == pytest.approx(x[40:] + 1)
    assert high[40:] == pytest.approx(x[40:] + 9)
    assert median[:30] == pytest.approx(x[:30] + 5.5)  # of twelve
    alone = shared._band([(np.array([3.0, 1.0]), np.array([30.0, 10.0])), (np.array([7.0]), np.array([1.0]))])
    assert alone[0][0] == 1.0 and alone[0][-1] == 7.0 and not np.isnan(alone).any()
    assert alone[1][np.flatnonzero(alone[0] <= 3)] == pytest.approx(10 * alone[0][alone[0] <= 3])
