"""Run folders of others: nothing false is shown, nothing outside of the folder is embedded, no name is markup."""

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dist_defend.cli import main
from dist_defend.errors import UserError
from dist_defend.results import read_result
from tests.unit.test_report import ROWS, Links, row, write_run


def counted(name: str, correct: Any, n: Any) -> list[dict[str, Any]]:
    return [row("clean", 100, 45, 1, 11, 35) | {name: {"correct": correct, "n": n}}]


FALSE: list[tuple[dict[str, Any], str]] = [
    ({"rows": counted("acc", 51, 50)}, "acc is 51 of 50"),
    ({"rows": counted("acc", -1, 50)}, "acc is -1 of 50"),
    ({"rows": counted("acc", 45.0, 50)}, "acc.correct"),
    ({"rows": counted("acc", True, 50)}, "true and false are no numbers"),
    ({"rows": counted("acc", "45", 50)}, "acc.correct"),
    ({"rows": counted("ra", 1, 41)}, "asr, ra and asr_all count 40, 41 and 50 images"),
    ({"rows": counted("asr_all", 1, 30)}, "asr, ra and asr_all count 40, 40 and 30 images"),
    ({"rows": counted("acc", 1, 10**30)}, "acc is 1 of"),
    ({"rows": [{"kind": "clean"}]}, 'missing value for field "task"'),
    ({"rows": [3]}, "holds a int, not keys and values"),
    ({"rows": {"a": 1}}, "holds no list of at most 5000 rows"),
    ({"metrics": {"acc_before": 16666.0}}, "acc_before is 16666.0 %"),
    ({"metrics": {"asr_before": -1}}, "asr_before is -1 %"),
    ({"metrics": {"asr_before": "90"}}, "asr_before is 90 %"),
    ({"metrics": {"asr_before": True}}, "asr_before is True %"),
    ({"metrics": []}, "not keys and values"),
    ({"wall_seconds": -1}, "wall_seconds is -1"),
    ({"wall_seconds": float("nan")}, "wall_seconds is nan"),
    ({"world_size": 0}, "world_size is 0"),
    ({"world_size": True}, "true and false"),
    ({"seed": -1}, "seed is -1"),
    ({"peak_memory_bytes": 1.5}, "peak_memory_bytes"),
    ({"data": {"train": 3}}, "data"),
    ({"name": ["x"]}, "name"),
]


@pytest.mark.parametrize(("changes", "told"), FALSE)
def test_numbers_that_cannot_be_true(
    changes: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "bad", **({"rows": ROWS} | changes))
    if changes == {"metrics": []}:
        changes["metrics"] = [1]
        (tmp_path / "bad" / "result.json").write_text(json.dumps(changes))
    assert main(["report", str(tmp_path / "bad")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/bad/result.json: not a result of dist-defend: ") and told in line
    write_run(tmp_path / "good", ROWS)
    assert main(["report", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert err == "" and f"note: left out: {tmp_path}/bad/result.json: not a result" in out and "90.0 ± 2.8" in out
    assert "16666" not in (tmp_path / "report.csv").read_text()


def test_a_result_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Keys that are missing, null, NaN or unheard of are no damage."""
    more = {"metrics": {"der": float("nan"), "asr_before": None}, "head": None, "peak_memory_bytes": None}
    run = write_run(tmp_path / "old", [row("clean", 1, 45, 1, 11, 35) | {"unheard": 1}], **more, unheard={"a": [1]})
    assert main(["report", str(run)]) == 0


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("config.yaml", b"a: 1\na: 2\n", "config.yaml: line 2: key 'a' comes twice"),
        ("config.yaml", b"\xff", "config.yaml: damaged: it is no text file"),
        ("env.json", b'{"time": 1', "env.json: damaged: it cannot be read"),
        ("env.json", b'{"time": 1, "time": 2}', "key 'time' comes twice"),
        ("sweep.json", b'[{"pruned": -1, "threshold": 0.1}]', "pruned is -1"),
        ("sweep.json", b'[{"pruned": 1, "threshold": "x"}]', "sweep.json: damaged: it is not what it should be"),
        ("sweep.json", b'[{"pruned": 1, "threshold": 0, "acc": {"correct": 9, "n": 3}}]', "acc is 9 of 3"),
        ("generated.png", b"<svg onload=alert(1)>", "generated.png: damaged: it is no PNG"),
        ("features.safetensors", b"\xff" * 64, "features.safetensors: damaged: it is no safetensors file"),
    ],
)
def test_damaged_files_beside_the_result(
    name: str, content: bytes, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", ROWS)
    (run / name).write_bytes(content)
    assert main(["report", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_lines_of_metrics_that_cannot_be_true_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", ROWS)
    good = {
        "step": 1,
        "stage": "a",
        "loss": 1.0,
        "images_per_second": 1.0,
        "huge": 10**40,
        "yes": True,
        "_x": 1,
        "$": 2,
    }
    wrong: list[dict[str, Any]] = [{"stage": 3}, *({"step": step} for step in (-1, 1.5, True, "1", 10**30))]
    lines = [json.dumps(good), *(json.dumps(good | change) for change in wrong), "[" * 5000, '{"step": 1, "step": 2}']
    (run / "metrics.jsonl").write_text("\n".join(lines))
    assert main(["report", str(run)]) == 0
    assert "run: 8 unreadable line(s) of metrics.jsonl left out" in capsys.readouterr().out
    page = (run / "report.html").read_text()
    assert ">loss<" in page and ">huge<" not in page and ">yes<" not in page and ">$<" in page


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("clean/digits/clean", np.full((5, 3), np.nan, np.float32)),
        ("clean/digits/clean", np.zeros((5, 1), np.float32)),
        ("clean/digits/clean", np.zeros((5, 3, 2), np.float32)),
        ("clean/digits/clean", np.zeros((6, 3), np.float32)),
        ("clean/digits/labels", np.zeros(4, np.int64)),
        ("clean/digits/labels", np.zeros(5, np.float32)),
        ("clean/digits/triggered", np.zeros((5, 4), np.float32)),
    ],
)
def test_features_of_another_form(
    key: str, tensor: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", ROWS)
    good = {f"clean/digits/{part}": np.zeros((5, 3), np.float32) for part in ("clean", "triggered")}
    save_file(good | {"clean/digits/labels": np.zeros(5, np.int64)} | {key: tensor}, run / "features.safetensors")
    assert main(["report", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "features.safetensors: damaged: it has tensors of several lengths" in line or (
        f"features.safetensors: damaged: it holds another tensor as '{key}'" in line
    )


def link(file: Path) -> None:
    secret = file.parent.parent / "secret"
    secret.write_text("method: SECRET\n")
    file.symlink_to(secret)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "generated.png", "env.json", "result.json"])
@pytest.mark.parametrize("place", [link, os.mkfifo, Path.mkdir, lambda file: file.symlink_to("/dev/zero")])
def test_only_regular_files_of_the_folder(
    name: str, place: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", ROWS)
    (run / name).unlink(missing_ok=True)
    place(run / name)
    write_run(tmp_path / "good", ROWS)
    assert main(["report", str(tmp_path)]) == 1
    assert f"note: left out: {run / name}" in capsys.readouterr().out
    for page in tmp_path.glob("report.*"):
        assert "SECRET" not in page.read_text()


def test_a_link_inside_of_the_folder_is_followed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ROWS)
    (run / "config.yaml").rename(run / "kept.yaml")
    (run / "config.yaml").symlink_to("kept.yaml")
    assert main(["report", str(run)]) == 0
    assert "target_class: 1" in (run / "report.html").read_text()


NAMES = [
    "<img src=x onerror=alert(1)>",
    "](http://x) [a",
    "=cmd|' /C calc'!A0",
    "@x",
    "\x1b[2J",
    "a\nb | c",
    "${x}$\\frac",
    "\udc80",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_do_nothing_anywhere(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(
        tmp_path / "run",
        [row(name, 1, 5, 1, 11, 35, task=name)],
        name=name,
        method=name,
        targets={name: name},
        device=name,
    )
    line = {"step": 1, "stage": name, "images_per_second": 1.0, f"loss{name}": 1.0, name: 2.0}
    (run / "metrics.jsonl").write_text(json.dumps(line))
    assert main(["report", str(run)]) == 0
    assert all(c.isprintable() or c == "\n" for c in capsys.readouterr().out)
    links = Links()
    page = (run / "report.html").read_text()
    links.feed(page)
    assert "img" not in links.tags and all(target.startswith(("data:", "#")) for target in links.targets)
    markdown = (run / "report.md").read_text()
    assert "<img" not in markdown and "http://" not in markdown and "[a" not in markdown.replace("\\[a", "")
    widths = {line.count("|") - line.count("\\|") for line in markdown.split("## Runs")[1].splitlines() if line}
    assert widths == {11}
    head, cells = csv.reader(io.StringIO((run / "report.csv").read_text()))
    assert len(head) == len(cells) and not any(text.startswith(("=", "+", "@", "\t", "\r")) for text in cells)
    for text in (page, markdown, str(cells)):
        assert all(c.isprintable() or c in "\n\t" for c in text)


def test_no_table_follows_a_result_out_of_its_folder(tmp_path: Path) -> None:
    """Neither the report's nor the sweep's, which both read it here; a link to nowhere is one line too."""
    (tmp_path / "run").mkdir()
    link = tmp_path / "run" / "result.json"
    link.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match="a link to nowhere"):
        read_result(link, "restore it")
    (tmp_path / "elsewhere.json").write_text("{}")
    with pytest.raises(UserError, match="a link out of its folder"):
        read_result(link, "restore it")
