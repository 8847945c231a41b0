"""FT, NAD, FT-SAM, FP and SAU against what the published code gave, update by update."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.batch import Batch
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine import dist
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.engine.step import Position
from dist_defend.errors import UserError
from dist_defend.methods.defend import fp, ft_sam, nad, sau
from dist_defend.methods.defend.ft_sam import SamStep, smooth_kl
from dist_defend.methods.defend.nad import AttentionStep, attention_layers
from dist_defend.methods.defend.pruning.masks import Candidate, Neuron, pruning_order
from dist_defend.methods.defend.pruning.stops import Stops
from dist_defend.methods.defend.tuning.options import sgd
from dist_defend.methods.defend.tuning.step import TuningStep
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.models.pixel_space import normalization_constants
from dist_defend.ops.attention import attention_loss, attention_map
from tests.numerics.det import assert_fingerprint, det_images, det_init, golden

DATA: dict[str, Any] = {"model": "m", "data": DatasetConfig("d"), "test": DatasetConfig("t")}


def make_model(arch: str, seed: int) -> Classifier:
    model = build_classifier(arch, 10, "none").double()
    det_init(model.net, seed)
    return model


def batch_of(case: dict[str, Any], number: int) -> Batch:
    images = det_images((case["batch"], 3, 32, 32), case["images"] + number)
    return Batch((images,), torch.tensor(case["labels"][number]), torch.arange(case["batch"]))


def assert_state(net: nn.Module, expected: dict[str, Any]) -> None:
    state = net.state_dict()
    assert set(expected) <= set(state)
    for key, numbers in expected.items():
        assert_fingerprint(state[key], numbers, what=key)


def rate_of(step: TuningStep) -> float:
    return step.update.rate


def test_fine_tuning() -> None:
    case = golden("baselines")["ft"]
    model = make_model("preact_resnet18", case["seed"])
    optimizer = sgd(case["lr"], period=case["t_max"])
    step = TuningStep(model, optimizer, dist.start("fp64", None), steps_per_epoch=2, epochs=3)
    losses, rates = [], []
    for epoch in range(3):
        for number in range(2):
            losses.append(step(batch_of(case, number), Position(epoch=epoch, batch=number))["loss"].item())
            if len(losses) == 1:
                assert_state(model.net, case["after_first"])
        rates.append(rate_of(step))
    assert losses == pytest.approx(case["losses"], rel=1e-9)
    assert rates == pytest.approx(case["lr_of_epoch"], rel=1e-12)
    assert_state(model.net, case["after"])


def test_the_mean_over_six_images_is_exact_in_double_precision() -> None:
    model = make_model("small_resnet", 5)
    step = TuningStep(model, sgd(), dist.start("fp64", None), steps_per_epoch=1, epochs=1)
    images, labels = det_images((6, 3, 32, 32), 7), torch.tensor([0, 3, 9, 1, 1, 5])
    scalars, found = step.gradients(images, labels)
    expected = functional.cross_entropy(model(images), labels)
    assert scalars["loss"].item() == pytest.approx(expected.item(), rel=1e-13)
    for mine, plain in zip(found, torch.autograd.grad(expected, step.parameters), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-10, atol=1e-12)


def run_nad(case: dict[str, Any], arch: str, config: nad.Config, epochs: int) -> Classifier:
    student, teacher = make_model(arch, case["student"]), make_model(arch, case["teacher"])
    step = AttentionStep(config, student, teacher, ranks=dist.start("fp64", None), steps_per_epoch=1)
    told: list[dict[str, Tensor]] = []
    for epoch in range(epochs):
        batch = batch_of(case, epoch)
        if epoch == 0:
            before = {key: value.clone() for key, value in student.state_dict().items()}
            student.train()
            names = [name for name, _ in student.net.named_parameters()]
            found = dict(zip(names, step.gradients(batch.images, batch.labels)[1], strict=True))
            for key, numbers in case["grads_first"].items():
                assert_fingerprint(found[key], numbers, what=key)
            student.load_state_dict(before)
        told.append(step(batch, Position(epoch=epoch)))
        if epoch == 0:
            assert_state(student.net, case["after_first"])
        if "lr_of_epoch" in case:
            assert rate_of(step) == pytest.approx(case["lr_of_epoch"][epoch], rel=1e-12)
    terms = [[row[f"attention{n}"].item() for n in range(1, len(config.betas) + 1)] for row in told]
    assert terms == [pytest.approx(row[: len(config.betas)], rel=1e-9) for row in case["attention"]]
    assert [row["cross_entropy"].item() for row in told] == pytest.approx(case["cross_entropy"], rel=1e-9)
    assert [row["loss"].item() for row in told] == pytest.approx(case["losses"], rel=1e-9)
    assert_state(student.net, case["after"])
    if "teacher_unchanged" in case:
        assert_fingerprint(teacher.net.get_parameter("fc.weight"), case["teacher_unchanged"])
    return student


def test_nad() -> None:
    case = golden("baselines")["nad"]
    config = nad.Config(**DATA, epochs=4)
    run_nad(case, "wrn_16_1", config, 4)


def test_nad_as_backdoorbench_has_it() -> None:
    case = golden("baselines")["nad_backdoorbench"]
    own = nad.PRESETS["backdoorbench"] | {"optimizer": OptimizerConfig(**nad.PRESETS["backdoorbench"]["optimizer"])}
    own["teacher_optimizer"] = OptimizerConfig(**own["teacher_optimizer"])
    student = run_nad(case, "preact_resnet18", nad.Config(**(DATA | own)), 2)
    assert case["attention"][0][2] < 1e-16  # the pooled map, which is left out here
    assert case["num_batches_tracked"]["layer3.1.bn2.num_batches_tracked"] == 8  # four passes of two batches
    assert student.net.get_buffer("layer3.1.bn2.num_batches_tracked") == 2


def test_attention_of_published_powers() -> None:
    case = golden("baselines")["attention_loss"]
    own, wanted = (det_images((4, 7, 5, 6), seed) for seed in case["seeds"])
    assert attention_loss(own, wanted).item() == pytest.approx(case["p2"], rel=1e-12)
    assert attention_map(own).flatten()[:4].tolist() == pytest.approx(case["map_p2_first4"], rel=1e-12)


@pytest.mark.parametrize(
    ("arch", "wanted"),
    [
        ("wrn_16_1", ["block1", "block2", "block3"]),
        ("resnet18", ["layer2", "layer3", "layer4"]),
        ("torchvision:resnet18", ["layer2", "layer3", "layer4"]),
    ],
)
def test_the_last_three_blocks_are_compared(arch: str, wanted: list[str]) -> None:
    assert attention_layers(build_classifier(arch, 10, "none").net, nad.Config(**DATA)) == wanted


def test_a_network_without_blocks_wants_names() -> None:
    net = build_classifier("vgg11_bn", 10, "none").net
    with pytest.raises(UserError, match=r"key 'nad.layers': the network's blocks cannot be told; name 3 of \(features"):
        attention_layers(net, nad.Config(**DATA))
    assert attention_layers(net, nad.Config(**DATA, layers=("features.7",), betas=(1.0,))) == ["features.7"]
    with pytest.raises(UserError, match="names 'nowhere'"):
        attention_layers(net, nad.Config(**DATA, layers=("nowhere",), betas=(1.0,)))


def test_ft_sam() -> None:
    case = golden("baselines")["ftsam"]
    model = make_model("preact_resnet18", case["seed"])
    optimizer = sgd(case["lr"], schedule="cosine_steps", period=case["t_max"])
    config = ft_sam.Config(**DATA, rho=case["rho"], smoothing=case["smoothing"], optimizer=optimizer, epochs=1)
    step = SamStep(config, model=model, ranks=dist.start("fp64", None), steps_per_epoch=case["num"])
    seen: list[tuple[list[Tensor], list[Tensor]]] = []  # weights and gradients of each pass
    plain = step.gradients

    def noting(images: Tensor, labels: Tensor) -> Any:
        weights = [weight.detach().clone() for weight in step.parameters]
        scalars, found = plain(images, labels)
        seen.append((weights, [one.clone() for one in found]))
        return scalars, found

    step.gradients = noting  # type: ignore[method-assign]
    for number, expected in enumerate(case["steps"]):
        seen.clear()
        told = step(batch_of(case, number), Position(batch=number))
        (own, first), (moved, worst) = seen
        assert_fingerprint(joined(first), expected["gradient"])
        assert told["slope_norm"].item() == pytest.approx(expected["norm"], rel=1e-9)
        assert_fingerprint(joined(moved) - joined(own), expected["perturbation"], rel=1e-8)
        assert_fingerprint(joined(worst), expected["gradient_at_perturbed"])
        assert told["loss"].item() == pytest.approx(expected["loss"], rel=1e-9)
        assert rate_of(step) == pytest.approx(expected["lr"], rel=1e-12)
        if "after" in expected:
            assert_state(model.net, expected["after"])
    assert (
        model.net.get_buffer("layer1.0.bn1.num_batches_tracked") * 2 == case["num_batches_tracked"]
    )  # of one pass each
    assert model.net.get_submodule("layer1.0.bn1").momentum == case["bn_momentum_after"]


def joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("smoothing", ["0.0", "0.1"])
def test_smoothed_labels(smoothing: str) -> None:
    rows = golden("baselines")["smooth_cross_entropy"][smoothing]
    labels = torch.tensor([(3 * i + 1) % 10 for i in range(6)])
    found = smooth_kl(det_images((6, 10), 9), labels, float(smoothing))
    assert found.tolist() == pytest.approx(rows, rel=1e-12)


def test_sam_without_radius_is_fine_tuning_on_smoothed_labels() -> None:
    case = golden("baselines")["ftsam"]
    ends = []
    for rho in (0.0, None):
        model, ranks = make_model("small_resnet", 5), dist.start("fp64", None)
        if rho is None:
            step: TuningStep = TuningStep(model, sgd(), ranks, steps_per_epoch=2, epochs=1)
        else:
            config = ft_sam.Config(**DATA, rho=rho, smoothing=0.0)
            step = SamStep(config, model=model, ranks=ranks, steps_per_epoch=2)
        for number in range(2):
            step(batch_of(case, number), Position(batch=number))
        ends.append(model.net.state_dict())
    assert all(ends[0][key].equal(ends[1][key]) for key in ends[1] if not key.endswith("tracked"))


class Fed:
    """A loader of the recorded batches."""

    def __init__(self, case: dict[str, Any], count: int) -> None:
        self.batches = [batch_of(case, number) for number in range(count)]
        self.num_samples = sum(len(batch.labels) for batch in self.batches)

    def epoch(self, epoch: int) -> list[Batch]:
        return self.batches


def test_fine_pruning() -> None:
    case, ranks = golden("baselines")["fp"], dist.start("fp64", None)
    model = make_model("preact_resnet18", case["seed"])
    own = {key: value for key, value in fp.PRESETS["backdoorbench"].items()}
    config = fp.Config(
        **(DATA | own), once_prune_ratio=case["ratio"], max_accuracy_drop=case["acc_ratio"], optimizer=sgd(), epochs=1
    )
    fed: Any = Fed(case, 2)
    name = fp.last_linear(model.net)
    means = fp.mean_features(model, name, fed, ranks, absolute=False)
    assert_fingerprint(means, case["activation"])
    assert means[:8].tolist() == pytest.approx(case["activation_first8"], rel=1e-9)
    order = pruning_order([Neuron(name, column, value) for column, value in enumerate(means.tolist())])
    assert [neuron.channel for neuron in order] == case["order"]
    stops = [Candidate(None, 0), *config.stops(order)[0]]
    images, labels = det_images((16, 3, 32, 32), case["test"]), torch.tensor(case["test_labels"])
    at_stops = Stops(model, order, [stop.pruned for stop in stops], False)(images)
    right = [int((logits.argmax(1) == labels).sum()) for logits in at_stops]
    assert [[52 * n, count] for n, count in enumerate(right[:3])] == case["rows"]
    chosen = stops[config.pick(right)].pruned
    assert chosen == case["pruned_columns"]
    assert replace(config, include_failing_stop=False).pick(right) == 1
    step = fp.PrunedStep(config, model, name, ranks=ranks, steps_per_epoch=2)
    step.prune([neuron.channel for neuron in order[:chosen]])
    both = torch.cat([batch.images for batch in fed.batches])
    assert_fingerprint(model.eval()(both), case["logits_pruned"])
    losses = [step(batch, Position(batch=n))["loss"].item() for n, batch in enumerate(fed.batches)]
    assert losses == pytest.approx(case["finetune_losses"], rel=1e-9)
    assert_fingerprint(model.net.get_parameter("linear.weight"), case["finetune_linear_effective"])
    assert_state(model.net, {key: value for key, value in case["finetune_after"].items() if "linear.weight" not in key})
    assert step.metrics() == {"pruned_neurons": 103, "neurons": 512}


def test_shared_adversarial_unlearning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded on normalised images, with perturbations in units of pixels."""
    case = golden("baselines")["sau"]
    model = build_classifier("preact_resnet18", 10, "cifar10_backdoorbench").double()
    det_init(model.net, case["seed"])
    mean, std = (
        torch.tensor(row, dtype=torch.float64).view(1, 3, 1, 1)
        for row in normalization_constants("cifar10_backdoorbench")
    )
    model.normalize.mean, model.normalize.std = mean, std  # the program keeps them in float32
    options = {"bound": case["bound"], "step_size": case["step"], "attack_steps": case["steps"]}
    step = sau.SharedStep(sau.Config(**DATA, **options), model, ranks=dist.start("fp64", None), steps_per_epoch=1)
    perturb, made = step.perturb, []

    def noting(images: Tensor, labels: Tensor) -> Tensor:
        made.append(perturb(images, labels))
        with torch.no_grad():
            made.extend(network(images + made[0]).argmax(1) for network in (step.model, step.reference))
        return made[0]

    monkeypatch.setattr(step, "perturb", noting)
    images = det_images((case["batch"], 3, 32, 32), case["images"]) * std + mean
    batch = Batch((images,), torch.tensor(case["labels"]), torch.arange(case["batch"]))
    for epoch, expected in enumerate(case["steps_taken"]):
        made.clear()
        told = step(batch, Position(epoch=epoch))
        assert_fingerprint(made[0], expected["perturbation"])
        assert made[0].flatten()[:8].tolist() == pytest.approx(expected["first8"])
        assert made[1].tolist() == expected["prediction_perturbed"]
        assert made[2].tolist() == expected["reference_perturbed"]
        assert told["loss"].isfinite()
        if "after" in expected:
            assert_state(model.net, expected["after"])
    assert_state(model.net, case["after"])
