"""bench/published/rnp.py computes what bboylyg/RNP computed, and the whole flow agrees with the package's."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_defend.bench import rnp as bench
from dist_defend.bench.published import rnp
from dist_defend.bench.runner import Case
from dist_defend.models.classifier import build_classifier
from tests.numerics.det import assert_fingerprint, det_images, det_init, golden

CASE = golden("rnp")["default"]


def test_published_steps() -> None:
    net = build_classifier("resnet18", 10, "none").net.double()
    det_init(net, CASE["seed"])
    size = CASE["batch_size"]
    images = det_images((size * CASE["num_batches"], 3, 32, 32), CASE["seed"] + 1).split(size)
    batches = list(zip(images, torch.tensor(CASE["labels"]).split(size), strict=True))
    losses, _ = rnp.unlearn_epoch(net, rnp.unlearning_optimizer(net, CASE["unlearning_lr"]), batches)
    assert losses == pytest.approx(CASE["unlearn_loss"], rel=1e-9)
    for key, value in CASE["params_after_unlearn"].items():
        assert_fingerprint(net.state_dict()[key], value, what=key)
    masked = rnp.masked_copy(net)
    optimizer = rnp.recovering_optimizer(masked, CASE["recovering_lr"])
    passes = [rnp.recover_epoch(masked, optimizer, batches, CASE["alpha"])[0] for _ in range(2)]
    assert passes[0] + passes[1] == pytest.approx(CASE["recover_loss"], rel=1e-9)
    for name, value in CASE["masks"].items():
        assert_fingerprint(masked.state_dict()[f"{name}.neuron_mask"], value, what=name)


def test_masks_and_pruning(tmp_path: Path) -> None:
    net = build_classifier("small_resnet", 10, "none").net
    masked = rnp.masked_copy(net)
    masked.state_dict()["layer2.0.bn1.neuron_mask"][3] = 0.123449
    rnp.write_masks(masked, tmp_path / "masks.txt")
    order = rnp.read_masks(tmp_path / "masks.txt")
    assert order[0] == ("layer2.0.bn1", 3, 0.1234)
    rnp.prune_neuron(net, *order[0][:2])
    assert net.state_dict()["layer2.0.bn1.weight"].nonzero().flatten().tolist() == [
        c for c in range(len(net.state_dict()["layer2.0.bn1.weight"])) if c != 3
    ]


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bench.Pair:
    for key, value in {"UNLEARNING_EPOCHS": 2, "RECOVERING_EPOCHS": 2, "TEST_SHARE": 4}.items():
        monkeypatch.setattr(bench, key, value)
    return bench.Pair(Case("rnp", "small_resnet", 5, 8), tmp_path)


def test_the_whole_flow_gives_equal_masks_and_an_equal_table(
    pair: bench.Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    pair.show_equal()
    assert "20 rows equal" in capsys.readouterr().out


def test_flows_that_differ_are_not_timed(pair: bench.Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    recover: Any = rnp.recover_epoch

    def other(*arguments: Any, alpha: float) -> Any:
        return recover(*arguments, alpha=alpha + 0.1)

    monkeypatch.setattr(rnp, "recover_epoch", other)
    with pytest.raises(RuntimeError, match="do not compute the same"):
        pair.show_equal()
