"""Rounds of I-BAU: their batches, what carries the perturbation, resuming anywhere, runs from files."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_defend.batch import Batch
from dist_defend.cli import main
from dist_defend.config import load_experiment
from dist_defend.data.loader import DatasetConfig
from dist_defend.data.store import open_dataset
from dist_defend.engine import checkpoint, dist
from dist_defend.engine.context import Context
from dist_defend.engine.objective import NonFiniteError
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.errors import UserError
from dist_defend.methods.defend import ibau
from dist_defend.methods.defend.ibau.options import Config
from dist_defend.methods.defend.ibau.step import UnlearningStep
from dist_defend.models.artifact import load_artifact
from dist_defend.models.classifier import build_classifier
from tests.runs import CLASSES, SIZE, make_classifier, make_data, make_experiment
from tests.steps import positions

ATTACK = {"trigger": {"name": "badnets"}, "target_class": 1}


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    """The method's section: 11 images in batches of 5, so three batches, the last one of a single image."""
    return {
        "model": make_classifier(folder / "model", attack={**ATTACK, "trigger": {"name": "badnets"}}),
        "data": {"path": make_data(folder / "data", 11)},
        "test": {"path": make_data(folder / "test", 13, seed=1)},
        "rounds": 2,
        "batch_size": 5,
        "patched_fraction": 0.4,
        **changes,
    }


def make_step(folder: Path, **changes: Any) -> UnlearningStep:
    """Of a built plan, in float64."""
    config = load_experiment(make_experiment(folder, "ibau", options(folder, **changes)))
    context = Context(dist.start("fp64", None), 3, config.loader, folder / "run", config.method)
    (stage,) = ibau.build(config.options, context).stages
    assert isinstance(stage.step, UnlearningStep)
    return stage.step


def in_float64(batch: Batch) -> Batch:
    return batch._replace(views=(batch.images.double(),))


def run(step: UnlearningStep, calls: int, first: int = 0) -> list[dict[str, Tensor]]:
    """So many calls from the first-th on."""
    at, scalars = positions(step.rounds.num_batches, first), list[dict[str, Tensor]]()
    while len(scalars) < calls:
        round_, position = divmod(first + len(scalars), step.rounds.num_batches)
        for batch in step.rounds.epoch(round_, position):
            if len(scalars) < calls:
                scalars.append(step(in_float64(batch), next(at)))
    return scalars


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("official", {"rounds": 5, "project_radius": None, "clamp": False, "batch_size": 100, "augment": None}),
        ("notebook_cifar10", {"rounds": 1, "project_radius": 10.0, "clamp": False}),
        ("notebook_gtsrb", {"rounds": 1, "project_radius": 10.0, "clamp": True}),
        ("backdoorbench", {"rounds": 5, "batch_size": 256, "space": "normalized", "project_radius": None}),
        ("hundred_images", {"rounds": 30, "batch_size": 10, "patched_fraction": 0.2}),
    ],
)
def test_presets(preset: str, expected: dict[str, Any], tmp_path: Path) -> None:
    data = {"path": "nowhere"}
    section = {"preset": preset, "model": "m", "data": data, "test": data}
    config = load_experiment(make_experiment(tmp_path, "ibau", section)).options
    assert {key: getattr(config, key) for key in expected} == expected
    assert (config.K, config.step_size, config.penalty, config.min_patched) == (5, 0.1, 1e-3, 0)
    assert config.num_patched(config.batch_size) == (2 if preset in ("backdoorbench", "hundred_images") else 1)
    is_gtsrb, is_bench = preset == "notebook_gtsrb", preset == "backdoorbench"
    assert (config.inner.name, config.inner.lr) == (("adam", 1.0) if is_gtsrb else ("sgd", 10.0))
    assert is_gtsrb or config.inner.momentum == 0.0
    assert config.optimizer.name == "adam"
    assert config.optimizer.amsgrad is is_bench
    own = load_experiment(make_experiment(tmp_path, "ibau", {**section, "rounds": 7, "optimizer": {"lr": 0.5}})).options
    assert (own.rounds, own.optimizer.lr, own.optimizer.amsgrad) == (7, 0.5, is_bench)


def test_an_unknown_preset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'ibau.preset' is 'paper'; known: official, notebook_cifar10"):
        load_experiment(make_experiment(tmp_path, "ibau", {"preset": "paper"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clamp": True, "space": "normalized"}, "'ibau.clamp'"),
        ({"K": 0}, "'ibau.K' is 0"),
        ({"project_radius": 0.0}, "'ibau.project_radius'"),
        ({"patched_fraction": 1.5}, "'ibau.patched_fraction'"),
        ({"optimizer": {"schedule": "cosine"}}, "'ibau.optimizer.schedule'"),
        ({"solver": "newton"}, "'ibau.solver'"),
    ],
)
def test_values_that_mean_nothing_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    section = {"model": "m", "data": {"path": "d"}, "test": {"path": "t"}, **changes}
    with pytest.raises(UserError, match=message):
        load_experiment(make_experiment(tmp_path, "ibau", section))


@pytest.mark.parametrize(
    ("size", "least", "expected"),
    [(100, 0, 1), (99, 0, 0), (99, 1, 1), (256, 0, 2), (196, 0, 1), (168, 1, 1), (1, 3, 1)],
)
def test_how_many_images_carry_the_perturbation(size: int, least: int, expected: int) -> None:
    nowhere = DatasetConfig("nowhere")
    assert Config("m", nowhere, nowhere, min_patched=least).num_patched(size) == expected


def test_batches_that_unlearn_nothing_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dist_defend"):
        make_step(tmp_path / "none", patched_fraction=0.01)
        assert "no image of a batch of 1 or 5 carries the perturbation" in caplog.text
        caplog.clear()
        make_step(tmp_path / "one", patched_fraction=0.01, min_patched=1)
        # The fresh network gets the defender's images wrong, which is told too.
        assert not [record for record in caplog.records if "clean images of" not in record.getMessage()]


def test_patched_images_are_drawn_by_seed_round_and_batch(tmp_path: Path) -> None:
    step = make_step(tmp_path)
    masks = {(r, n): step._patched(r, n).flatten().tolist() for r in range(20) for n in range(3)}
    assert {sum(mask) for (_, number), mask in masks.items() if number < 2} == {2.0}
    assert {sum(masks[r, 2]) for r in range(20)} == {0.0}  # int(0.4)
    assert len({tuple(mask) for mask in masks.values()}) > 5
    assert step._patched(4, 1).flatten().tolist() == masks[4, 1]
    step.seed += 1
    assert any(step._patched(*place).flatten().tolist() != mask for place, mask in masks.items())


def test_a_round_is_an_inner_and_an_outer_pass(tmp_path: Path) -> None:
    plain, moving = make_step(tmp_path / "plain"), make_step(tmp_path / "moving", augment={"crop": "pad", "flip": 0.5})
    rows = [[batch.index.tolist() for batch in plain.rounds.epoch(r)] for r in range(2)]
    assert rows[0] == rows[1] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10]] * 2
    rounds = [list(moving.rounds.epoch(r)) for r in range(2)]
    outer, inner = ([torch.cat([b.images for b in r[part]]) for r in rounds] for part in (slice(3, 6), slice(3)))
    assert torch.equal(outer[0], outer[1])
    assert not torch.equal(inner[0], inner[1]) and not torch.equal(inner[0], outer[0])
    assert torch.equal(moving.first[0].float(), rounds[0][3].images)
    late = list(moving.rounds.epoch(1, 4))
    assert [b.index.tolist() for b in late] == [b.index.tolist() for b in rounds[1][4:]]
    kinds = ["inner_loss" in scalars for scalars in run(plain, 8)]
    assert kinds == [True] * 3 + [False] * 3 + [True] * 2


def test_padding_changes_nothing(tmp_path: Path) -> None:
    """The batch of one image, padded to five, against itself without padding."""
    padded, bare = make_step(tmp_path / "a"), make_step(tmp_path / "b")
    for step in (padded, bare):
        with torch.no_grad():
            step.delta.fill_(0.1)
    batch = in_float64(list(padded.rounds.epoch(0))[2])
    images, labels, weights = padded.rounds.padded(batch, 2)
    assert (len(images), weights.tolist()) == (5, [1.0, 0.0, 0.0, 0.0, 0.0])
    mask = torch.ones(5, 1, 1, 1, dtype=torch.float64)
    whole = {**padded.outer(images, labels, mask, weights), **padded.inner(images, weights)}
    alone = {**bare.outer(images[:1], labels[:1], mask[:1], weights[:1]), **bare.inner(images[:1], weights[:1])}
    for key, value in alone.items():
        assert whole[key].item() == pytest.approx(value.item(), rel=1e-12), key
    for mine, theirs in zip([padded.delta, *padded.parameters], [bare.delta, *bare.parameters], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def test_a_round_starts_from_zero_and_ends_its_inner_pass_in_the_ball(tmp_path: Path) -> None:
    step = make_step(tmp_path, project_radius=0.5, inner={"name": "adam", "lr": 0.3})
    first = run(step, 3)
    assert first[-1]["delta_norm"] > 0.5
    assert step.delta.norm().item() == pytest.approx(0.5, rel=1e-12)
    held = step.delta.detach().clone()
    run(step, 3)
    assert torch.equal(step.delta, held)  # the outer pass leaves it alone
    run(step, 1)
    # Adam's first step from fresh moments is lr times the sign of the slope.
    assert step.delta.abs().max().item() == pytest.approx(0.3, rel=1e-4)


def test_a_small_perturbation_is_not_blown_up(tmp_path: Path) -> None:
    step = make_step(tmp_path, project_radius=1e6)
    assert run(step, 3)[-1]["delta_norm"] == step.delta.norm() < 1e6


def test_clamping_keeps_images_in_range(tmp_path: Path) -> None:
    step = make_step(tmp_path, clamp=True)
    seen: list[Tensor] = []
    step.folded.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        step.delta.fill_(2.0)
    images, labels, weights = step.first
    step.inner(images, weights)
    step.outer(images, labels, torch.ones(5, 1, 1, 1, dtype=torch.float64), weights)
    assert len(seen) == 4 and all(x.min() >= 0 and x.max() <= 1 for x in seen)
    assert torch.equal(seen[1], torch.ones_like(images))


def test_normalized_space_scales_the_perturbation(tmp_path: Path) -> None:
    """delta after the normalisation is delta times the deviation before it."""
    step = make_step(tmp_path, space="normalized")
    model = build_classifier("small_resnet", CLASSES, "cifar10", image_size=SIZE).double().eval()
    other = UnlearningStep(model, step.config, step.rounds, seed=0)
    x, delta = step.first[0], torch.full((1, 3, SIZE, SIZE), 0.3, dtype=torch.float64)
    expected = model(x + delta * model.normalize.std)
    torch.testing.assert_close(other.network(other.enter(x) + delta), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("inner", [{"name": "adam", "lr": 0.3}, {"name": "sgd", "lr": 1.0, "momentum": 0.5}])
def test_resuming_anywhere_is_bit_exact(inner: dict[str, Any], tmp_path: Path) -> None:
    changes = {"inner": inner, "optimizer": {"name": "adam", "amsgrad": True}, "augment": {"crop": "pad", "flip": 0.5}}
    whole = make_step(tmp_path / "whole", **changes)
    expected = run(whole, 12)
    for stop in (2, 4, 7):  # in the inner pass, in the outer pass, in the next round
        first, second = (make_step(tmp_path / f"{name}{stop}", **changes) for name in ("first", "second"))
        run(first, stop)
        checkpoint.save(tmp_path / f"saved{stop}", stop, {"step": first.state_dict()}, keep=1)
        newest = checkpoint.newest(tmp_path / f"saved{stop}")
        assert newest is not None
        second.load_state_dict(checkpoint.load(newest, torch.device("cpu"))["step"])
        for mine, theirs in zip(run(second, 12 - stop, stop), expected[stop:], strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
        assert all(torch.equal(a, b) for a, b in zip(second.parameters, whole.parameters, strict=True))


def test_a_hypergradient_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    step = make_step(tmp_path)
    run(step, 4)
    before = [p.detach().clone() for p in step.parameters]
    with torch.no_grad():
        step.delta[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="hypergradient"):
        run(step, 1, 4)
    assert all(torch.equal(a, b) for a, b in zip(before, step.parameters, strict=True))


def test_batch_norm_statistics_stay(tmp_path: Path) -> None:
    step = make_step(tmp_path)
    before = {key: value.clone() for key, value in step.model.named_buffers()}
    run(step, 6)
    assert before and all(torch.equal(value, before[key]) for key, value in step.model.named_buffers())


def test_a_run_from_a_file(tmp_path: Path) -> None:
    section = options(tmp_path, evaluate_every=2, min_patched=1)
    path = make_experiment(tmp_path, "ibau", section, seed=7)
    assert main(["run", str(path)]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    (row,) = result["rows"]
    assert (row["kind"], row["task"], row["seed"], row["acc"]["n"], row["asr_all"]["n"]) == ("ibau", "noise", 7, 13, 13)
    assert result["metrics"].keys() == {"acc_before", "asr_before", "der", "defence_images"}
    model, card = load_artifact(tmp_path / "run" / "model")
    assert (card.kind, card.backdoored, card.provenance["method"]) == ("classifier", False, "ibau")
    assert result["model_sha256"] != card.parent_sha256
    original, _ = load_artifact(section["model"])
    names = {key for key, value in model.state_dict().items() if not torch.equal(value, original.state_dict()[key])}
    assert names == {key for key, _ in original.named_parameters()}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "asr" in line] == [2]
    assert [("inner_loss" in line, "v5_norm" in line) for line in lines if "acc" not in line] == [
        *[(True, False)] * 3,
        *[(False, True)] * 3,
    ] * 2


def test_without_an_attack_there_is_only_accuracy(tmp_path: Path) -> None:
    section = {**options(tmp_path), "model": make_classifier(tmp_path / "clean")}
    assert main(["run", str(make_experiment(tmp_path, "ibau", section))]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["rows"][0]["asr"]["n"] == 0
    assert result["metrics"].keys() == {"acc_before", "defence_images"}


def test_what_is_unlearned_on_is_not_tested_on(tmp_path: Path) -> None:
    path = make_data(tmp_path / "both", 20)
    section = options(tmp_path, data={"path": path, "max_samples": 8}, test={"path": path})
    assert main(["run", str(make_experiment(tmp_path, "ibau", section))]) == 0
    row = json.loads((tmp_path / "run" / "result.json").read_text())["rows"][0]
    kept = open_dataset(path).labels[8:]
    assert (row["acc"]["n"], row["asr"]["n"]) == (12, int(np.count_nonzero(kept != 1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": "exact", "batch_size": 4}, None),
        ({"attack": {**ATTACK, "target_class": 3}}, "ibau.attack.target_class"),
        ({"graph": "on"}, "key 'graph' is on"),
        ({"augment": {"size": 8}}, "ibau.augment.size"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_bad_input_costs_one_line(
    changes: dict[str, Any], message: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_experiment(tmp_path, "ibau", options(tmp_path, **changes))
    assert main(["run", str(path), "--dry-run"]) == (2 if message else 0)
    assert message is None or message in capsys.readouterr().err


def test_the_exact_solver_is_for_small_problems(tmp_path: Path) -> None:
    section = {
        **options(tmp_path),
        "model": make_classifier(tmp_path / "large", size=32),
        "data": {"path": make_data(tmp_path / "large data", size=32)},
        "test": {"path": make_data(tmp_path / "large test", size=32)},
    }
    config = load_experiment(make_experiment(tmp_path, "ibau", {**section, "solver": "exact"}))
    context = Context(dist.start("fp64", None), 0, config.loader, tmp_path / "run", config.method)
    with pytest.raises(UserError, match="delta has 3072: say neumann or cg"):
        ibau.build(config.options, context)


def test_optimizers_of_the_published_code() -> None:
    nowhere = DatasetConfig("nowhere")
    config = Config("m", nowhere, nowhere)
    assert (config.inner, config.optimizer) == (
        OptimizerConfig("sgd", 10.0, momentum=0.0),
        OptimizerConfig("adam", 1e-3),
    )
