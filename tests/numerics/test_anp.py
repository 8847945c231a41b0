"""ANP's masks under perturbation against what the published code gave, three updates or two, step by step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_defend.batch import Batch
from dist_defend.cli import main
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine import dist
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.step import GradientStep, Position
from dist_defend.methods.defend.anp import AnpObjective, AnpStep, Config
from dist_defend.methods.defend.pruning.masks import (
    neuron_count,
    neuron_table,
    prune,
    pruning_order,
    read_mask_values,
)
from dist_defend.models.artifact import load_classifier
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.models.masked_norm import norm_names
from tests.numerics.det import assert_fingerprint, det_images, det_init, golden
from tests.runs import make_classifier, make_data, make_experiment, metrics

CASES = {"resnet18": "anp_resnet18", "preact_resnet18": "anp_preactresnet18"}


def make_model(arch: str, seed: int) -> Classifier:
    model = build_classifier(arch, 10, "none").double()
    det_init(model.net, seed)
    return model


def make_objective(arch: str, **changes: Any) -> tuple[AnpObjective, dict[str, Any]]:
    case = golden("baselines")[CASES[arch]]
    names = ("eps", "steps", "alpha", "lr")
    options = {name: case[name] for name in names} | changes
    config = Config(model="m", data=DatasetConfig("d"), test=DatasetConfig("t"), **options)
    model = make_model(arch, case["seed"])
    objective = AnpObjective(model, norm_names(model.net), config)
    objective.generator.manual_seed(case["noise"])
    return objective, case


def record(objective: AnpObjective, monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    """Where each n and b that the network is perturbed by will be noted, in turn."""
    noted: list[list[torch.Tensor]] = []
    perturb = objective.perturb

    def note(found: Any) -> None:
        if found is not None:
            noted.append(found)
        perturb(found)

    monkeypatch.setattr(objective, "perturb", note)
    return noted


def check(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, case = make_objective(arch)
    model = objective._model[0]
    sgd = UpdateConfig(epochs=1, optimizer=OptimizerConfig("sgd", lr=case["lr"], momentum=0.9))
    update = GradientStep(objective, sgd, dist.start("fp64", None), steps_per_epoch=case["num"])
    step = AnpStep(update, objective, 0)
    monkeypatch.setattr(step, "seed_draws", lambda at: None)  # one generator for all updates, as the recording had it
    noises = record(objective, monkeypatch)
    for number, expected in enumerate(case["iterations"]):
        images = det_images((case["batch"], 3, 32, 32), case["images"] + number)
        noises.clear()
        scalars = step(
            Batch((images,), torch.tensor(case["labels"][number]), torch.arange(case["batch"])), Position(step=number)
        )
        assert scalars["loss"].item() == pytest.approx(expected["loss"], rel=1e-9)
        assert scalars["cross_entropy"].item() == pytest.approx(expected["natural_ce"], rel=1e-9)
        assert scalars["robust"].item() == pytest.approx(expected["robust_ce"], rel=1e-9)
        scale, shift = noises[-1][0::2], noises[-1][1::2]
        for k, name in enumerate(objective.by_layer):
            assert_fingerprint(scale[k], expected["noise"][name], what=f"noise of {name}")
            assert_fingerprint(shift[k], expected["noise_bias"][name], what=f"noise_bias of {name}")
            assert_fingerprint(objective.by_layer[name], expected["masks"][name], what=f"mask of {name}")
        assert max(n.abs().max().item() for n in scale) == pytest.approx(expected["largest_noise"], rel=1e-9)
    buffers = dict(model.net.named_buffers())
    for name, value in case["buffers_after"].items():
        assert_fingerprint(buffers[name], value, what=name)
    order = pruning_order(neuron_table(objective.by_layer))
    assert [[t, neuron_count(order, t)] for t, _ in case["pruned_at"]] == case["pruned_at"]
    assert [list(neuron) for neuron in order[: len(case["lowest"])]] == case["lowest"]
    plain = make_model(arch, case["seed"]).eval()
    prune(plain.net, order[:20])
    with torch.no_grad():
        logits = plain.net(det_images((case["batch"], 3, 32, 32), case["images"]))
    assert_fingerprint(logits, case["logits_20_pruned"])


@pytest.mark.parametrize("arch", CASES)
def test_updates_are_the_published_ones(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(arch, monkeypatch)


@pytest.mark.parametrize(("project", "bound"), [(False, 0.8), (True, 0.4)])
def test_perturbations_reach_twice_their_bound_unless_projected(
    project: bool, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, _ = make_objective("resnet18", project=project)
    found = record(objective, monkeypatch)
    images = det_images((2, 3, 16, 16), 5)
    objective(Batch((images,), torch.tensor([1, 2]), torch.arange(2)))
    largest = max(noise.abs().max().item() for noise in found[-1])
    assert 0.97 * bound < largest <= bound


def test_without_perturbation_the_clean_loss_is_left() -> None:
    objective, _ = make_objective("resnet18", eps=0.0)
    batch = Batch((det_images((2, 3, 16, 16), 5),), torch.tensor([1, 2]), torch.arange(2))
    expected = torch.nn.functional.cross_entropy(make_model("resnet18", 91).train()(batch.images), batch.labels)
    assert objective(batch)["loss"].item() == pytest.approx(0.2 * expected.item(), rel=1e-12)


def make_options(folder: Path) -> dict[str, Any]:
    return {
        "model": make_classifier(folder / "model", attack={"trigger": {"name": "badnets"}, "target_class": 1}),
        "data": {"path": make_data(folder / "data"), "max_samples": 12},
        "test": {"path": make_data(folder / "test", 9, seed=1)},
        "batch_size": 8,
        "iterations": 3,
        "max_accuracy_drop": 1.0,
    }


def test_a_run(tmp_path: Path) -> None:
    assert main(["run", str(make_experiment(tmp_path, "anp", make_options(tmp_path)))]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert [row["kind"] for row in result["rows"]] == ["anp", "anp (oracle)"]
    assert [row["stage"] for row in metrics(tmp_path / "run") if "robust" in row] == ["anp"] * 4  # two whole passes
    card = load_classifier(str(tmp_path / "run/model"))[1]
    assert (card.defended_by, card.chosen_by) == ("anp", "defence_data")
    neurons = read_mask_values(tmp_path / "run/mask_values.txt")
    assert any(neuron.score < 1 for neuron in neurons) and all(0 <= neuron.score <= 1 for neuron in neurons)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.5}, "key 'anp.alpha' is 1.5; it must be in [0, 1]"),
        ({"eps": -0.1}, "key 'anp.eps' is -0.1; it must not be negative"),
        ({"steps": 0}, "key 'anp.steps' is 0; it must be positive"),
        ({"batch_size": 11}, "key 'anp.batch_size' is 11"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(make_experiment(tmp_path, "anp", make_options(tmp_path) | changes))]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
