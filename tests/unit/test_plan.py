"""The plan against what torch's allocator really hands out, and against closed forms."""

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dist_defend.batch import Batch
from dist_defend.cli import main
from dist_defend.methods.simclr import SimCLRObjective
from dist_defend.models.encoder import build_simclr
from dist_defend.plan import measure
from tests.runs import make_experiment


def vit_experiment(folder: Path, arch: str, batch_size: int) -> Path:
    options = {
        "data": {"path": "nowhere"},
        "arch": arch,
        "augment": {"crop": "random_resized", "size": 224},
        "update": {"batch_size": batch_size, "optimizer": {"name": "adamw"}},
    }
    return make_experiment(folder, "simclr", options)


def told(text: str, key: str) -> float:
    """MiB in the line of that name."""
    return next(float(line.split()[1]) for line in text.splitlines() if line.split()[:1] == [key])


def real_peak(arch: str, size: int, count: int) -> tuple[float, float]:
    """MiB at the peak of a forward and backward pass on this CPU, above what was there, and the plan's MiB for it."""
    torch.manual_seed(0)
    objective = SimCLRObjective(build_simclr(arch, "none", image_size=size), 0.5)
    views = tuple(torch.rand(2, count, 3, size, size))
    batch = Batch(views, torch.zeros(count).long(), torch.arange(count))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        objective(batch)["loss"].backward()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    for parameter in objective.parameters():
        parameter.grad = None
    memory = measure(objective, batch, "adam", 1, "ddp")
    return peak / 2**20, (memory.activations + memory.gradients) / 2**20


@pytest.mark.parametrize(
    ("arch", "size", "count"),
    [("small_cifar", 32, 64), ("resnet18_cifar", 32, 8), ("timm:vit_tiny_patch16_224", 64, 8)],
)
def test_the_plan_is_within_15_percent_of_the_measured_peak(arch: str, size: int, count: int) -> None:
    measured, planned = real_peak(arch, size, count)
    assert measured > 5
    assert planned == pytest.approx(measured, rel=0.15)


def test_vit_large_on_64_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = vit_experiment(tmp_path, "timm:vit_large_patch16_224", 512)
    overrides = ["--world-size", "64", "--strategy", "zero3"]
    assert main(["plan", str(config), *overrides]) == 0
    text = capsys.readouterr().out
    count = sum(p.numel() for p in build_simclr_on_meta("timm:vit_large_patch16_224").parameters())
    assert count == pytest.approx(304e6, rel=0.01)
    for key, tensors in (("parameters", 1), ("gradients", 1), ("optimizer", 2)):
        assert told(text, key) == pytest.approx(4 * count * tensors / 64 / 2**20, abs=0.1)
    assert "simulated: 64 ranks by a fake process group" in text
    assert main(["plan", str(config), "simclr.update.recompute=true", *overrides]) == 0
    assert told(capsys.readouterr().out, "activations") < 0.5 * told(text, "activations")
    assert not torch.distributed.is_initialized()


def build_simclr_on_meta(arch: str) -> torch.nn.Module:
    with torch.device("meta"):
        return build_simclr(arch, "none", image_size=224)


def test_work_is_three_forward_passes_of_two_views(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ViT-S/16 at 224 px: 4.6 GMAC forward."""
    config = vit_experiment(tmp_path, "timm:vit_small_patch16_224", 2)
    assert main(["plan", str(config)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "work per update" in line)
    assert float(line.split()[3]) * 1e12 == pytest.approx(2 * 2 * 3 * 2 * 4.6e9, rel=0.1)


@pytest.mark.parametrize(("strategy", "shared"), [("ddp", 0), ("zero1", 2), ("zero2", 3), ("zero3", 4), ("fsdp2", 4)])
def test_what_each_strategy_shares(strategy: str, shared: int) -> None:
    objective = SimCLRObjective(build_simclr("small_cifar", "none", image_size=32), 0.5)
    batch = Batch(tuple(torch.rand(2, 2, 3, 32, 32)), torch.zeros(2).long(), torch.arange(2))
    memory = measure(objective, batch, "adam", 4, strategy)
    size = 4 * sum(p.numel() for p in objective.parameters())
    state = memory.parameters + memory.gradients + memory.optimizer
    assert state == pytest.approx(size * (4 - shared + shared / 4), abs=8)


@pytest.mark.parametrize(
    ("options", "line"),
    [(["--world-size", "3"], "'batch_size' is 4, not divisible by 3"), (["--world-size", "0"], "not divisible by 0")],
)
def test_refuses(options: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(vit_experiment(tmp_path, "small_cifar", 4)), *options]) == 2
    assert line in capsys.readouterr().err
