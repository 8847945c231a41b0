"""MIMIC's information phase: weights from estimates, the cheaper way of computing them, and known information."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_defend.bench.published import mimic_mi as published
from dist_defend.cli import main
from dist_defend.data.loader import LoaderConfig
from dist_defend.data.store import open_dataset
from dist_defend.engine import dist
from dist_defend.engine.context import Context
from dist_defend.engine.step import Position
from dist_defend.errors import UserError
from dist_defend.methods.defend.mimic.information import InformationConfig, LayerInformation, layer_weights
from dist_defend.models.artifact import load_simclr
from dist_defend.ops.mutual_info import DonskerVaradhan
from tests.numerics.det import golden
from tests.runs import make_data, make_experiment, make_model, metrics, options_of

PUBLISHED_BASE, PUBLISHED = 1000.0, InformationConfig(scale=10000.0)


def weights(*estimates: float, config: InformationConfig = PUBLISHED) -> list[float]:
    return (PUBLISHED_BASE + layer_weights(torch.tensor(estimates, dtype=torch.float64), config)).tolist()


def test_weights_share_the_scale_in_proportion() -> None:
    assert weights(1, 1, 1, 1) == [3500.0] * 4
    assert weights(1, 0, 0, 0) == [11000.0, 1000.0, 1000.0, 1000.0]
    assert weights(0.2, 0.4, 0.6, 0.8) == pytest.approx([2000.0, 3000.0, 4000.0, 5000.0], rel=1e-12)
    assert weights(0.2, 0.4, 0.6, 0.8) == pytest.approx(published.attention_weights([0.2, 0.4, 0.6, 0.8]), rel=1e-12)


def test_when_all_estimates_are_clipped_to_zero(caplog: pytest.LogCaptureFixture) -> None:
    """The published code's own tiny phase ends there, with NaN for every weight."""
    case = golden("mimic_estimate_mi")
    estimates = list(case["mi"].values())
    assert estimates == [0.0] * 4
    assert all(math.isnan(w) for w in case["w"])
    assert np.isnan(published.attention_weights(estimates)).all()
    with caplog.at_level(logging.WARNING, "dist_defend"):
        assert weights(*estimates) == [3500.0] * 4
    assert "every information estimate is 0" in caplog.text
    with pytest.raises(UserError, match="every information estimate is 0; raise"):
        weights(*estimates, config=InformationConfig(all_zero="fail"))


def make_information(
    folder: Path, config: InformationConfig, network: Any, count: int, size: int
) -> tuple[LayerInformation, Tensor]:
    """The phase on ``count`` images, and those images in float64."""
    ranks = dist.start("fp64", None)
    dataset = open_dataset(make_data(folder, count, size=size))
    context = Context(ranks, 100, LoaderConfig("resident", 1), folder)
    rows = np.arange(count)
    images = torch.from_numpy(dataset.images(rows)).permute(0, 3, 1, 2) / torch.tensor(255, dtype=torch.float32)
    return LayerInformation(config, network, context, dataset, rows), images.double()


def train(information: LayerInformation) -> None:
    """What Trainer.fit does with the stage."""
    stage = information.stage(lambda: None)
    for epoch in range(stage.epochs):
        for number, batch in enumerate(stage.loader.epoch(epoch)):
            information(batch, Position(epoch=epoch, batch=number))
        assert stage.evaluate is not None
        stage.evaluate(epoch + 1)


def published_estimates(information: LayerInformation, images: Tensor, config: InformationConfig) -> list[float]:
    """The published loop: concatenated pairs, and a forward pass for every layer, epoch and batch, twice."""
    network, estimates = information.network.eval(), []
    for layer in range(4):
        ours = information.critics[layer]
        assert isinstance(ours, DonskerVaradhan)
        critic = published.TNet(ours.pair.in_features, config.hidden).double()
        tensors = [ours.pair.weight, ours.pair.bias, *ours.rest.parameters()]
        with torch.no_grad():
            for mine, theirs in zip(critic.parameters(), tensors, strict=True):
                mine.copy_(theirs)
        optimizer = torch.optim.Adam(critic.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        history = []
        for epoch in range(config.epochs):
            for number, batch in enumerate(images.split(config.batch_size)):
                permutation = information.permutation(layer, epoch, number, len(batch), 0)
                optimizer.zero_grad()
                (-bound(network, layer, critic, batch, permutation)).backward()
                optimizer.step()
            values = []
            for number, batch in enumerate(images.split(config.batch_size)):
                permutation = information.permutation(layer, epoch + 1, number, len(batch), 1)
                values.append(max(0.0, bound(network, layer, critic, batch, permutation).item()))
            history.append(np.mean(values))
        estimates.append(float(np.mean(history[-config.last_epochs :])))
    return estimates


def bound(network: Any, layer: int, critic: nn.Module, images: Tensor, permutation: Tensor) -> Tensor:
    with torch.no_grad():
        maps, feature, _ = network.layers(images)
    return published.donsker_varadhan(critic, maps[layer].flatten(1), feature, permutation)


def test_cached_activations_give_the_published_loops_estimates(tmp_path: Path) -> None:
    config = InformationConfig(epochs=5, last_epochs=2, batch_size=7, hidden=16, lr=0.01)
    network = load_simclr(make_model(tmp_path / "model"))[0].double()
    information, images = make_information(tmp_path / "data", config, network, 17, 16)
    expected = published_estimates(information, images, config)
    assert min(expected) > 1e-4
    train(information)
    assert information.estimates().tolist() == pytest.approx(expected, rel=1e-9)


def test_the_cache_is_the_forward_pass_of_every_batch(tmp_path: Path) -> None:
    network = load_simclr(make_model(tmp_path / "model"))[0].double()
    information, images = make_information(tmp_path / "data", InformationConfig(hidden=4), network, 17, 16)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    outputs, feature = information.activations
    assert network.training
    network.eval()
    start = 0
    for batch in images.split(7):
        maps, expected, _ = network.layers(batch)
        rows = slice(start, start + len(batch))
        torch.testing.assert_close(feature[rows], expected, rtol=1e-10, atol=1e-12)
        for layer, values in outputs.items():
            torch.testing.assert_close(values[rows], maps[layer].flatten(1), rtol=1e-10, atol=1e-12)
        start += len(batch)
    assert start == len(feature) == 17
    assert all(value.equal(before[key]) for key, value in network.state_dict().items())


class Gaussians(nn.Module):
    """Stands for an encoder: layer l's two outputs correlate with the two features by CORRELATIONS[l]."""

    image_size, arch = 2, "gaussians"
    correlations = (0.0, 0.5, 0.8, 0.95)

    def layers(self, images: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        generator = torch.Generator().manual_seed(len(images))
        draws = torch.randn(5, len(images), 2, generator=generator, dtype=torch.float64)
        feature, noise = draws[4], draws[:4]
        maps = [r * feature + math.sqrt(1 - r * r) * n for r, n in zip(self.correlations, noise, strict=True)]
        return [m.view(-1, 2, 1, 1) for m in maps], feature, feature

    @property
    def information(self) -> list[float]:
        """-log(1 - r^2) nats for two independent pairs."""
        return [-math.log(1 - r * r) for r in self.correlations]


@pytest.mark.parametrize("estimator", ["dv", "infonce", "club"])
def test_known_information_is_found(estimator: Any, tmp_path: Path) -> None:
    """Lower bounds come close from below on images held out; CLUB, an upper bound, lies above."""
    config = InformationConfig(
        estimator=estimator, epochs=12, last_epochs=3, batch_size=50, hidden=32, lr=5e-3, holdout=0.25
    )
    network = Gaussians()
    information, _ = make_information(tmp_path, config, network, 2000, 2)
    train(information)
    found, truth = information.estimates().tolist(), network.information
    assert found == sorted(found)
    if estimator == "club":
        assert all(f > 0.8 * t for f, t in zip(found, truth, strict=True))
        assert found[0] < 0.2
    else:
        for mine, theirs in zip(found, truth, strict=True):
            assert mine == pytest.approx(theirs, rel=0.25, abs=0.15)
    assert sum(layer_weights(information.estimates(), config).tolist()) == pytest.approx(10000.0)


@pytest.mark.parametrize(("holdout", "trained", "estimated"), [(0.25, (0, 15), (15, 20)), (0.0, (0, 20), (0, 20))])
def test_estimates_are_of_images_that_no_critic_was_trained_on(
    holdout: float, trained: tuple[int, int], estimated: tuple[int, int], tmp_path: Path
) -> None:
    """The last quarter is held out; without a share held out both are all images, as published."""
    config = InformationConfig(epochs=2, last_epochs=1, batch_size=4, hidden=4, holdout=holdout)
    information, _ = make_information(tmp_path, config, Gaussians(), 20, 2)
    seen: dict[str, list[int]] = {"trained": [], "estimated": []}
    pairs = information.pairs
    stage = information.stage(lambda: None)

    def watch(role: str) -> None:
        def watched(layer: int, index: Tensor) -> tuple[Tensor, Tensor]:
            seen[role] += index.tolist() if layer == 0 else []
            return pairs(layer, index)

        information.pairs = watched  # type: ignore[method-assign]

    for epoch in range(2):
        watch("trained")
        for number, batch in enumerate(stage.loader.epoch(epoch)):
            information(batch, Position(epoch=epoch, batch=number))
        watch("estimated")
        information.evaluate(epoch + 1)
    assert seen["trained"] == 2 * list(range(*trained))
    assert seen["estimated"] == list(range(*estimated))  # of the last epoch alone


def test_an_estimate_is_the_mean_of_its_batches_negative_and_undefined_ones_as_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = InformationConfig(epochs=3, last_epochs=2, batch_size=5, hidden=4)
    information, _ = make_information(tmp_path, config, Gaussians(), 20, 2)
    bounds = iter([0.4, -1.0, math.nan, 0.2, *[0.0] * 12, 0.8, 0.8, 0.8, -0.8, *[0.1] * 12])
    for critic in information.critics.values():
        monkeypatch.setattr(critic, "bound", lambda *given: torch.tensor(next(bounds), dtype=torch.float64))
    for epoch in (1, 2, 3):
        information.evaluate(epoch)
    first, *others = information.estimates().tolist()
    assert first == pytest.approx((0.6 / 4 + 2.4 / 4) / 2, rel=1e-12)
    assert others == pytest.approx([0.05] * 3, rel=1e-12)


def test_a_run_adds_the_shares_to_the_given_weights(tmp_path: Path) -> None:
    options = options_of("mimic", tmp_path) | {"attention_weights": [100, 200, 300, 400]}
    options["information"] |= {"scale": 50.0}
    assert main(["run", str(make_experiment(tmp_path, "mimic", options))]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    (estimates,) = ([row[f"layer{n}"] for n in (1, 2, 3, 4)] for row in metrics(tmp_path / "run") if "layer1" in row)
    expected = [100.0 * (n + 1) + 50.0 * estimate / sum(estimates) for n, estimate in enumerate(estimates)]
    assert [result[f"attention_weight{n}"] for n in (1, 2, 3, 4)] == pytest.approx(expected, rel=1e-6)


def test_fixed_weights_need_no_phase(tmp_path: Path) -> None:
    options = options_of("mimic", tmp_path) | {"attention_weights": [1, 2, 3, 4]}
    options["information"] = {"estimator": "fixed"}
    assert main(["run", str(make_experiment(tmp_path, "mimic", options))]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert list(result.values()) == [1.0, 2.0, 3.0, 4.0]
    assert {row["stage"] for row in metrics(tmp_path / "run")} == {"mimic"}
