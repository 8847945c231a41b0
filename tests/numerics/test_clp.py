"""CLP against what the published code gave: pairs, Lipschitz constants, what is pruned at each u, the pruned logits."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_defend.cli import main
from dist_defend.data.loader import DatasetConfig
from dist_defend.errors import UserError
from dist_defend.methods.defend.clp import Config, channel_scores
from dist_defend.methods.defend.pruning.masks import Neuron, prune, pruning_order
from dist_defend.models.artifact import load_classifier, save_artifact
from dist_defend.models.classifier import build_classifier
from dist_defend.models.pairing import pair_norms, preceding
from dist_defend.ops.lipschitz import channel_lipschitz
from tests.numerics.det import assert_fingerprint, det_images, det_init, golden
from tests.runs import CLASSES, make_classifier, make_data, make_experiment

CASES = {"resnet18": "clp_resnet18", "preact_resnet18": "clp_preactresnet18"}
EXAMPLE = torch.zeros(1, 3, 32, 32, dtype=torch.float64)


def make_net(arch: str) -> tuple[nn.Module, dict[str, Any]]:
    case = golden("baselines")[CASES[arch]]
    net = build_classifier(arch, 10, "none").double().net.eval()
    det_init(net, case["seed"])
    return net, case


def config(**changes: Any) -> Config:
    return Config(model="m", test=DatasetConfig("t"), **changes)


@pytest.mark.parametrize("arch", CASES)
def test_pairs_and_constants_are_the_published_ones(arch: str) -> None:
    net, case = make_net(arch)
    pairs = preceding(net)
    assert [[norm, conv] for norm, conv in pairs.items()] == case["pairs"]
    for norm, conv in pairs.items():
        kernels, gamma = (net.get_parameter(f"{layer}.weight") for layer in (conv, norm))
        values = channel_lipschitz(kernels, gamma, net.get_buffer(f"{norm}.running_var"))
        assert_fingerprint(values, case["lipschitz"][norm], what=norm)
        found = (values.mean().item(), values.std().item(), values.max().item())
        assert found == pytest.approx(case["mean_std"][norm], rel=1e-9)
        if norm in case["first8"]:
            assert values[:8].tolist() == pytest.approx(case["first8"][norm], rel=1e-9)


@pytest.mark.parametrize("arch", CASES)
def test_each_u_prunes_the_published_channels(arch: str) -> None:
    net, case = make_net(arch)
    order = pruning_order(channel_scores(net, preceding(net)))
    images = det_images((4, 3, 32, 32), case["seed"] + 1000)
    assert case["us"] == [stop["u"] for stop in case["stops"]]
    for stop in case["stops"]:
        fixed = config(u=stop["u"]).stops(order)[1]
        assert fixed is not None and (fixed.threshold, fixed.pruned) == (stop["u"], stop["count"])
        chosen = order[: fixed.pruned]
        found = {norm: sorted(n.channel for n in chosen if n.layer == norm) for norm, _ in case["pairs"]}
        assert [len(channels) for channels in found.values()] == stop["per_layer"]
        if "index" in stop:
            assert {norm: channels for norm, channels in found.items() if channels} == stop["index"]
        pruned = copy.deepcopy(net)
        prune(pruned, chosen, with_beta=True)
        with torch.no_grad():
            assert_fingerprint(pruned(images), tuple(stop["logits"]), what=f"u = {stop['u']}")


def test_a_mistake_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: the largest length of a kernel's columns, where the largest singular value is wanted."""
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda gram: gram.diagonal(dim1=-2, dim2=-1).sort().values)
    for test in (test_pairs_and_constants_are_the_published_ones, test_each_u_prunes_the_published_channels):
        with pytest.raises(AssertionError):
            test("resnet18")


def test_the_sweep_begins_with_the_fewest_and_prunes_strictly_above_u() -> None:
    order = pruning_order([Neuron("bn", k, -deviation) for k, deviation in enumerate((0.5, 1.0, -1.5, 3.0))])
    stops, fixed = config(u_num=3, u_max=4.0, u=1.0).stops(order)
    assert [(stop.threshold, stop.pruned) for stop in stops] == [(4.0, 0), (2.0, 1), (0.0, 3)]
    assert fixed is not None and fixed.pruned == 1  # the one at exactly 1 stays
    assert config(selection="defence_data", data=DatasetConfig("d")).stops(order)[1] is None


def test_dataflow_leaves_norms_of_sums_alone_and_both_ways_tell() -> None:
    net, _ = make_net("preact_resnet18")
    told: list[str] = []
    fed = pair_norms(net, EXAMPLE, "dataflow", told.append)
    blocks = [f"layer{n}.{block}" for n in range(1, 5) for block in range(2)]
    direct = {f"{block}.bn2": f"{block}.conv1" for block in blocks}
    assert fed == {"layer1.0.bn1": "conv1"} | direct
    pair_norms(net, EXAMPLE, "published", told.append)
    start = "7 batch norms, as layer1.1.bn1, do not read the output of one convolution: judged "
    assert told == [f"{start}not at all", f"{start}by the convolution listed before them, as published"]
    straight, _ = make_net("resnet18")
    told.clear()
    assert pair_norms(straight, EXAMPLE, "dataflow", told.append) == preceding(straight) and told == []


def test_a_norm_wider_than_the_convolution_before_it_has_no_pair() -> None:
    """Upstream: an IndexError, or a silent mispairing."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PixelUnshuffle(2), nn.BatchNorm2d(16), nn.Conv2d(16, 5, 1))
    assert preceding(net) == {}


def test_one_channel_stays_and_a_dead_one_is_named() -> None:
    conv, norm = nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1)
    net = nn.Sequential(conv, norm)
    assert [neuron.score for neuron in channel_scores(net, {"1": "0"})] == [float("inf")]
    assert norm.running_var is not None
    norm.running_var.zero_()
    with pytest.raises(UserError, match="1, channel 0: its running variance is 0"):
        channel_scores(net, {"1": "0"})


def run(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    assert main(["run", str(make_experiment(folder, "clp", options))]) == 0
    result = json.loads((folder / "run/result.json").read_text())
    return {**result, "table": json.loads((folder / "run/sweep.json").read_text())}


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    model = make_classifier(tmp_path / "model", attack={"trigger": {"name": "badnets"}, "target_class": 1})
    net, card = load_classifier(model)
    with torch.no_grad():
        net.get_parameter("net.conv1.weight")[3] *= 40
    save_artifact(tmp_path / "model", net, card)
    return {"model": model, "test": {"path": make_data(tmp_path / "test", 9, seed=1)}}


def test_a_run_without_data(options: dict[str, Any], tmp_path: Path) -> None:
    found = run(tmp_path, options)
    assert [row["kind"] for row in found["rows"]] == ["clp", "clp (oracle)"]
    assert found["table"][-1]["chosen"] and found["table"][-1]["threshold"] == 3.0 and len(found["table"]) == 23
    assert not any("acc_defence" in stop for stop in found["table"])
    assert found["metrics"].keys() == {
        "acc_before", "asr_before", "der", "prune_threshold", "pruned_neurons", "neurons"
    }  # fmt: skip
    model, card = load_classifier(tmp_path / "run/model")
    assert (card.defended_by, card.chosen_by, card.provenance["method"]) == ("clp", "u", "clp")
    assert all(model.get_parameter(f"net.bn1.{name}")[3] == 0 for name in ("weight", "bias"))
    lines = (tmp_path / "run/channel_scores.txt").read_text().splitlines()
    assert lines[4].split()[1:3] == ["bn1", "3"] and float(lines[4].split()[3]) < -3
    assert len(lines) == 1 + found["metrics"]["neurons"]


def test_clean_images_choose_the_lowest_u_within_the_allowed_loss(options: dict[str, Any], tmp_path: Path) -> None:
    data = {"path": make_data(tmp_path / "data"), "max_samples": 12}
    changes = {"data": data, "selection": "defence_data", "max_accuracy_drop": 1.0, "full_table": False}
    found = run(tmp_path, {**options, **changes})
    assert [row["kind"] for row in found["rows"]] == ["clp"]
    assert found["metrics"]["prune_threshold"] == 0.0 and found["metrics"]["defence_images"] == 12
    assert all(stop["acc_defence"]["n"] == 12 for stop in found["table"]) and len(found["table"]) == 22


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": "defence_data"}, "key 'clp.selection' is defence_data, but 'data' is missing"),
        ({"u": -1}, "clp.u"),
        ({"u_num": 0}, "clp.u_num"),
        ({"u_min": 11}, "clp.u_num"),
        ({"pairing": "order"}, "clp.pairing"),
        ({"attack": {"trigger": {"name": "badnets"}, "target_class": CLASSES}}, "clp.attack.target_class"),
    ],
)
def test_bad_input(
    changes: dict[str, Any], message: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(make_experiment(tmp_path, "clp", {**options, **changes}))]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
