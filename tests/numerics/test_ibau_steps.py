"""Steps of I-BAU against the published code's float64 numbers, and what each number would catch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_defend.batch import Batch
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine import dist
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.methods.ibau import step as module
from dist_defend.methods.ibau.options import Config
from dist_defend.methods.ibau.rounds import Rounds
from dist_defend.methods.ibau.step import UnlearningStep
from dist_defend.models.classifier import build_classifier
from tests.numerics.det import assert_fingerprint, det_init, fingerprint, golden

CASES = tuple(golden("ibau"))
NOWHERE = DatasetConfig("nowhere")


@dataclass
class InMemory:
    """Stands for a loader: all images and labels, in order, one rank."""

    images: Tensor
    labels: Tensor
    batch_size: int

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    @property
    def num_batches(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        for part in torch.arange(self.num_samples).split(self.batch_size)[start_batch:]:
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


@pytest.mark.parametrize("name", CASES)
def test_two_outer_steps(name: str) -> None:
    case, recorded = Case(name), []
    original = module.hypergradient

    def record(*arguments: Any) -> Any:
        recorded.append(original(*arguments))
        return recorded[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "hypergradient", record)
        expected = case.case
        for number in (1, 2):
            scalars = case.outer(number)
            assert_all(case.named(recorded[-1].total), expected[f"hypergrad_batch{number}"], "hypergradient")
            weights = [p.detach() for p in case.step.parameters]
            assert_all(case.named(weights), expected[f"params_after_batch{number}"], "weights")
            if number == 1:
                assert scalars["outer_loss"].item() == pytest.approx(expected["outer_loss"], rel=1e-9)
                assert_all(case.named(recorded[0].direct), expected["direct"], "direct term")
    first = recorded[0].iterates
    assert len(first) == expected["K"]
    for v, value in zip(first, expected["v"], strict=True):
        assert_fingerprint(v, value)
