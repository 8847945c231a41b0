"""bench peers with a stand-in for lightly: same names, our own contents."""

import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor
from torch.nn import functional
from torchvision import transforms

from dist_defend import bench
from dist_defend.bench import table
from dist_defend.bench.published.simclr import nt_xent
from dist_defend.cli import main

TINY = ["--encoder", "small_cifar", "--batch-size", "4", "--num-images", "8", "--repeats", "1"]


class Loss:
    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, z1: Tensor, z2: Tensor) -> Tensor:
        return nt_xent(functional.normalize(z1), functional.normalize(z2), self.temperature)


class Transform:
    def __init__(self, **options: Any) -> None:
        assert options["input_size"] == 32 and options["gaussian_blur"] == 0
        self.view = transforms.ToTensor()

    def __call__(self, image: Any) -> list[Tensor]:
        return [self.view(image), self.view(image)]


@pytest.fixture
def lightly(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], None]:
    """Installs the stand-in, with this loss."""

    def install(loss: type) -> None:
        parts: dict[str, dict[str, Any]] = {"": {}, ".loss": {"NTXentLoss": loss}}
        parts[".transforms"] = {"SimCLRTransform": Transform}
        for part, members in parts.items():
            module = ModuleType(f"lightly{part}")
            module.__spec__ = ModuleSpec(module.__name__, None)
            vars(module).update(members)
            monkeypatch.setitem(sys.modules, module.__name__, module)

    return install


def test_rows(lightly: Callable[[type], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lightly(Loss)
    assert main(["bench", "peers", *TINY, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    kinds = [f"peers-{what}-{how}" for how in ("documented", "tuned") for what in ("views", "simclr")]
    assert [row["name"] for row in rows] == kinds
    for row in rows:
        assert row["ratio"] == pytest.approx(row["baseline_ms"] / row["ours_ms"])
        assert row["encoder"] == "small_cifar" and row["batch_size"] == 4 and row["images_per_second"] > 0
    assert "peers-simclr-documented: loss" in capsys.readouterr().out


def test_another_loss_is_not_timed(lightly: Callable[[type], None], capsys: pytest.CaptureFixture[str]) -> None:
    class Half(Loss):
        def __call__(self, z1: Tensor, z2: Tensor) -> Tensor:
            return super().__call__(z1, z2) / 2

    lightly(Half)
    assert main(["bench", "peers", *TINY]) == 1
    assert "do not compute the same" in capsys.readouterr().err


def test_without_lightly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lightly", None)
    assert main(["bench", "peers"]) == 2
    error = "error: bench peers needs lightly, which is not installed: pip install 'dist-defend[peers]'\n"
    assert capsys.readouterr().err == error
    monkeypatch.setattr(bench, "NAMES", ("peers",))
    assert main(["bench", "all"]) == 0
    assert "peers: left out" in capsys.readouterr().out


def test_rows_as_a_table() -> None:
    shared = {"batch_size": 4, "device": "cpu", "min_ratio": 1.0, "max_ratio": 3.0}
    timed = {"name": "a", "ratio": 2.0, "ours_ms": 10.0, "baseline_ms": 20.0, "images_per_second": 400.0}
    weighed = {"name": "b", "ratio": 1.25, "ours_mib": 800.0, "baseline_mib": 1000.0, "encoder": "vgg"}
    several = {**timed, "name": "c", "images_per_second": {"ours": 40.0, "pil": 4.0}}
    lines = table.table([{**timed, **shared}, {**weighed, **shared}, {**several, **shared}]).splitlines()
    assert lines[2] == "| a | 2.00 (1.00 to 3.00) | 10 ms | 20 ms | 400 | 4 | - | cpu |"
    assert lines[3] == "| b | 1.25 (1.00 to 3.00) | 800 MiB | 1000 MiB | - | 4 | vgg | cpu |"
    assert lines[4].split(" | ")[4] == "ours 40, pil 4"
    assert {line.count("|") for line in lines} == {9}
