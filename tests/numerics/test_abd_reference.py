"""bench/published/zskt.py computes what illidanlab/ABD computed, and the package follows it step by step."""

import copy
from typing import Any

import pytest
import torch

from dist_defend.bench import zskt as bench
from dist_defend.bench.published import zskt
from dist_defend.bench.runner import Case as BenchCase
from dist_defend.engine import dist
from tests.numerics.abd_case import Case, weights
from tests.numerics.det import assert_fingerprint


def players(case: Case) -> zskt.Players:
    members = copy.deepcopy(case.step().vaccine.ensemble.members) if "sv" in case.case["mode"] else []  # type: ignore[union-attr]
    generator, student, teacher = models = case.generator, case.student, case.teacher
    for model in models:
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    makes, learns = torch.optim.Adam(generator.parameters(), 1e-3), torch.optim.Adam(student.parameters(), 2e-3)
    members = [member.requires_grad_(True) for member in members]
    return zskt.Players(generator, student, teacher, makes, learns, members)


@pytest.mark.parametrize("mode", ["base", "svsr"])
def test_published_pseudo_batches(mode: str) -> None:
    case = Case(mode)
    taught, rows, losses = players(case), case.case["patched_rows"], []
    case.teacher.requires_grad_(True)
    case.student.train()
    optimizers = (taught.generator_optimizer, taught.student_optimizer)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2) for optimizer in optimizers]
    for number, z in enumerate(case.z):
        plan = None
        if rows:
            own = rows[4 * number : 4 * number + 4]
            plan = zskt.Retrospection(case.start, own[::2], own[1::2], rounds=3)
        losses += zskt.pseudo_batch(taught, z, 2, plan)[1]
        for schedule in schedules:
            schedule.step()
    assert losses == pytest.approx(case.case["student_loss"], rel=1e-9)
    for name, value in case.case["student_after"].items():
        assert_fingerprint(weights(case.student)[name], value, what=name)
    for name, value in case.case["generator_after"].items():
        assert_fingerprint(weights(case.generator)[name], value, what=name)


@pytest.mark.parametrize("name", bench.DEFENCES)
def test_the_benched_sides_are_one_trajectory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "STUDENT_STEPS", 3)
    monkeypatch.setattr(bench, "TEACHER", "wrn_10_1")
    pair = bench.Pair(BenchCase(name, "wrn_10_1", 6, 6), dist.start("fp64", None), bench.DEFENCES[name])
    for number in range(2):
        assert pair.ours(number) == pytest.approx(pair.theirs(number), rel=1e-10)
    students: tuple[Any, Any] = (pair.step.student, pair.players.student)
    for ours, theirs in (students, (pair.step.generator, pair.players.generator)):
        found = dict(theirs.named_parameters())
        for key, value in ours.named_parameters():
            torch.testing.assert_close(value, found[key], rtol=0, atol=1e-9 * value.abs().max().item(), msg=key)
