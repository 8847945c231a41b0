"""Steps of I-BAU against the published code's float64 numbers, and what each number would catch."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_defend.batch import Batch
from dist_defend.bench.published import ibau as reference
from dist_defend.data.loader import DatasetConfig
from dist_defend.data.order import epoch_order
from dist_defend.engine import dist
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.methods.defend.ibau import step
from dist_defend.methods.defend.ibau.options import Config
from dist_defend.methods.defend.ibau.rounds import Rounds
from dist_defend.methods.defend.ibau.step import UnlearningStep
from dist_defend.models.classifier import build_classifier
from dist_defend.ops.hypergrad import Hypergradient, hypergradient, neumann
from tests.numerics.det import assert_fingerprint, det_init, fingerprint, golden

CASES = tuple(golden("ibau"))
NOWHERE = DatasetConfig("nowhere")


@dataclass
class InMemory:
    """Stands for a loader: all images and labels, in order unless shuffled, one rank."""

    is_shuffled = False  # no field: what follows it in a subclass has no default
    images: Tensor
    labels: Tensor
    batch_size: int

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    @property
    def num_batches(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def shuffled(self) -> "InMemory":
        other = copy.copy(self)
        other.is_shuffled = True
        return other

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        order = torch.from_numpy(epoch_order(self.num_samples, 0, epoch, self.is_shuffled))
        for part in order.split(self.batch_size)[start_batch:]:
            yield Batch((self.images[part],), self.labels[part], part)


def make_step(images: Tensor, labels: Tensor, size: int, seed: int, **options: Any) -> UnlearningStep:
    model = build_classifier("ibau_vgg", 10, "none").double()
    det_init(model.net, seed)
    config = Config("nowhere", NOWHERE, NOWHERE, batch_size=size, **options)
    rounds = Rounds(InMemory(images, labels, size), 32, dist.start("fp64", None))  # type: ignore[arg-type]
    return UnlearningStep(model, config, rounds, seed=0)


class Case:
    """A golden case, rebuilt: ``step`` has x_0 as its first batch and the given delta."""

    def __init__(self, name: str, **options: Any) -> None:
        self.case = case = golden("ibau")[name]
        size, generator = case["batch_size"], torch.Generator().manual_seed(case["seed"] + 1)
        images = [torch.rand(size, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(3)]
        labels = [torch.randint(0, 10, (size,), generator=generator) for _ in range(3)]
        assert [row.tolist() for row in labels] == case["labels"]
        delta = torch.randn(1, 3, 32, 32, generator=generator, dtype=torch.float64)
        optimizer = OptimizerConfig(case["outer_optimizer"].lower(), lr=case["outer_lr"], momentum=0.0)
        wanted: dict[str, Any] = {"K": case["K"], "optimizer": optimizer, **options}
        self.step = make_step(torch.cat(images), torch.cat(labels), size, case["seed"], **wanted)
        with torch.no_grad():
            self.step.delta.copy_(delta * (case["delta_norm"] / delta.norm()))
        self.batches = list(self.step.rounds.epoch(0))[:3]

    def outer(self, number: int) -> dict[str, Tensor]:
        images, labels, weights = self.step.rounds.padded(self.batches[number], number)
        patched = torch.zeros(len(labels), 1, 1, 1, dtype=torch.float64)
        patched[self.case["patched_rows"][number]] = 1
        return self.step.outer(images, labels, patched, weights)

    def inner(self, number: int) -> dict[str, Tensor]:
        images, _, weights = self.step.rounds.padded(self.batches[number], number)
        return self.step.inner(images, weights)

    def named(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip([name for name, _ in self.step.model.net.named_parameters()], tensors, strict=True))


def assert_all(found: dict[str, Tensor], expected: dict[str, Any], what: str) -> None:
    assert found.keys() == expected.keys()
    largest = max(norm for norm, _ in expected.values())
    for key, value in expected.items():
        norm, total = fingerprint(found[key])
        near = 1e-9 * value[0] + 1e-14 * largest
        assert norm == pytest.approx(value[0], rel=0, abs=near), f"{what} {key}: norm"
        assert total == pytest.approx(value[1], rel=1e-9, abs=near), f"{what} {key}: sum"


Change = Callable[..., Hypergradient]


def recorded_outer(case: Case, number: int, call: Change = hypergradient) -> tuple[Hypergradient, dict[str, Tensor]]:
    """What ``call`` gave for the hypergradient of an outer step, and the step's scalars."""
    found: list[Hypergradient] = []

    def record(*arguments: Any) -> Hypergradient:
        found.append(call(*arguments))
        return found[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "hypergradient", record)
        scalars = case.outer(number)
    return found[0], scalars


def check_first(case: Case, result: Hypergradient) -> None:
    expected = case.case
    assert_all(case.named(result.total), expected["hypergrad_batch1"], "hypergradient")
    assert_all(case.named(result.direct), expected["direct"], "direct term")
    assert len(result.iterates) == expected["K"]
    for k, (v, value) in enumerate(zip(result.iterates, expected["v"], strict=True), 1):
        assert_fingerprint(v, value, what=f"v_{k}")
    for v, key in ((result.iterates[0], "g_first8"), (result.iterates[-1], "vK_first8")):
        assert v.flatten()[:8].tolist() == pytest.approx(expected[key], rel=1e-9)
    bias = case.named(result.total)["classifier.bias"].tolist()
    assert bias == pytest.approx(expected["hypergrad_classifier_bias"], rel=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_two_outer_steps(name: str) -> None:
    case = Case(name)
    expected = case.case
    result, scalars = recorded_outer(case, 1)
    check_first(case, result)
    assert scalars["outer_loss"].item() == pytest.approx(expected["outer_loss"], rel=1e-9)
    for k, value in enumerate(expected["v"], 1):
        assert scalars[f"v{k}_norm"].item() == pytest.approx(value[0], rel=1e-9)
    for key, parts in (("direct_norm", result.direct), ("implicit_norm", result.implicit), ("grad_norm", result.total)):
        assert scalars[key].item() == pytest.approx(torch.cat([p.flatten() for p in parts]).norm().item(), rel=1e-12)
    weights = case.named([p.detach() for p in case.step.parameters])
    assert_all(weights, expected["params_after_batch1"], "weights")
    result, _ = recorded_outer(case, 2)
    assert_all(case.named(result.total), expected["hypergrad_batch2"], "second hypergradient")
    assert_all(weights, expected["params_after_batch2"], "weights after two steps")


def flipped_sign(*given: Any) -> Hypergradient:
    result = hypergradient(*given)
    return result._replace(implicit=[-part for part in result.implicit])


def no_direct_term(*given: Any) -> Hypergradient:
    result = hypergradient(*given)
    return result._replace(direct=[torch.zeros_like(part) for part in result.direct])


def one_product_fewer(*given: Any) -> Hypergradient:
    outer, inner, delta, parameters, _, step_size, penalty = given
    return hypergradient(outer, inner, delta, parameters, neumann(4, step_size), step_size, penalty)


def penalty_of_two_ranks(*given: Any) -> Hypergradient:
    outer, inner, delta, parameters, solver, step_size, penalty = given
    return hypergradient(outer, inner, delta, parameters, solver, step_size, 2 * penalty)


def inner_loss_descended(*given: Any) -> Hypergradient:
    outer, inner, *rest = given
    return hypergradient(outer, -inner, *rest)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sgd_k1", flipped_sign),
        ("sgd_k1", no_direct_term),
        ("sgd_k1", inner_loss_descended),
        ("adam_k5", one_product_fewer),
        ("adam_k5", penalty_of_two_ranks),
    ],
)
def test_the_numbers_catch(name: str, change: Change) -> None:
    case = Case(name)
    result, _ = recorded_outer(case, 1, change)
    with pytest.raises(AssertionError):
        check_first(case, result)


def test_the_numbers_catch_patched_clean_images() -> None:
    """Mutation: delta on every image of the batch."""
    case = Case("sgd_k1")
    case.case["patched_rows"][1] = list(range(8))
    with pytest.raises(AssertionError):
        check_first(case, recorded_outer(case, 1)[0])


@pytest.mark.parametrize("name", CASES)
def test_inner_trajectory(name: str) -> None:
    case = Case(name)
    with torch.no_grad():
        case.step.delta.zero_()
    for number, expected in enumerate(case.case["inner_trajectory"]):
        scalars = case.inner(number)
        assert_fingerprint(case.step.delta, expected, what=f"delta after inner step {number + 1}")
        assert scalars["delta_norm"].item() == pytest.approx(expected[0], rel=1e-9)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in case.step.parameters if p.grad is not None)


@pytest.mark.parametrize("options", [{"penalty": 0.0}, {"clamp": True}, {"inner": OptimizerConfig("sgd", lr=1.0)}])
def test_the_trajectory_catches(options: dict[str, Any]) -> None:
    case = Case("sgd_k1", **options)
    with torch.no_grad():
        case.step.delta.zero_()
    for number in range(3):
        case.inner(number)
    with pytest.raises(AssertionError):
        assert_fingerprint(case.step.delta, case.case["inner_trajectory"][-1])


@pytest.mark.parametrize("name", CASES)
def test_the_published_formulation(name: str) -> None:
    """bench/published, the bench's baseline, gives the published numbers too."""
    case = Case(name)
    expected, model, delta = case.case, case.step.model, case.step.delta.detach()
    kind = torch.optim.Adam if expected["outer_optimizer"] == "Adam" else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=expected["outer_lr"])
    batches = [(batch.images, batch.labels) for batch in case.batches]
    for number in (1, 2):
        patched = expected["patched_rows"][number]
        loss = reference.outer_step(model, optimizer, delta, batches[0], batches[number], patched, expected["K"])
        if number == 1:
            assert loss == pytest.approx(expected["outer_loss"], rel=1e-9)
        gradients = case.named([p.grad for p in model.parameters() if p.grad is not None])
        assert_all(gradients, expected[f"hypergrad_batch{number}"], "hypergradient")
        assert_all(case.named([p.detach() for p in model.parameters()]), expected[f"params_after_batch{number}"], "")
    fresh = Case(name)
    found = reference.inner_pass(fresh.step.model, [(b.images, b.labels) for b in fresh.batches], delta.device)
    assert_fingerprint(found, expected["inner_trajectory"][-1])


def test_the_published_round() -> None:
    """It updates once per batch and counts the images that the model classifies as their label."""
    case = Case("sgd_k1")
    model, device = case.step.model, case.step.delta.device
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batches = [(batch.images, batch.labels) for batch in case.batches]
    before = [p.detach().clone() for p in model.parameters()]
    acc, asr = reference.unlearn_round(model, optimizer, batches, batches[:1], batches[1:], device, portion=0.25)
    with torch.no_grad():
        hits = [(model(images).argmax(1) == labels).double().mean().item() for images, labels in batches]
    assert (acc, asr) == pytest.approx((hits[0], (hits[1] + hits[2]) / 2))
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
