"""Model inversion against the published formulation, iteration by iteration in float64, and what is kept of it."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_defend.config import load_experiment
from dist_defend.data.draws import draw
from dist_defend.engine import dist
from dist_defend.engine.context import Context
from dist_defend.engine.step import Position
from dist_defend.methods.defend import cmi
from dist_defend.methods.defend.cmi import inversion, synthesis
from dist_defend.methods.defend.cmi.memory import ImagePool, MemoryBank
from dist_defend.methods.defend.cmi.steps import CmiBatches, CmiStep
from dist_defend.methods.defend.cmi.synthesis import Synthesis, reset
from dist_defend.models.generator import CMIGenerator
from dist_defend.models.wide_resnet import WideResNet
from dist_defend.ops.losses import divergence_rows
from tests.reference.cmi import NormHook, iteration
from tests.runs import CLASSES, SIZE, make_classifier, make_data, make_experiment

ITERATIONS = 3
SECTION = {
    "batch_size": 6, "iterations": ITERATIONS, "lr": 0.01, "width": 4, "latent_dim": 5,
    "bn": 0.7, "one_hot": 0.9, "adversarial": 0.5,
    "contrast": {"negatives": 5, "bank_size": 10, "dim": 4, "weight": 0.8, "temperature": 0.1, "lr": 0.01},
}  # fmt: skip


def make_step(folder: Path, **changes: Any) -> CmiStep:
    """Of a built plan, in float64; so that numbers can be compared."""
    options = {
        "teacher": make_classifier(folder / "teacher", arch="wrn_10_1"),
        "test": {"path": make_data(folder / "test", 6, seed=1)},
        "student": "wrn_10_1",
        "synthesis": SECTION,
        "distillation_steps": 2,
        "update": {"batch_size": 4, "epochs": 4},
        **changes,
    }
    config = load_experiment(make_experiment(folder, "cmi", options))
    context = Context(dist.start("fp64", None), 3, config.loader, folder / "run", config.method)
    step = cmi.build(config.options, context).stages[0].step
    assert isinstance(step, CmiStep)
    return step


@torch.no_grad()
def make_opinionated(ours: Synthesis) -> None:
    """A teacher that gives images several classes, and a student that agrees on some of them, with other odds."""
    teacher, student = ours.pair.teacher, ours.pair.student
    ours._restart(0)
    x = teacher.normalize(ours.generator(ours.codes[ours.own]))
    teacher.get_parameter("net.fc.weight").mul_(200)
    teacher.get_parameter("net.fc.bias").sub_(teacher.net(x).mean(0))
    student.load_state_dict(teacher.state_dict())
    student.get_parameter("net.fc.weight").mul_(0.5)
    student.get_parameter("net.fc.bias")[1] += 0.06
    agree = teacher.net(x).argmax(1) == student.eval().net(x).argmax(1)
    assert agree.any() and not agree.all()


def compare(folder: Path, epochs: int = 3) -> None:
    """All iterations of some epochs against the reference; AssertionError where they differ."""
    step = make_step(folder)
    ours, pair = step.synthesis, step.pair
    make_opinionated(ours)
    pair.student.eval()
    batches = CmiBatches(step.config, CLASSES, 3, pair.context.ranks)
    teacher = copy.deepcopy(pair.teacher)
    hooks = [NormHook(module) for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    head = copy.deepcopy(ours.projection.layers)
    head_optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    bank = torch.zeros(0, ours.bank.rows.shape[1], dtype=torch.float64)
    for epoch in range(epochs):
        chosen: list[Tensor] = []
        best = math.inf, torch.empty(0), torch.empty(0)
        for number, batch in enumerate(batches.epoch(epoch)):
            if number == ITERATIONS:
                break
            if number == 0:
                ours._restart(epoch)
                generator, codes = copy.deepcopy(ours.generator), ours.codes.detach().clone().requires_grad_()
                optimizer = torch.optim.Adam([*generator.parameters(), codes], lr=0.01, betas=(0.5, 0.999))
            places = epoch * ITERATIONS + number
            views = [
                torch.from_numpy(draw(3, places, np.arange(6), view, config, SIZE, SIZE)).double()
                for view, config in enumerate((ours.config.global_view, ours.config.local_view))
            ]
            chosen.append(ours._earlier(places))
            weights = {"bn": 0.7, "one_hot": 0.9, "adversarial": 0.5, "contrast": 0.8}
            expected, images, features = iteration(
                generator, codes, head, teacher, pair.student, batch.labels, (views[0], views[1]), chosen[-1], weights,
                0.1, 4, hooks, (optimizer, head_optimizer),
            )  # fmt: skip
            found = ours(batch, Position(epoch=epoch, batch=number))
            for name, value in expected.items():
                assert found[name].item() == pytest.approx(value, rel=1e-9), f"{name} of {epoch}, {number}"
            for name, value in generator.state_dict().items():
                torch.testing.assert_close(ours.generator.state_dict()[name], value, rtol=1e-8, atol=1e-9)
            torch.testing.assert_close(ours.codes.detach(), codes.detach(), rtol=1e-8, atol=1e-9)
            for mine, theirs in zip(ours.projection.parameters(), head.parameters(), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
            best = min(best, (expected["synthesis_loss"], images, features), key=lambda kept: kept[0])
        levels = (best[1] * 255).to(torch.uint8).permute(0, 2, 3, 1)
        assert torch.equal(ours.pool.images[epoch * 6 : epoch * 6 + 6], levels)
        bank = torch.cat([bank, best[2]])
        held = ours.bank.rows[: ours.bank.filled]
        assert all((held - row).abs().max(1).values.min() < 1e-9 for row in bank[-10:])
        assert all(len(rows) == min(5, 6 * epoch) for rows in chosen)


def test_iterations_are_the_published_ones(tmp_path: Path) -> None:
    compare(tmp_path)


def squared_norms(patch: pytest.MonkeyPatch) -> None:
    norm = Tensor.norm

    def squared(self: Tensor, *how: Any, **more: Any) -> Tensor:
        return norm(self, *how, **more) if how or more else self.square().sum()

    patch.setattr(Tensor, "norm", squared)


def unbiased_variance(patch: pytest.MonkeyPatch) -> None:
    original = torch.var_mean
    patch.setattr(torch, "var_mean", lambda x, dims, correction: original(x, dims, correction=1))


def all_images_disagree(patch: pytest.MonkeyPatch) -> None:
    """Pushes student and teacher apart wherever they are."""
    patch.setattr(synthesis, "disagreement", lambda teacher, student: divergence_rows(student, teacher).sum())


def reversed_divergence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(inversion, "divergence_rows", lambda logits, target: divergence_rows(target, logits))


def columns_with_gradient(patch: pytest.MonkeyPatch) -> None:
    def leaky(*given: Any) -> Tensor:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(torch, "no_grad", torch.enable_grad)
            return inversion.contrast(*given)

    patch.setattr(synthesis, "contrast", leaky)


def worst_iteration(patch: pytest.MonkeyPatch) -> None:
    """The images with the largest loss."""
    keep = Synthesis._keep_if_better
    patch.setattr(Synthesis, "_keep_if_better", lambda self, loss, *kept: keep(self, -loss, *kept))


def views_swapped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(synthesis, "contrast", lambda p, local, whole, *rest: inversion.contrast(p, whole, local, *rest))


@pytest.mark.parametrize(
    "mutate",
    [squared_norms, unbiased_variance, all_images_disagree, reversed_divergence, columns_with_gradient,
     worst_iteration, views_swapped],
)  # fmt: skip
def test_the_comparison_catches(mutate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        compare(tmp_path)


def test_features_of_a_wrn_16_2() -> None:
    net = WideResNet(16, 2, 10).eval()
    norms = inversion.batch_norms(net)
    assert sum(norm.num_features for norm in norms) == 912
    with inversion.norm_inputs(norms) as inputs:
        net(torch.rand(2, 3, 32, 32))
    assert inversion.features(inputs).shape == (2, 912)
    net(torch.rand(2, 3, 32, 32))
    assert len(inputs) == len(norms) == 13  # the hooks are gone


def test_statistics_that_agree_have_no_distance() -> None:
    norm, x = nn.BatchNorm2d(3).double(), torch.randn(5, 3, 4, 4, dtype=torch.float64)
    norm.running_mean, norm.running_var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    assert inversion.statistics_distance([norm], [x]).item() < 1e-14
    assert inversion.statistics_distance([norm], [x + 2]).item() == pytest.approx(2 * math.sqrt(3))


@pytest.mark.parametrize("earlier", [0, 7])
def test_rows_that_are_all_alike_cannot_be_told_apart(earlier: int) -> None:
    rows = torch.ones(6, 4, dtype=torch.float64)
    loss = inversion.contrast(nn.Identity(), rows, rows, torch.ones(earlier, 8).double(), 6, 0.1)
    assert loss.item() == pytest.approx(math.log(6 + earlier) * (2 if earlier else 1), rel=1e-12)
    sharp = inversion.contrast(nn.Identity(), torch.eye(6).double(), torch.eye(6).double(), torch.ones(0, 12), 6, 0.01)
    assert sharp.item() < 1e-9


def test_the_bank_is_a_ring() -> None:
    bank = MemoryBank(10, 2, torch.device("cpu"), torch.float64)
    for number in range(4):
        assert bank.filled == min(10, 4 * number)
        bank.add(torch.full((4, 2), float(number)).double())
    assert bank.rows[:, 0].tolist() == [2, 2, 3, 3, 3, 3, 1, 1, 2, 2]
    other = MemoryBank(10, 2, torch.device("cpu"), torch.float64)
    other.load_state_dict(bank.state_dict())
    for one in (bank, other):
        one.add(torch.full((3, 2), 9.0).double())
    assert torch.equal(bank.rows, other.rows) and bank.rows[6:9, 0].tolist() == [9, 9, 9]


def test_the_pool_truncates() -> None:
    levels = torch.tensor([0.0, 0.999 / 255, 1 / 255, 254.999 / 255, 1.0, 0.5], dtype=torch.float64)
    pool = ImagePool(6, 2, torch.device("cpu"))
    for part in levels.split(4):
        pool.add(part[:, None, None, None].expand(-1, 3, 2, 2))
    assert pool.images[:, 1, 0, 2].tolist() == [0, 0, 1, 254, 255, 127]


def test_a_reset_generator_is_fresh_noise() -> None:
    generator = CMIGenerator(256, 32, 64)
    reset(generator, torch.Generator().manual_seed(0))
    for module in generator.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1) and abs(module.weight.mean()) < 1e-3
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1, abs=0.01) and 0.01 < module.weight.std() < 0.03
        bias = getattr(module, "bias", None)
        assert bias is None or not bias.any()
    before = [p.clone() for p in generator.parameters()]
    reset(generator, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(before, generator.parameters(), strict=True))
