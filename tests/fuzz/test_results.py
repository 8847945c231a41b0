"""Run folders with things wrong, as `report` and `sweep report` read them: reported, left out and told, or refused."""

import contextlib
import io
import json
import os
import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.decomposition
import sklearn.manifold
import yaml
from PIL import Image
from safetensors.numpy import save

from dist_defend.cli import main
from dist_defend.config import Experiment
from dist_defend.errors import UserError
from dist_defend.report import html, runs, tables
from dist_defend.sweep import collect, report
from dist_defend.sweep.file import StageConfig, SweepConfig
from dist_defend.sweep.grid import Point, Sweep
from tests.fuzz.harness import bad_outcomes
from tests.fuzz.mutate import mutate_bytes, mutate_tree

SURFACES = ("report_tree", "report_bytes", "sweep_report")
IMPORTED = (sklearn.decomposition, sklearn.manifold, html)  # now, not while an input's time is taken
RATES = ("acc", "asr", "asr_all", "ra")


DETECTED = {
    "kind": "detector", "task": "digits", "seed": 1, "detector": "decree", "quantity": "PL1", "score": 0.07,
    "low": 0.06, "high": 0.08, "bound": 0.1, "flags": "below", "verdict": "backdoored", "truth": "clean", "note": "x",
}  # fmt: skip


def row(kind: str, seed: int) -> dict[str, Any]:
    counts = zip(RATES, ((9, 10), (3, 8), (4, 10), (5, 8)), strict=True)
    return {"kind": kind, "task": "digits", "seed": seed, **{k: {"correct": c, "n": n} for k, (c, n) in counts}}


@cache
def trees() -> dict[str, Any]:
    """The files of one run folder that are JSON, lines of it, or YAML."""
    count = {"correct": 9, "n": 10}
    stop = {"pruned": 3, "threshold": 0.5, "chosen": True, "oracle": False, "acc": count, "asr": count}
    return {
        "result.json": {
            "name": "run", "method": "probe", "head": "linear", "seed": 100, "world_size": 1, "device": "cpu",
            "code_version": "1+abc", "config_sha256": "0" * 64, "wall_seconds": 61.5, "peak_memory_bytes": 1 << 30,
            "data": {"train": "ab" * 32}, "targets": {"digits": "one"}, "notes": ["a note"],
            "metrics": {"acc_before": 90.0, "asr_before": 100.0, "der": float("nan")},
            "rows": [row("clean", 1), row("backdoored", 1), row("backdoored", 2), DETECTED],
        },
        "metrics.jsonl": [
            *({"step": s, "stage": "a", "epoch": 0, "images_per_second": 9.0, "loss": 5.0 / s} for s in (1, 2, 3)),
            {"step": 3, "stage": "a", "epoch": 1, "knn_acc": 61.0},
        ],
        "sweep.json": [stop, {**stop, "threshold": None, "pruned": 0}],
        "env.json": {"time": "2026-01-01", "packages": {"torch": "2"}},
        "config.yaml": {"method": "probe", "probe": {"tasks": {"digits": {"target_class": 1}}}},
    }  # fmt: skip


@cache
def files() -> dict[str, bytes]:
    """The others, and the same."""
    draw = np.random.default_rng(0)
    features: dict[str, np.ndarray] = {}
    for part in ("clean", "triggered"):
        features[f"clean/digits/{part}"] = draw.normal(size=(6, 4)).astype(np.float32)
    features["clean/digits/labels"] = np.arange(6) % 3
    pictures = draw.integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    png = io.BytesIO()
    Image.fromarray(pictures[0]).save(png, "PNG")
    return {
        **{name: text(name, tree).encode() for name, tree in trees().items()},
        "features.safetensors": save(features),
        "examples.safetensors": save({"digits/clean": pictures, "digits/triggered": 255 - pictures}),
        "generated.png": png.getvalue(),
        "found.png": png.getvalue(),
    }


def text(name: str, tree: Any) -> str:
    if name.endswith(".jsonl"):
        lines = tree if isinstance(tree, list) else [tree]
        return "".join(json.dumps(line) + "\n" for line in lines)
    return str(yaml.dump(tree)) if name.endswith(".yaml") else json.dumps(tree)


def write_runs(rng: random.Random, folder: Path, change: Callable[[str], bytes], chosen: list[str]) -> None:
    """A run folder with one to three broken files, and now and then a good one beside it. Few have every file."""
    broken = set(rng.sample(chosen, rng.randint(1, min(3, len(chosen)))))
    kept = {"result.json", "config.yaml", *broken}
    for name, parts in (("bad", broken), ("good", set())) if rng.random() < 0.3 else (("bad", broken),):
        (folder / name).mkdir()
        for file in kept:
            path = folder / name / file
            path.write_bytes(change(file) if file in parts else files()[file])
    match rng.randrange(20):
        case 0:
            spoiled = folder / "bad" / rng.choice(sorted(broken))
            spoiled.unlink()
            os.mkfifo(spoiled)
        case 1:
            spoiled = folder / "bad" / rng.choice(sorted(broken))
            spoiled.unlink()
            spoiled.symlink_to(rng.choice(("/etc/passwd", "/dev/zero", "loop", str(spoiled), "/proc/self/mem")))


def reading(rng: random.Random, folder: Path) -> Callable[[], object]:
    """One input in eight goes through the whole command: drawing is what takes its time."""
    return whole_command(folder) if rng.random() < 1 / 8 else lambda: tables_of(folder)


def tables_of(folder: Path) -> object:
    found, unfinished, damaged = runs.find_runs([folder])
    lines = tables.summarise(found)
    notes = [*tables.alarms(lines), *tables.notices(found, unfinished, damaged, lines)]
    assert all(0 <= score.mean <= 100 for line in lines for score in line.scores.values() if score.mean == score.mean)
    return tables.to_csv(found), tables.to_markdown(lines, notes, found), tables.to_text(lines) if lines else ""


def whole_command(folder: Path) -> Callable[[], object]:
    """The command, which must end in 0, 1 with the reason, or 2 with one line; its pages hold no markup of a file."""

    def read() -> object:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["report", str(folder)])
        lines = err.getvalue().splitlines()
        print(out.getvalue(), err.getvalue())
        if status == 2:
            assert len(lines) == 1 and lines[0].startswith("error: "), lines
            raise UserError(lines[0])
        assert status == (1 if "note: left out: " in out.getvalue() else 0), err.getvalue()
        rates = re.findall(r"-?\d+\.\d%|width:([\d.-]+)%", (folder / "report.html").read_text())
        assert all(0 <= float(rate) <= 100 for rate in rates if rate)
        return status

    return read


def report_tree(rng: random.Random, folder: Path) -> Callable[[], object]:
    write_runs(rng, folder, lambda name: text(name, mutate_tree(rng, trees()[name])).encode(), list(trees()))
    return reading(rng, folder)


def report_bytes(rng: random.Random, folder: Path) -> Callable[[], object]:
    write_runs(rng, folder, lambda name: mutate_bytes(rng, files()[name]), list(files()))
    return reading(rng, folder)


def sweep_report(rng: random.Random, folder: Path) -> Callable[[], object]:
    points = []
    for number in range(2):
        output = folder / f"point{number}"
        output.mkdir()
        tree = trees()["result.json"]
        content = text("result.json", mutate_tree(rng, tree) if number == 0 or rng.random() < 0.3 else tree).encode()
        (output / "result.json").write_bytes(mutate_bytes(rng, content) if rng.random() < 0.2 else content)
        experiment = Experiment("classifier", str(output), options={})
        points.append(Point("a", f"key{number}", experiment, {"a.rate": number / 10}, None, number, ()))
    sweep = Sweep(folder / "sweep.yaml", SweepConfig(str(folder / "sweep"), {"a": StageConfig()}), tuple(points))

    def read() -> object:
        rows = collect.table(sweep)
        rates = rows.reindex(columns=list(RATES)).to_numpy(float)
        assert ((rates >= 0) & (rates <= 100) | np.isnan(rates)).all()
        collect.write(sweep, rows)
        report.write(sweep, rows)
        return rows

    return read


def test_what_is_broken_here_was_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    for name, content in files().items():
        (tmp_path / "run" / name).write_bytes(content)
    assert main(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    for heading in (
        "Before and after",
        "Detectors",
        "The trigger",
        "Generated images",
        "Features",
        "Pruning",
        "Training",
    ):
        assert f"<h2>{heading}</h2>" in page


def test_read_or_refused(count: int) -> None:
    assert bad_outcomes(f"tests.fuzz.test_results:{','.join(SURFACES)}", count) == []
