"""Training the Input-aware attack: both losses written out, what each step changes, and a tiny run."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_defend.attacks.attack import attack_from
from dist_defend.attacks.input_aware import Generators, load_generators
from dist_defend.attacks.poison import triggered
from dist_defend.batch import Batch
from dist_defend.cli import main
from dist_defend.data.loader import DatasetConfig
from dist_defend.data.store import open_dataset
from dist_defend.engine.dist import start
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.engine.step import Position
from dist_defend.methods.attack.input_aware import Config, JointStep, MaskObjective, joint_loss
from dist_defend.models.artifact import load_classifier
from dist_defend.models.classifier import Classifier, build_classifier
from tests.runs import make_data, make_experiment, metrics

NOWHERE = DatasetConfig("nowhere")
CONFIG = Config(NOWHERE, NOWHERE, batch_size=8, rate=0.25, target_class=1, lambda_div=2.0, density=0.4)


def parts() -> tuple[Classifier, Generators, Batch]:
    torch.manual_seed(0)
    model = build_classifier("small_resnet", 3, "cifar10", 16).double()
    generators = Generators(16, "cifar10").double()
    images = torch.rand(8, 3, 16, 16, dtype=torch.float64)
    return model, generators, Batch((images,), torch.arange(8) % 3, torch.arange(8))


def rms(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([((x - y) ** 2).mean().sqrt() for x, y in zip(a, b, strict=True)])


def test_the_masks_loss() -> None:
    _, generators, batch = parts()
    generators.eval()  # so that two passes of batch norm agree
    terms = MaskObjective(generators, CONFIG)(batch)
    mask, images = generators.mask(batch.images), generators.normalize(batch.images)
    norm = torch.clamp(mask - 0.4, min=0).mean()
    ratio = (rms(images, images.flip(0)) / (rms(mask, mask.flip(0)) + 1e-7)).mean()
    torch.testing.assert_close(terms["loss"], 100 * norm + 4 * ratio)
    assert norm > 0 and {"mask_norm", "mask_diversity", "mask_density"} < set(terms)


def test_the_joint_loss_and_its_three_kinds_of_images() -> None:
    model, generators, batch = parts()
    model.eval(), generators.eval()
    x, others = batch.images, batch.images.flip(0)
    mask, pattern = generators.mask(x), generators.pattern(x)
    inputs, labels = x.clone(), batch.labels.clone()
    for i in (0, 1):
        inputs[i] = x[i] * (1 - mask[i]) + pattern[i] * mask[i]
        labels[i] = 1
    for i in (2, 3):
        inputs[i] = x[i] * (1 - mask[7 - i]) + pattern[7 - i] * mask[7 - i]
    normalised = generators.normalize(pattern)
    apart = rms(normalised[:2], normalised.flip(0)[2:4])
    ratio = (rms(generators.normalize(x)[:2], generators.normalize(others)[2:4]) / (apart + 1e-7)).mean()
    expected = functional.cross_entropy(model(inputs), labels) + 2 * ratio
    torch.testing.assert_close(joint_loss(model, generators, batch, CONFIG)["loss"], expected)


def test_a_joint_step_moves_classifier_and_pattern_network_but_not_the_mask() -> None:
    model, generators, batch = parts()
    before = {key: value.clone() for key, value in generators.state_dict().items()}
    weight = next(model.parameters()).clone()
    step = JointStep(model, generators, CONFIG, start("fp64", None), 1)
    scalars = step(batch, Position())
    assert scalars["nonfinite"] == 0 and 0 <= scalars["train_asr"] <= 1
    after = generators.state_dict()
    assert all(after[key].equal(before[key]) for key in before if key.startswith("net_m."))
    assert not after["net_g.convblock_up_5.conv2d.weight"].equal(before["net_g.convblock_up_5.conv2d.weight"])
    assert not after["net_g.convblock_middle.batch_norm.running_mean"].equal(
        before["net_g.convblock_middle.batch_norm.running_mean"]
    )
    assert not next(model.parameters()).equal(weight)


def test_the_joint_stages_rates_follow_their_schedules() -> None:
    model, generators, batch = parts()
    config = replace(
        CONFIG,
        epochs=4,
        optimizer=OptimizerConfig("sgd", 0.01, schedule="multistep", milestones=(1,)),
        generator_optimizer=OptimizerConfig("adam", 0.02, schedule="cosine"),
    )
    step = JointStep(model, generators, config, start("fp64", None), steps_per_epoch=1)
    rates = []
    for number in range(3):
        step(batch, Position(epoch=number))
        rates.append([update.rate for update in step.updates])
    cosine = [(1 + math.cos(math.pi * number / 4)) / 2 for number in range(3)]
    assert [pair[0] for pair in rates] == pytest.approx([0.01, 0.001, 0.001])
    assert [pair[1] for pair in rates] == pytest.approx([0.02 * factor for factor in cosine])


def options(folder: Path) -> dict[str, Any]:
    return {
        "data": {"path": make_data(folder / "data"), "max_samples": 8},
        "test": {"path": make_data(folder / "test", 9, seed=1)},
        "arch": "small_resnet",
        "normalization": "none",
        "rate": 0.25,
        "target_class": 1,
        "batch_size": 4,
        "mask_epochs": 1,
        "epochs": 2,
    }


def test_a_run_leaves_a_poisoned_classifier_that_its_card_can_open(tmp_path: Path) -> None:
    path = make_experiment(tmp_path, "input_aware", options(tmp_path))
    assert main(["run", str(path)]) == 0
    run = tmp_path / "run"
    (row,) = json.loads((run / "result.json").read_text())["rows"]
    assert row["kind"] == "backdoored" and row["acc"]["n"] == 9 and row["asr"]["n"] == 6
    assert {line["stage"] for line in metrics(run)} == {"mask", "joint"}
    model, card = load_classifier(run / "model")
    poison = attack_from(card.attack or {})
    assert card.backdoored and (poison.target_class, poison.rate) == (1, 0.25)
    assert load_generators(run / "generators.safetensors", 16, "none").image_size == 16
    test = open_dataset(tmp_path / "test")
    stamped = triggered(test, poison).images(np.arange(9))
    with torch.no_grad():
        pixels = torch.from_numpy(stamped).permute(0, 3, 1, 2) / 255
        classes = model.eval()(pixels).argmax(1).numpy()
    assert int((classes == 1)[test.labels != 1].sum()) == row["asr"]["correct"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rate": 0.6}, "key 'input_aware.rate' is 0.6"),
        ({"rate": 0.1}, "key 'input_aware.rate' is 0.1; it must be an image of a batch or more"),
        ({"epochs": 0}, "key 'input_aware.epochs' is 0; it must be at least 1"),
        ({"target_class": 3}, "key 'input_aware.target_class' is 3"),
    ],
)
def test_what_cannot_be_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], told: str
) -> None:
    path = make_experiment(tmp_path, "input_aware", options(tmp_path) | change)
    assert main(["run", str(path)]) == 2
    line = capsys.readouterr().err
    assert told in line and line.count("\n") == 1
