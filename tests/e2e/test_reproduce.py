"""dist-defend reproduce from a zip of class folders and a checkpoint, as real processes in an empty folder."""

import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dist_defend.models.classifier import build_classifier

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ATTACK = {"trigger": {"name": "badnets"}, "target_class": 0}
CLP = {"model": "models/net", "test": {"path": "data/tiny/test"}, "attack": ATTACK}


def make_files(folder: Path) -> None:
    """tiny.zip with three classes of 16 px, and net.pth: a classifier of these."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny.zip", "w") as archive:
        for split, count in (("train", 12), ("test", 30)):
            for number in range(count):
                stream = io.BytesIO()
                image = generator.integers(0, 120, (16, 16, 3)) + 60 * (number % 3)
                Image.fromarray(image.astype(np.uint8)).save(stream, "PNG")
                archive.writestr(f"tiny/{split}/class {number % 3}/{number}.png", stream.getvalue())
    torch.manual_seed(0)
    torch.save(build_classifier("small_resnet", 3, "none", image_size=16).net.state_dict(), folder / "net.pth")


def make_sweep(folder: Path, expect: list[dict[str, Any]]) -> None:
    (folder / "clp.yaml").write_text(yaml.safe_dump({"method": "clp", "output": "runs/x", "clp": CLP}))
    data = ["data", "prepare", "imagefolder", "--path", "${file}", "--out", "data/tiny"]
    net = ["import", "${file}", "--arch", "small_resnet", "--normalization", "none", "--image-size", "16"]
    content = {
        "output": "runs/tiny",
        "before": [
            {"makes": "data/tiny", "get": "tiny", "ways": [{"file": "tiny.zip", "run": data}]},
            {"makes": "models/net", "get": "net", "ways": [{"file": "net.pth", "run": [*net, "--out", "models/net"]}]},
        ],
        "config": "clp.yaml",
        "seeds": [1, 2],
        "expect": expect,
    }
    head = "# Tiny.\n# hardware: a core\n# minutes:  1\n"
    (folder / "tiny.yaml").write_text(head + yaml.safe_dump(content, sort_keys=False))


def reproduce(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dist_defend", "reproduce", "tiny.yaml", "--from", "files", *words]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )


def test_one_command_from_a_zip_and_a_checkpoint(tmp_path: Path) -> None:
    make_files(tmp_path / "files")
    row: dict[str, Any] = {"metric": "acc", "published": 50, "tolerance": 50, "source": "nobody"}
    make_sweep(tmp_path, [row])
    done = reproduce(tmp_path, "-j", "2")
    assert done.returncode == 0, done.stderr
    assert "| 2 of 2 |" in done.stdout and "| PASS | nobody |" in done.stdout
    assert sorted(os.listdir(tmp_path / "data" / "tiny")) == ["test", "train"]
    written = {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name in ("result.json", "model.json")
    }
    assert len(written) == 1 + 2 + 2  # the imported model's; the points' results and models
    make_sweep(tmp_path, [row, {**row, "published": 200, "tolerance": 1}])
    again = reproduce(tmp_path)
    assert again.returncode == 1 and "nothing to run" in again.stdout and "| FAIL | nobody |" in again.stdout
    assert "dist-defend import" not in again.stdout
    assert {path: path.stat().st_mtime_ns for path in written} == written
    os.remove(next(path for path in written if path.name == "result.json"))
    third = reproduce(tmp_path)  # one point alone, then the same table
    assert third.returncode == 1 and "running 1 points" in third.stdout and "| 2 of 2 |" in third.stdout


class _Touch:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.place,)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    make_files(tmp_path / "files")
    (tmp_path / "files" / "net.pth").write_bytes(pickle.dumps({"net": _Touch(tmp_path / "touched")}))
    make_sweep(tmp_path, [])
    done = reproduce(tmp_path)
    assert done.returncode == 2 and "net.pth" in done.stderr
    assert "models/net was not made; nothing else was started" in done.stdout
    assert not (tmp_path / "touched").exists() and not (tmp_path / "runs").exists()
