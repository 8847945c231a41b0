"""The plan against what torch's allocator really hands out, and against closed forms."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dist_defend.batch import Batch
from dist_defend.cli import main
from dist_defend.config import load_experiment
from dist_defend.engine import dist
from dist_defend.engine.context import Context
from dist_defend.engine.recompute import recompute_activations
from dist_defend.engine.step import Position
from dist_defend.methods import find_method
from dist_defend.methods.pretrain.simclr import SimCLRObjective
from dist_defend.models.artifact import ModelCard
from dist_defend.models.blocks import repeated_blocks
from dist_defend.models.encoder import build_simclr
from dist_defend.plan import METHODS, Memory, measure, stage_plans
from tests.runs import make_classifier, make_data, make_experiment, make_model, options_of


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


def peak_of(run: Callable[[], Any]) -> int:
    """Bytes at the peak, above what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def real_peak(arch: str, size: int, count: int, recomputes: bool) -> tuple[float, float]:
    """MiB at the peak of a forward and backward pass on this CPU, above what was there, and the plan's MiB for it."""
    torch.manual_seed(0)
    objective = SimCLRObjective(build_simclr(arch, "none", image_size=size), 0.5)
    if recomputes:
        recompute_activations(repeated_blocks(objective))
    views = tuple(torch.rand(2, count, 3, size, size))
    batch = Batch(views, torch.zeros(count).long(), torch.arange(count))
    peak = peak_of(lambda: objective(batch)["loss"].backward())
    for parameter in objective.parameters():
        parameter.grad = None
    memory = measure(objective, batch, "adam", 1, "ddp")
    return peak / 2**20, (memory.activations + memory.gradients) / 2**20


@pytest.mark.parametrize(
    ("arch", "size", "count", "recomputes"),
    [
        ("small_cifar", 32, 64, False),
        ("resnet18_cifar", 32, 8, False),
        ("timm:vit_tiny_patch16_224", 64, 8, False),
        ("timm:vit_tiny_patch16_224", 96, 8, True),
    ],
)
def test_the_plan_is_within_15_percent_of_the_measured_peak(arch: str, size: int, count: int, recomputes: bool) -> None:
    measured, planned = real_peak(arch, size, count, recomputes)
    assert measured > 5
    assert planned == pytest.approx(measured, rel=0.15)


def real_run(config: Path) -> dict[str, int]:
    """Bytes at the peak of each stage's first epoch, above the networks that are there before."""
    experiment, ranks = load_experiment(config), dist.start("fp32", None)
    context = Context(ranks, experiment.seed, experiment.loader, config.parent, experiment.method)
    peaks = {}
    for stage in find_method(experiment.method).build(experiment.options, context).stages:
        getattr(stage.step, "critics", None)  # made when first asked for: here, not in the measured part

        def epoch(stage: Any = stage) -> None:
            for number, batch in enumerate(stage.loader.epoch(0)):
                stage.step(batch, Position(batch=number))

        peaks[stage.name] = peak_of(epoch)
        if stage.evaluate is not None:
            stage.evaluate(1)
        if stage.finish is not None:
            stage.finish()
    return peaks


def larger_options(method: str, folder: Path) -> dict[str, Any]:
    """As options_of, with updates that need megabytes."""
    data = {"path": make_data(folder / "images", 64, size=32)}
    update = {"batch_size": 32, "epochs": 1, "optimizer": {"name": "adam"}}
    if method == "kd":
        return {"teacher": make_classifier(folder / "model", size=32), "data": data, "test": data, "update": update}
    changes: dict[str, Any] = {"data": data, "update": update}
    options = options_of(method, folder)
    if method == "probe":
        train = {"path": make_data(folder / "many", 1024)}
        tasks = {"noise": options["tasks"]["noise"] | {"train": train}}
        changes = {"tasks": tasks, "hidden": [512, 256], "update": update | {"batch_size": 512}}
    elif method in ("badencoder", "drupe"):
        reference = {"dataset": data["path"], "target_class": 1, "count": 2 if method == "drupe" else 1}
        model = make_model(folder / "model", size=32)
        changes = {"clean_encoder": model, "shadow": data, "reference": reference, "update": update}
    elif method in ("ft_simclr", "nad_simclr"):
        changes |= {
            key: make_model(folder / f"larger_{key}", size=32) for key in ("model", "teacher") if key in options
        }
    elif method == "mimic":
        changes["information"] = {"epochs": 1, "last_epochs": 1, "batch_size": 32, "hidden": 64}
    elif method == "classifier":
        changes |= {"test": data, "arch": "resnet18"}
    return options | changes


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_of_a_method_is_within_15_percent_of_its_run(method: str, tmp_path: Path) -> None:
    config = make_experiment(tmp_path, method, larger_options(method, tmp_path))
    plans = {plan.name: plan.memory for plan in stage_plans(load_experiment(config), 1, "ddp")[0]}
    peaks = real_run(config)
    assert plans.keys() == peaks.keys()
    for name, memory in plans.items():
        assert peaks[name] > 5 * 2**20
        assert memory.total - memory.parameters - memory.frozen == pytest.approx(peaks[name], rel=0.15), name


def test_a_forgotten_share_is_seen(tmp_path: Path) -> None:
    """What the comparison would say of plans without one of the larger uses."""
    config = make_experiment(tmp_path, "badencoder", larger_options("badencoder", tmp_path))
    (plan,), _ = stage_plans(load_experiment(config), 1, "ddp")
    peak = real_run(config)["badencoder"]
    for key in ("optimizer", "activations"):
        wrong: Memory = dataclasses.replace(plan.memory, **{key: 0})
        assert wrong.total - wrong.parameters - wrong.frozen != pytest.approx(peak, rel=0.15)


def make_card(folder: Path, arch: str) -> str:
    """A model folder without weights, as the plan needs it."""
    folder.mkdir()
    card = ModelCard("simclr", arch, "imagenet", 224, feature_dim=1024)
    text = {"format": 2, **dataclasses.asdict(card), "sha256": "0" * 64}
    (folder / "model.json").write_text(json.dumps(text))
    return str(folder)


LARGE = "timm:vit_large_patch16_224"
IMAGES = 1_281_167  # what a data set that is not here counts as


def large_experiment(folder: Path, method: str) -> Path:
    update = {"batch_size": 512, "optimizer": {"name": "adamw"}}
    augment = {"crop": "random_resized", "size": 224}
    if method == "simclr":
        return vit_experiment(folder, LARGE, 512)
    if method == "classifier":
        data = {"path": "nowhere"}
        return make_experiment(folder, method, {"arch": LARGE, "data": data, "test": data, "update": update})
    teacher = make_card(folder / "model", LARGE)
    if method == "mimic":
        options: dict[str, Any] = {"teacher": teacher, "data": {"path": "nowhere", "fraction": 0.04}}
        options |= {"augment": augment, "update": update}
        return make_experiment(folder, method, options)
    reference = {"dataset": make_data(folder / "images", 3, size=224), "target_class": 1}
    options = {"clean_encoder": teacher, "shadow": {"path": "nowhere"}, "reference": reference, "update": update}
    return make_experiment(folder, method, options)


@pytest.mark.parametrize("method", ["simclr", "badencoder", "mimic", "classifier"])
def test_vit_large_on_64_ranks(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = large_experiment(tmp_path, method)
    overrides = ["--world-size", "64", "--strategy", "zero3"]
    assert main(["plan", str(config), *overrides]) == 0
    printed = capsys.readouterr().out
    text = printed[printed.index(f"stage {method}") :]
    networks = build_simclr_on_meta(LARGE)
    count = sum(p.numel() for p in networks.parameters())
    assert count == pytest.approx(304e6, rel=0.01)
    for key, tensors in (("parameters", 1), ("gradients", 1), ("optimizer", 2)):
        assert told(text, key) == pytest.approx(4 * count * tensors / 64 / 2**20, rel=0.01)
    is_alone = method in ("simclr", "classifier")
    assert told(text, "frozen") == pytest.approx(0 if is_alone else 4 * count / 2**20, rel=0.01)
    share = -(-IMAGES // 64)
    caches = {"badencoder": share * 1024 * 4 / 2**20}.get(method, 0)
    assert told(text, "caches") == pytest.approx(caches, abs=0.1)
    if method == "mimic":  # each critic gets 8 x 8 x 1024 numbers of a stage, and the feature
        images = int(IMAGES * 0.04)
        assert told(printed, "caches") == pytest.approx(images * (65536 + 1024) * 4 / 2**20, rel=1e-3)
        assert told(printed, "frozen") == pytest.approx(2 * 4 * count / 2**20, rel=0.01)
    assert "simulated: 64 ranks by a fake process group" in printed
    assert "nowhere is not here: counted as 1281167 images" in printed
    assert not torch.distributed.is_initialized()


def test_recomputed_blocks_need_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = vit_experiment(tmp_path, "timm:vit_tiny_patch16_224", 16)
    activations = []
    for value in ("false", "true"):
        assert main(["plan", str(config), f"simclr.update.recompute={value}"]) == 0
        activations.append(told(capsys.readouterr().out, "activations"))
    assert activations[1] < 0.25 * activations[0]


@pytest.mark.parametrize("method", ["badencoder", "mimic", "probe"])
def test_what_lies_on_disk_is_not_in_memory(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_experiment(tmp_path, method, larger_options(method, tmp_path))
    key = "mimic.information.cache" if method == "mimic" else f"{method}.cache"
    assert main(["plan", str(config)]) == 0
    in_memory = capsys.readouterr().out
    assert main(["plan", str(config), f"{key}=disk"]) == 0
    on_disk = capsys.readouterr().out
    assert "on disk" not in in_memory and told(in_memory, "caches") > 0
    place = next(float(line.split()[2]) for line in on_disk.splitlines() if line.startswith("  on disk"))
    assert place + told(on_disk, "caches") == pytest.approx(told(in_memory, "caches"), abs=0.11)
    assert place > 0.9 * told(in_memory, "caches")


@pytest.mark.parametrize(("precision", "factor"), [("bf16", 1), ("fp64", 2)])
def test_precision(precision: str, factor: int, tmp_path: Path) -> None:
    options = larger_options("badencoder", tmp_path)
    base, other = (
        stage_plans(load_experiment(make_experiment(tmp_path, "badencoder", options, precision=p)), 1, "ddp")[0][0]
        for p in ("fp32", precision)
    )
    assert other.memory.parameters == factor * base.memory.parameters
    ratio = other.memory.activations / base.memory.activations
    assert ratio == pytest.approx({"bf16": 0.5, "fp64": 2}[precision], rel=0.15)


def build_simclr_on_meta(arch: str) -> torch.nn.Module:
    with torch.device("meta"):
        return build_simclr(arch, "none", image_size=224)


def test_work_is_three_forward_passes_of_two_views(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ViT-S/16 at 224 px: 4.6 GMAC forward."""
    config = vit_experiment(tmp_path, "timm:vit_small_patch16_224", 2)
    assert main(["plan", str(config)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "work per update" in line)
    assert float(line.split()[3]) * 1e12 == pytest.approx(2 * 2 * 3 * 2 * 4.6e9, rel=0.1)


def test_grad_cache_needs_a_micro_batch_and_a_pass_more(tmp_path: Path) -> None:
    """Of a rank's 32 images eight at a time: their activations, four forward passes for three."""
    config = vit_experiment(tmp_path, "timm:vit_tiny_patch16_224", 32)
    plans = {}
    for options in ("false 1", "false 4", "true 4"):
        cached, parts = options.split()
        changes = [f"simclr.grad_cache={cached}", f"simclr.update.accumulation={parts}"]
        plans[options] = stage_plans(load_experiment(config, changes), 1, "ddp")[0][0].memory
    assert plans["true 4"].activations < 0.4 * plans["false 1"].activations
    assert plans["true 4"].activations == pytest.approx(plans["false 4"].activations, rel=0.05)
    assert plans["false 4"].flops == pytest.approx(plans["false 1"].flops, rel=0.01)
    assert plans["true 4"].flops == pytest.approx(4 / 3 * plans["false 1"].flops, rel=0.02)


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
    [
        (["--world-size", "3"], "'batch_size' is 4, not divisible by 3"),
        (["--world-size", "0"], "not divisible by 0"),
        (["simclr.update.accumulation=3"], "not divisible by 1 ranks x 3 micro-batches"),
        (["simclr.update.recompute=true", "simclr.arch=nothing"], "unknown arch 'nothing'"),
        (["simclr.update.optimizer.name=lars", "--world-size", "2", "--strategy", "zero2"], "needs the norm of each"),
        (["precision=fp64", "--world-size", "2", "--strategy", "zero3"], "master weights are float32"),
        (["precision=fp16", "--world-size", "2", "--strategy", "fsdp2"], "use bf16"),
    ],
)
def test_refuses(options: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(vit_experiment(tmp_path, "small_cifar", 4)), *options]) == 2
    assert line in capsys.readouterr().err


def test_a_method_without_a_plan_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"model": "m", "data": {"path": "d"}, "test": {"path": "t"}}
    assert main(["plan", str(make_experiment(tmp_path, "ibau", options))]) == 2
    told_ = capsys.readouterr().err
    assert "method ibau has no plan; these have: simclr, badencoder, drupe, mimic" in told_
    assert told_.count("\n") == 1


@pytest.mark.parametrize(("method", "classes"), [("classifier", 1000), ("kd", 3)])
def test_poison_needs_no_images(method: str, classes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither the attack of the file nor that of the teacher's card is carried out."""
    attack = {"trigger": {"name": "sig"}, "target_class": 0, "rate": 0.5}
    options: dict[str, Any] = {"data": {"path": "nowhere"}, "test": {"path": "elsewhere"}}
    if method == "kd":
        options |= {"teacher": make_classifier(tmp_path / "model", size=32, attack=attack), "attack": attack}
    else:
        options |= {"arch": "small_resnet", "attack": attack}
    assert main(["plan", str(make_experiment(tmp_path, method, options))]) == 0
    size = 32 if method == "kd" else 224
    lines = capsys.readouterr().out.splitlines()
    for path in ("nowhere", "elsewhere"):
        assert f"{path} is not here: counted as 1281167 images of {classes} classes, {size} px" in lines
