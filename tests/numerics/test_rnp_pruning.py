"""RNP's masked batch norm, its file of masks, its thresholds, its sweep and its choice."""

import copy
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.batch import Batch
from dist_defend.counts import Count, predict
from dist_defend.data.loader import LoaderConfig, make_loader
from dist_defend.data.store import open_dataset
from dist_defend.engine import dist
from dist_defend.engine.step import Position
from dist_defend.errors import UserError
from dist_defend.methods.defend.pruning import masks as masks_module
from dist_defend.methods.defend.pruning.masks import (
    Neuron,
    by_number,
    by_threshold,
    check_neurons,
    check_number,
    neuron_table,
    prune,
    pruning_order,
    read_mask_values,
    write_mask_values,
)
from dist_defend.methods.defend.pruning.options import choose_by_clean_data
from dist_defend.methods.defend.pruning.outcome import choose_by_oracle
from dist_defend.methods.defend.pruning.stops import Stops, predict_pruned
from dist_defend.methods.defend.rnp.steps import RecoverStep
from dist_defend.models.batch_statistics import StatisticsShift, estimate_statistics
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.models.masked_norm import MaskedNorm, mask_norms, norm_names
from tests.numerics.det import GOLDEN, det_images, det_init
from tests.runs import make_data

PUBLISHED = GOLDEN / "rnp_mask_values.txt"
PUBLISHED_COUNTS = [12, 14, 18, 21, 24, 28, 32, 41, 49, 57, 68, 82, 107, 145, 204, 263, 365, 524, 753]
ARCHITECTURES = ["resnet18", "preact_resnet18", "vgg19_bn", "mobilenet_v2", "small_resnet", "timm:efficientnet_b0"]


def make_classifier(arch: str = "small_resnet", dtype: torch.dtype = torch.float64, seed: int = 3) -> Classifier:
    model = build_classifier(arch, 10, "none").to(dtype)
    det_init(model.net, seed)
    return model


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("is_training", [True, False])
def test_masks_of_one_change_nothing_bitwise(arch: str, is_training: bool) -> None:
    plain, masked = (make_classifier(arch, torch.float32).train(is_training) for _ in range(2))
    images = det_images((4, 3, 32, 32), 1).float()
    names = norm_names(masked.net)
    mask_norms(masked.net, names)
    assert all(isinstance(masked.net.get_submodule(name), MaskedNorm) for name in names)
    torch.manual_seed(0)
    expected = plain(images)
    torch.manual_seed(0)
    assert torch.equal(masked(images), expected)
    for key, value in plain.state_dict().items():
        assert torch.equal(masked.state_dict()[key], value), key


def test_timm_layers_with_an_activation_are_masked() -> None:
    net = make_classifier("timm:efficientnet_b0").net
    names = norm_names(net)
    assert {type(net.get_submodule(name)).__name__ for name in names} == {"BatchNormAct2d"}
    assert len(names) == 49


@pytest.mark.parametrize("arch", ["small_resnet", "timm:efficientnet_b0"])
def test_a_mask_of_zero_is_a_gamma_of_zero_bitwise(arch: str) -> None:
    plain, masked = (make_classifier(arch, torch.float32).eval() for _ in range(2))
    parameters = mask_norms(masked.net, norm_names(masked.net))
    generator = torch.Generator().manual_seed(0)
    picked = []
    for name, mask in parameters.items():
        channels = torch.randperm(len(mask), generator=generator)[: len(mask) // 8]
        mask.data[channels] = 0
        picked += [Neuron(name, channel, 0.0) for channel in channels.tolist()]
    betas = {k: v.clone() for k, v in plain.net.state_dict().items() if k.endswith("bias")}
    prune(plain.net, picked)
    images = det_images((4, 3, 32, 32), 1).float()
    assert torch.equal(plain(images), masked(images))
    assert all(torch.equal(plain.net.state_dict()[key], value) for key, value in betas.items())
    prune(plain.net, picked, with_beta=True)
    assert not torch.equal(plain(images), masked(images))


@pytest.mark.parametrize("convert", [lambda net: net, lambda net: mask_norms(net, norm_names(net))])
def test_state_dicts_load_with_and_without_masks(convert: Callable[[nn.Module], Any]) -> None:
    net, other = make_classifier().net, make_classifier(seed=4).net
    masks = mask_norms(net, norm_names(net))
    masks["bn1"].data[0] = 0.5
    convert(other)
    net.load_state_dict(other.state_dict())
    assert torch.equal(net.state_dict()["bn1.weight"], other.state_dict()["bn1.weight"])
    assert masks["bn1"][0] == (1.0 if isinstance(other.get_submodule("bn1"), MaskedNorm) else 0.5)
    assert not [key for key in net.state_dict() if "noise" in key]


def test_a_network_without_batch_norm_is_refused() -> None:
    with pytest.raises(UserError, match="no BatchNorm2d") as error:
        norm_names(make_classifier("timm:convnext_atto").net)
    assert "\n" not in str(error.value)


def test_mask_gradient() -> None:
    """dL/dm_c = gamma_c times the sum over batch and pixels of dL/dy x_hat."""
    norm = nn.BatchNorm2d(5).double()
    det_init(norm, 1)
    net = nn.Sequential(norm)
    mask = mask_norms(net, ["0"])["0"]
    mask.data.uniform_(0, 1)
    x, upstream = det_images((6, 5, 4, 4), 2), det_images((6, 5, 4, 4), 3)
    (net(x) * upstream).sum().backward()
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    x_hat = (x - mean) / (var + norm.eps).sqrt()
    expected = net.state_dict()["0.weight"] * (upstream * x_hat).sum((0, 2, 3))
    torch.testing.assert_close(mask.grad, expected, rtol=1e-12, atol=1e-12)


def test_a_gamma_of_zero_keeps_its_mask() -> None:
    model = make_classifier()
    model.net.get_parameter("bn1.weight").data[2] = 0
    masks = mask_norms(model.net, norm_names(model.net))
    step = RecoverStep(model, masks, dist.start("fp64", None), alpha=1.0, lr=9.0)
    for seed in range(3):
        step(Batch((det_images((8, 3, 32, 32), seed),), torch.arange(8), torch.arange(8)), Position())
    assert masks["bn1"][2] == 1
    values = torch.cat(list(masks.values())).detach()
    assert values.min() == 0 and values.max() == 1  # clamped at both ends by steps as large as these


class Wired(nn.Module):
    """Four channels, ReLU, pool, three classes: channels 0 to 2 vote for their class, channel 3 hard for class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 3, bias=False)
        self.conv.weight.data = torch.eye(4)[:, :, None, None]
        self.linear.weight.data = torch.tensor([[1.0, 0, 0, 8], [0, 1, 0, 0], [0, 0, 1, 0]])

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(functional.relu(self.bn(self.conv(x))).mean((2, 3)))
        return logits


def wired_data() -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.arange(60) % 3
    clean = 0.1 * det_images((60, 4, 4, 4), 7)
    clean[torch.arange(60), labels] += 2
    stamped = clean.clone()
    stamped[:, 3] += 3
    return clean, stamped, labels


def test_pruning_the_trigger_channel_of_a_wired_network() -> None:
    net, (clean, stamped, labels) = Wired().double().eval(), wired_data()
    others = labels != 0

    def rates() -> tuple[float, float]:
        acc = (net(clean).argmax(1) == labels).double().mean().item()
        return acc, (net(stamped).argmax(1) == 0)[others].double().mean().item()

    assert rates() == (1.0, 1.0)
    prune(net, [Neuron("bn", 3, 0.0)])
    assert rates() == (1.0, 0.0)


def test_recovering_finds_the_trigger_channel() -> None:
    net, (clean, _, labels) = Wired().double(), wired_data()
    masks = mask_norms(net, norm_names(net))
    step = RecoverStep(net, masks, dist.start("fp64", None))
    for _ in range(20):
        step(Batch((clean,), labels, torch.arange(60)), Position())
    values = masks["bn"].detach()
    assert values.argmin() == 3 and values[3] < 0.8
    assert values[:3].tolist() == [1.0, 1.0, 1.0]


def pruned_counts(neurons: list[Neuron]) -> list[int]:
    return [candidate.pruned for candidate in by_threshold(pruning_order(neurons), 0.90, 0.05)]


def test_published_masks_replay_to_the_published_counts() -> None:
    neurons = read_mask_values(PUBLISHED)
    assert len(neurons) == 4800
    assert sum(neuron.score == 1 for neuron in neurons) == 1730
    assert pruned_counts(neurons) == PUBLISHED_COUNTS
    check_neurons(neurons, make_classifier("resnet18").net, norm_names(make_classifier("resnet18").net), PUBLISHED)


def test_the_replay_catches_a_strict_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks_module, "bisect_right", bisect_left)
    assert pruned_counts(read_mask_values(PUBLISHED)) != PUBLISHED_COUNTS


def test_the_replay_catches_exact_thresholds_and_another_order() -> None:
    neurons = read_mask_values(PUBLISHED)
    assert [t for t, _ in by_threshold(pruning_order(neurons), 0.9, 0.05)][3] == 0.15000000000000002
    assert pruned_counts(neurons[::-1]) == PUBLISHED_COUNTS
    reversed_ties = pruning_order(neurons[::-1])
    assert [n.channel for n in pruning_order(neurons)][:12] != [n.channel for n in reversed_ties][:12]


def test_masks_round_trip_to_the_published_bytes(tmp_path: Path) -> None:
    write_mask_values(tmp_path / "mask_values.txt", read_mask_values(PUBLISHED))
    assert (tmp_path / "mask_values.txt").read_bytes() == PUBLISHED.read_bytes()


def test_rounding_comes_before_the_threshold() -> None:
    neurons = neuron_table({"bn": torch.tensor([0.00004, 0.05004, 0.05006, 1.0])})
    assert [neuron.score for neuron in neurons] == [0.0, 0.05, 0.0501, 1.0]
    assert pruned_counts(neurons)[:3] == [1, 2, 3]
    exact = [Neuron("bn", c, m) for c, m in enumerate([0.00004, 0.05004, 0.05006, 1.0])]
    assert pruned_counts(exact)[:3] == [0, 1, 3]  # what rounding afterwards would give


@pytest.mark.parametrize(
    ("maximum", "step", "off_by_one", "counts"),
    [
        (20, 5, False, [0, 5, 10, 15, 20]),
        (20, 5, True, [5, 10, 15, 20, 25]),
        (19.2, 4.1, False, [0, 5, 10, 15, 20]),
        (0.9, 0.05, True, [1, 2]),
    ],
)
def test_by_number(maximum: float, step: float, off_by_one: bool, counts: list[int]) -> None:
    assert [candidate.pruned for candidate in by_number(maximum, step, off_by_one)] == counts


def test_by_number_ends_at_the_last_channel() -> None:
    net = make_classifier().net
    names = norm_names(net)
    channels = sum(len(net.get_parameter(f"{name}.weight")) for name in names)
    check_number(net, names, channels, 0, "rnp.pruning_max")
    with pytest.raises(UserError, match="pruning_max"):
        check_number(net, names, channels, 5, "rnp.pruning_max")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("header\n0 \t bn \t 0 \n", "line 2 is not"),
        ("header\n0 \t bn \t 0 \t nan \n", "in \\[0, 1\\]"),
        ("header\n0 \t bn \t 0 \t 1.0000 \n0 \t bn \t 0 \t 1.5000 \n", "line 3"),
        ("header\n0 \t bn1 \t 0 \t 1.0000 \n", "do not fit"),
        ("header\n" + "0 \t conv \t 0 \t 1.0000 \n", "do not fit"),
    ],
)
def test_bad_mask_files(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mask_values.txt"
    if text is not None:
        path.write_text(text)
    net = make_classifier().net
    with pytest.raises(UserError, match=message) as error:
        check_neurons(read_mask_values(path), net, norm_names(net), path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def random_order(net: nn.Module, seed: int = 0) -> list[Neuron]:
    generator = torch.Generator().manual_seed(seed)
    names = norm_names(net)
    rows = {name: torch.rand(len(net.get_parameter(f"{name}.weight")), generator=generator) for name in names}
    return pruning_order(neuron_table(rows))


@pytest.mark.parametrize("arch", ["small_resnet", "preact_resnet18", "mobilenet_v2", "timm:resnet10t"])
@pytest.mark.parametrize(("with_beta", "is_adapted"), [(False, False), (True, False), (False, True)])
def test_every_stop_is_bitwise_what_pruning_alone_gives(arch: str, with_beta: bool, is_adapted: bool) -> None:
    model = make_classifier(arch, torch.float32).eval()
    order = random_order(model.net)
    stops = [0, 1, 3, 3, 40, 41, len(order) // 2]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [det_images((3, 3, 32, 32), seed).float() for seed in (1, 2)]
    own = [det_images((4, 3, 32, 32), seed).float() for seed in (3, 4)]

    adapt = StatisticsShift(model, lambda: own) if is_adapted else None
    sweep = Stops(model, order, stops, with_beta, adapt)
    with torch.no_grad():
        found = [sweep(images) for images in batches]
        for number, stop in enumerate(stops):
            alone = make_classifier(arch, torch.float32).eval()
            prune(alone.net, order[:stop], with_beta)
            if adapt is not None and stop:
                adapt(alone)
            for images, logits in zip(batches, found, strict=True):
                assert torch.equal(logits[number], alone(images)), (stop, number)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_statistics_are_the_mean_over_the_batches() -> None:
    model = make_classifier("timm:efficientnet_b0")
    model.net.drop_rate = 0.5  # type: ignore[assignment]
    before = copy.deepcopy(model)
    batches = [det_images((4, 3, 32, 32), seed) for seed in (1, 2)]
    estimate_statistics(model, batches)
    first = model.net.get_submodule("bn1")
    outputs = [before.net.conv_stem(batch) for batch in batches]  # type: ignore[operator]
    mean = sum(output.mean((0, 2, 3)) for output in outputs) / 2
    var = sum(output.var((0, 2, 3)) for output in outputs) / 2
    torch.testing.assert_close(first.running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first.running_var, var, rtol=1e-12, atol=1e-12)
    assert not any(module.training for module in model.modules())
    assert first.momentum == before.net.get_submodule("bn1").momentum
    for (name, found), kept in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(found, kept), name


def test_statistics_follow_a_change_of_the_weights() -> None:
    """A filter times -3: the variance of all data follows from a few images; the mean moves by what these show."""
    conv, norm = nn.Conv2d(3, 4, 1, bias=False).double(), nn.BatchNorm2d(4, eps=1e-30).double()
    net = nn.Sequential(conv, norm)
    own = det_images((4, 3, 8, 8), 2)
    estimate_statistics(net, [det_images((64, 3, 8, 8), 1)])
    mean, var = (buffer.clone() for key, buffer in norm.named_buffers() if key.startswith("running"))
    seen_mean = conv(own).mean((0, 2, 3)).detach()
    follow = StatisticsShift(net, lambda: [own])
    follow(net)
    assert norm.state_dict()["running_mean"].equal(mean) and norm.state_dict()["running_var"].equal(var)
    with torch.no_grad():
        conv.weight[1] *= -3
    follow(net)
    mean[1] -= 4 * seen_mean[1]
    var[1] *= 9
    torch.testing.assert_close(norm.state_dict()["running_mean"], mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.state_dict()["running_var"], var, rtol=1e-12, atol=1e-12)


def test_the_sweep_shares_what_comes_before_the_first_change() -> None:
    model = make_classifier(dtype=torch.float32).eval()
    order = [Neuron("layer4.0.bn2", c, 0.0) for c in range(8)]
    sweep = Stops(model, order, [0, 2, 4, 8], with_beta=False)
    calls: list[str] = []
    for name, module in sweep.model.named_modules():
        if isinstance(module, nn.Conv2d):
            module._conv_forward = counted(name, module._conv_forward, calls)  # type: ignore[method-assign]
    with torch.no_grad():
        sweep(det_images((2, 3, 32, 32), 1).float())
    assert calls.count("net.conv1") == 1
    assert calls.count("net.layer4.0.conv2") == 1  # comes before the layer that changes
    assert calls.count("net.layer4.0.shortcut.0") == 4  # is called after it


def counted(name: str, function: Callable[..., Tensor], calls: list[str]) -> Callable[..., Tensor]:
    def call(*arguments: Any) -> Tensor:
        calls.append(name)
        return function(*arguments)

    return call


def test_counts_of_the_sweep_are_those_of_single_evaluations(tmp_path: Path) -> None:
    dataset = open_dataset(make_data(tmp_path / "data", 13, size=32))
    loader = make_loader(dataset, config=LoaderConfig("resident", 1), batch_size=4)
    model, ranks = make_classifier(), dist.start("fp64", None)
    for norm in (model.net.get_submodule(name) for name in norm_names(model.net)):
        norm.momentum = 1.0  # type: ignore[assignment]  # statistics of these images: predictions that differ
    model.train()(next(loader.epoch(0)).images.double())
    order, stops = random_order(model.net), [0, 5, 60, 200]
    classes, labels = predict_pruned(model, order, stops, loader, ranks, with_beta=False)
    assert len(classes.unique()) > 1 and not torch.equal(classes[:, 0], classes[:, -1])
    for column, stop in enumerate(stops):
        alone = copy.deepcopy(model)
        prune(alone.net, order[:stop])
        found, truth, _ = predict(alone, loader, ranks)
        assert torch.equal(classes[:, column], found)
        assert torch.equal(labels, truth)


def test_the_defender_stops_before_accuracy_falls() -> None:
    assert choose_by_clean_data([1000, 1000, 990, 985, 979, 990], 0.02) == 3
    assert choose_by_clean_data([1000, 979, 1000], 0.02) == 0
    assert choose_by_clean_data([100, 100, 100], 0.0) == 2
    assert choose_by_clean_data([1000, 980, 979], 0.02) == 1  # just the allowed loss


def test_the_oracle_takes_the_lowest_asr_within_its_budget() -> None:
    def counts(acc: int, asr: int) -> dict[str, Count]:
        return {"acc": Count(acc, 100), "asr": Count(asr, 100)}

    table = {0: counts(90, 99), 1: counts(89, 50), 2: counts(85, 3), 3: counts(84, 3), 4: counts(70, 0)}
    assert choose_by_oracle(table, 0.1) == 2
    assert choose_by_oracle(table, 0.5) == 4
    assert choose_by_oracle(table, 0.0) == 0
    table[4] = counts(81, 0)  # just a tenth less, which BackdoorBench's |acc - acc0| / acc0 < acc_ratio leaves out
    assert choose_by_oracle(table, 0.1) == 2


def test_float_thresholds_are_numpys() -> None:
    order = [Neuron("bn", 0, 0.0)]
    assert [t for t, _ in by_threshold(order, 0.7, 0.7)] == np.arange(0, 1.4, 0.7).tolist() == [0.0, 0.7]
