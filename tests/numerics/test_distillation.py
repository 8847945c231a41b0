"""Clean and OOD distillation against formulas written out, in float64; both with mutations."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_defend.batch import Batch
from dist_defend.config import load_experiment
from dist_defend.engine import dist
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.step import GradientStep, Position
from dist_defend.methods.defend import kd, ood
from dist_defend.methods.defend.abd.retrospection import SelfRetrospection
from dist_defend.methods.defend.abd.retrospective_step import RetrospectiveStep
from dist_defend.methods.defend.ood import SelectingStep
from dist_defend.ops import hypergrad
from dist_defend.ops.losses import distillation
from tests.numerics.det import det_images
from tests.runs import CLASSES, SIZE, make_classifier, make_data, make_experiment

SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.0}
RETROSPECTION = {
    "start": 1, "inner_rounds": 2, "inner_lr": 0.1, "synthesis_penalty": 0.0, "detach_reference": False,
    "patched_fraction": 0.5, "K": 3, "step_size": 0.3, "penalty": 0.05, "restart_lr": 0.1,
}  # fmt: skip


def plan_of(method: Any, folder: Path, **changes: Any) -> Plan:
    name = method.__name__.rpartition(".")[2]
    options = {
        "teacher": make_classifier(folder / "teacher", arch="wrn_10_1"),
        "data": {"path": make_data(folder / "data", 16)},
        "test": {"path": make_data(folder / "test", 6, seed=1)},
        "student": "wrn_10_1",
        "update": {"batch_size": 4, "epochs": 2, "optimizer": SGD},
        **changes,
    }
    config = load_experiment(make_experiment(folder, name, options))
    context = Context(dist.start("fp64", None), 3, config.loader, folder / "run", config.method)
    plan: Plan = method.build(config.options, context)
    return plan


def batch_of(seed: int, count: int = 4) -> Batch:
    images = (0.5 + 0.25 * det_images((count, 3, SIZE, SIZE), seed)).clamp(0, 1)
    return Batch(
        (images.contiguous(memory_format=torch.channels_last),), torch.arange(count) % CLASSES, torch.arange(count)
    )


def kl_rows(student: Tensor, teacher: Tensor, temperature: float) -> list[float]:
    """Of each image, summed over the classes, with exponentials on the host."""
    rows = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = ([math.exp(x / temperature) for x in logits] for logits in (t, s))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        rows.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return rows


def test_the_divergences_conventions() -> None:
    student, teacher = det_images((5, 4), 1), det_images((5, 4), 2)
    rows = kl_rows(student, teacher, 3.0)
    assert distillation(student, teacher, 3.0).item() == pytest.approx(np.mean(rows) / 4, rel=1e-12)
    assert distillation(student, teacher, 3.0, "batchmean").item() == pytest.approx(9 * np.mean(rows), rel=1e-12)
    assert distillation(student, student, 3.0).item() == pytest.approx(0, abs=1e-15)
    shares = [distillation(student[part], teacher[part], 3.0, batch_size=5) for part in (slice(2), slice(2, 5))]
    assert sum(shares).item() == pytest.approx(np.mean(rows) / 4, rel=1e-12)  # type: ignore[union-attr]


def check_kd(folder: Path) -> None:
    step = plan_of(kd, folder, temperature=6.0, alpha=0.9).stages[0].step
    assert isinstance(step, GradientStep) and isinstance(step.objective, kd.DistillationObjective)
    student, batch = step.objective.student, batch_of(3)
    with torch.no_grad():
        logits, wanted = student.train()(batch.images), step.objective.taught(batch.images)
    odds = logits.softmax(1)[torch.arange(4), batch.labels].log()
    kl = np.mean(kl_rows(logits, wanted, 6.0)) / CLASSES
    found = step(batch, Position())
    assert found["kl"].item() == pytest.approx(kl, rel=1e-9)
    assert found["loss"].item() == pytest.approx(0.9 * 36 * kl - 0.1 * odds.mean().item(), rel=1e-9)


def test_clean_distillation(tmp_path: Path) -> None:
    check_kd(tmp_path)


def test_clean_distillation_notices_a_student_that_teaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kd, "distillation", lambda s, t, temperature: distillation(t, s, temperature))
    with pytest.raises(AssertionError):
        check_kd(tmp_path)


def check_suspects(folder: Path) -> None:
    """The vaccine's form without a generator, on a batch of which some images are suspects."""
    step = plan_of(ood, folder, temperature=8.0, vaccine={"members": 1, "layers": 1, "weight": 0.3}).stages[0].step
    assert isinstance(step, SelectingStep)
    update, vaccine = step.update, step.vaccine
    assert isinstance(update.objective, ood.OodObjective)
    batch = batch_of(4, 12)
    with torch.no_grad():
        logits = update.objective.student.train()(batch.images)
        wanted, shuffled = vaccine.ensemble(step.pair.teacher.normalize(batch.images))
        torch.testing.assert_close(wanted, step.pair.teacher(batch.images), rtol=1e-12, atol=1e-12)
    suspect = [t.index(max(t)) == s.index(max(s)) for t, s in zip(wanted.tolist(), shuffled.tolist(), strict=True)]
    rows = kl_rows(logits, wanted, 8.0)
    others = [row / CLASSES for row, is_suspect in zip(rows, suspect, strict=True) if not is_suspect]
    suspects = [row / CLASSES for row, is_suspect in zip(rows, suspect, strict=True) if is_suspect]
    expected = (np.mean(others) if others else 0) - 0.3 * (np.mean(suspects) if suspects else 0)
    found = step(batch, Position())
    assert found["suspects"].item() == pytest.approx(len(suspects) / 12)
    assert found["loss"].item() == pytest.approx(expected, rel=1e-9)
    assert math.isfinite(found["grad_norm"].item())


def test_suspects_are_pushed_away(tmp_path: Path) -> None:
    check_suspects(tmp_path)


@pytest.mark.parametrize("everyone", [True, False])
def test_a_batch_of_suspects_only_or_without_any(
    everyone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ood, "agreement", lambda teacher, shuffled: torch.full((len(teacher),), everyone))
    step = plan_of(ood, tmp_path, vaccine={"weight": 0.3}).stages[0].step
    found, plain = (
        step(batch_of(4), Position()),
        plan_of(ood, tmp_path / "plain").stages[0].step(batch_of(4), Position()),
    )
    assert found["loss"].item() == pytest.approx(plain["loss"].item() * (-0.3 if everyone else 1), rel=1e-9)


def no_weight(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ood, "agreement", lambda teacher, shuffled: torch.zeros(len(teacher)))


def everyone_counts(patch: pytest.MonkeyPatch) -> None:
    """Both means over the whole batch."""
    patch.setattr(ood, "all_reduce_sum", lambda counts: counts.sum().expand(2))


@pytest.mark.parametrize("mutate", [no_weight, everyone_counts])
def test_the_comparison_catches(mutate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check_suspects(tmp_path)


def retrospective_gradients(folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """What one SGD step of the second stage takes off the weights over its rate; the same by plain autograd."""
    plan = plan_of(ood, folder, temperature=2.0, retrospection=RETROSPECTION)
    step = plan.stages[1].step
    assert isinstance(step, RetrospectiveStep)
    pair, batch = step.pair, batch_of(5)
    student, teacher = pair.student.train(), pair.teacher
    parameters = list(student.parameters())
    start = step.retrospection.start(SIZE, 0)
    rows = step.retrospection.patched(slice(4), 0)
    before = [p.detach().clone() for p in parameters]
    x = student.normalize(batch.images)

    def divergence(logits: Tensor, reference: Tensor) -> Tensor:
        p, q = (reference / 2).softmax(1), (logits / 2).softmax(1)
        return (p * (p.log() - q.log())).mean()

    delta = start.clone().requires_grad_()
    adam = torch.optim.Adam([delta], lr=0.1)
    wanted = teacher.net(x).detach()
    for _ in range(2):
        adam.zero_grad()
        (-divergence(teacher.net(x + delta), wanted)).backward()
        adam.step()
    delta = delta.detach().requires_grad_()
    logits = student.net(x)
    loss = divergence(logits, wanted)
    outer = divergence(student.net(x + rows * delta), logits)
    inner = -divergence(student.net(x + delta), logits.detach()) + 0.05 * delta.square().sum()
    mapped = delta - 0.3 * torch.autograd.grad(inner, delta, create_graph=True)[0]
    (g,) = torch.autograd.grad(outer, delta, retain_graph=True)
    v = torch.zeros_like(g)
    for _ in range(3):
        v = torch.autograd.grad(mapped, delta, v, retain_graph=True)[0] + g
    parts = (
        torch.autograd.grad(loss, parameters, retain_graph=True),
        torch.autograd.grad(outer, parameters, retain_graph=True),
        torch.autograd.grad(mapped, parameters, v),
    )
    expected = [a + b + c for a, b, c in zip(*parts, strict=True)]
    assert step.perturbation() is None
    student.train()
    step(batch, Position())
    statistics = [buffer.clone() for buffer in student.buffers()]
    torch.testing.assert_close(step.perturbation(), delta.detach(), rtol=1e-9, atol=1e-12)
    assert all(map(torch.equal, statistics, student.buffers()))
    return [(a - b.detach()) / 0.1 for a, b in zip(before, parameters, strict=True)], expected


def assert_gradients(found: list[Tensor], expected: list[Tensor]) -> None:
    norm = torch.nn.utils.get_total_norm(expected).item()
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine - theirs).abs().max().item() <= 1e-9 * norm


def test_retrospection_adds_its_hypergradient(tmp_path: Path) -> None:
    assert_gradients(*retrospective_gradients(tmp_path))


def no_products(patch: pytest.MonkeyPatch) -> None:
    """v_K = g."""
    patch.setattr("dist_defend.methods.defend.abd.retrospection.neumann", lambda k, eta: hypergrad.neumann(1, eta))


def detached_reference(patch: pytest.MonkeyPatch) -> None:
    original = SelfRetrospection.hypergradient

    def detached(self: SelfRetrospection, x: Tensor, logits: Tensor, *rest: Tensor) -> Any:
        return original(self, x, logits.detach(), *rest)

    patch.setattr(SelfRetrospection, "hypergradient", detached)


@pytest.mark.parametrize("mutate", [no_products, detached_reference])
def test_the_gradients_comparison_catches(mutate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        assert_gradients(*retrospective_gradients(tmp_path))
