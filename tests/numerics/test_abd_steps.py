"""ZSKT with ABD against the published code's float64 numbers, and what each number would catch."""

import functools
import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_defend.engine import dist
from dist_defend.engine.update import Update
from dist_defend.methods.defend.abd import retrospection, vaccine
from dist_defend.methods.defend.abd.epochs import Later
from dist_defend.methods.defend.abd.options import VaccineConfig
from dist_defend.methods.defend.zskt import step as zskt
from dist_defend.methods.defend.zskt.step import TransferStep
from dist_defend.models.batch_statistics import repeated_statistics
from dist_defend.ops import hypergrad
from dist_defend.ops.losses import distillation
from tests.numerics.abd_case import MODES, Case, weights
from tests.numerics.det import assert_fingerprint
from tests.steps import positions

Row = dict[str, float]


class Trace:
    """A run of a case: scalars of every generator step, delta synthesis and student step, in order."""

    def __init__(self, case: Case, batches: int = 2) -> None:
        self.made: list[Row] = []
        self.learned: list[Row] = []
        self.hypergradients: list[float] = []
        self.divergences: list[float] = []  # of every pass that the generator's loss function sees
        step = case.step()
        _record(step, "make", self.made)
        _record(step, "learn", self.learned)
        if step.retrospection is not None:
            self._watch(step.retrospection, case)
        for at, batch in zip(positions(), case.batches()[:batches], strict=False):
            step(batch, at)

    def _watch(self, found: retrospection.SelfRetrospection, case: Case) -> None:
        divergence, hypergradient, after_update = found.divergence, found.hypergradient, found.after_update

        def diverge(*logits: Tensor) -> Tensor:
            value = divergence(*logits)
            self.divergences.append(value.item())
            return value

        def differentiate(*given: Any) -> Any:
            result = hypergradient(*given)
            self.hypergradients.append(torch.nn.utils.get_total_norm(result[0].total).item())
            return result

        def diagnose(images: Tensor, delta: Tensor, patched: Tensor) -> None:
            after_update(images, delta, case.diagnosed(*divmod(len(self.hypergradients) - 1, 2)))

        found.divergence = diverge
        found.hypergradient = differentiate  # type: ignore[method-assign, assignment]
        found.after_update = diagnose  # type: ignore[method-assign]


def _record(step: zskt.TransferStep, name: str, rows: list[Row]) -> None:
    call = getattr(step, name)

    def recorded(*inputs: Tensor) -> dict[str, Tensor]:
        scalars: dict[str, Tensor] = call(*inputs)
        rows.append({key: value.item() for key, value in scalars.items()})
        return scalars

    setattr(step, name, recorded)


def check(mode: str, batches: int = 2, **changes: Any) -> None:
    """Run so many pseudo-batches of a case and compare all that is known of them; the weights only after both."""
    case = Case(mode, **changes)
    trace, golden, is_defended = Trace(case, batches), case.case, "sr" in mode

    def known(key: str, per_batch: int) -> Any:
        return pytest.approx(golden[key][: per_batch * batches], rel=1e-9, abs=1e-16)

    assert [row["student_loss"] for row in trace.learned] == known("student_loss", 2)
    norms = []
    for number, made in enumerate(trace.made):
        unclipped = [] if is_defended else trace.learned[2 * number : 2 * number + 2]
        norms += [made["generator_grad_norm"], *(row["student_grad_norm"] for row in unclipped)]
    assert norms == known("grad_norm_before_clip", 1 if is_defended else 3)
    assert [-0.1 * row["suppression"] for row in trace.made if "suppression" in row] == known("vaccine_loss", 1)
    assert trace.hypergradients == known("hypergrad_norm", 2)
    assert [row["delta_norm"] for row in trace.learned if is_defended] == known("delta_norm", 2)
    _check_divergences(trace, golden["generator_loss"], is_defended)
    for found, key in ((case.student, "student_after"), (case.generator, "generator_after")) if batches == 2 else ():
        state = weights(found)
        assert state.keys() == golden[key].keys()
        for name, value in golden[key].items():
            assert_fingerprint(state[name], value, what=f"{key} {name}")


def _check_divergences(trace: Trace, published: list[float], is_defended: bool) -> None:
    """The generator's; those that synthesise delta, once instead of for both student steps; outer and inner loss.

    Values near 1e-6 are differences of numbers near 1, so they are known to 1e-16 or so. The published diagnostic after
    each student step has no counterpart.
    """
    length = 13 if is_defended else 1
    for number, made in enumerate(trace.made):
        mine = [made["generator_loss"] + 0.1 * made.get("suppression", 0.0)]
        theirs = published[length * number : length * (number + 1)]
        if is_defended:
            mine += [-value for value in trace.divergences[7 * number : 7 * number + 7]]
            assert theirs[1:4] == theirs[7:10]
            theirs = [*theirs[:6], *theirs[10:12]]
        assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-16)


@pytest.mark.parametrize("mode", MODES)
def test_two_pseudo_batches(mode: str) -> None:
    check(mode)


Mutation = Callable[[pytest.MonkeyPatch], None]


def temperature_squared(patch: pytest.MonkeyPatch) -> None:
    """The usual convention: mean over images only."""
    patch.setattr(zskt, "distillation", functools.partial(distillation, convention="batchmean"))


def divergence_reversed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(zskt, "distillation", lambda s, t, *given, **named: distillation(t, s, *given, **named))


def stale_images(patch: pytest.MonkeyPatch) -> None:
    """The student sees the images of before the generator's update."""
    original = Update.step

    def later(self: Any, gradients: Any, max_norm: Any) -> Any:
        if len(self.parameters) == 16:  # the generator
            return torch.nn.utils.get_total_norm(gradients), torch.zeros(())
        return original(self, gradients, max_norm)

    patch.setattr(Update, "step", later)


def attention_of_sums(patch: pytest.MonkeyPatch) -> None:
    """Attention that is not normalised."""
    patch.setattr(zskt, "unit_attention", lambda features: features.square().mean(1).flatten(1))


def one_update_of_the_statistics(patch: pytest.MonkeyPatch) -> None:
    """The generator's running statistics see its images once, not once per student step."""
    patch.setattr(zskt, "repeated_statistics", lambda model, times: repeated_statistics(model, min(times, 1)))


def everything_is_suspect(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(vaccine, "agreement", lambda teacher, shuffled: torch.ones(len(teacher), dtype=torch.bool))


def suppression_without_the_teacher(patch: pytest.MonkeyPatch) -> None:
    """No gradient through the teacher's own logits."""
    original = vaccine.mean_divergence
    patch.setattr(vaccine, "mean_divergence", lambda teacher, shuffled: original(teacher.detach(), shuffled))


def one_product_fewer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(retrospection, "neumann", lambda steps, size: hypergrad.neumann(steps - 1, size))


def no_implicit_part(patch: pytest.MonkeyPatch) -> None:
    def direct(*given: Any) -> hypergrad.Hypergradient:
        result = hypergrad.hypergradient(*given)
        return result._replace(implicit=[torch.zeros_like(part) for part in result.implicit])

    patch.setattr(retrospection, "hypergradient", direct)


@pytest.mark.parametrize(
    ("mode", "mutate", "batches"),
    [
        ("base", temperature_squared, 1),
        ("base", divergence_reversed, 1),
        ("base", stale_images, 1),
        ("base", attention_of_sums, 1),
        ("base", one_update_of_the_statistics, 2),
        ("sv", everything_is_suspect, 1),
        ("sv", suppression_without_the_teacher, 1),
        ("sr", one_product_fewer, 1),
        ("sr", no_implicit_part, 1),
    ],
)
def test_the_numbers_catch(mode: str, mutate: Mutation, batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check(mode, batches)


@pytest.mark.parametrize(
    ("mode", "batches", "changes"),
    [
        ("base", 1, {"attention": 249.0}),
        ("base", 1, {"max_grad_norm": 1.0}),
        ("base", 2, {"pseudo_batches": 3}),
        ("sr", 1, {"retrospection": {"inner_rounds": 4}}),
        ("sr", 1, {"retrospection": {"synthesis_penalty": 0.0}}),
        ("sr", 1, {"retrospection": {"perturbs": "student"}}),
    ],
)
def test_the_numbers_catch_options(mode: str, batches: int, changes: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        check(mode, batches, **changes)


def test_clean_statistics_change_nothing_else() -> None:
    """Only the running statistics tell whether perturbed images moved them."""
    states = []
    for statistics in ("published", "clean"):
        case = Case("sr", retrospection={"statistics": statistics})
        Trace(case, batches=1)
        states.append(weights(case.student))
    for name, value in states[0].items():
        is_statistic = "running" in name
        assert torch.allclose(states[1][name], value, rtol=0, atol=1e-12) != is_statistic, name


def test_dropout_of_a_student_is_off() -> None:
    case = Case("base")
    case.student.block3.layer.append(nn.Dropout(0.5))
    assert Trace(case, 1).learned[0]["student_loss"] == pytest.approx(case.case["student_loss"][0], rel=1e-9)


def test_a_vaccine_is_selected_by_the_batches_from_the_generators_plus_the_students_steps_on() -> None:
    """Published: iterations n with n_generator + n_student <= n < P, each draft once and the last images so often."""
    case = Case("sv", pseudo_batches=9, generator_steps=2, student_steps=1, vaccine=VaccineConfig(selection_batches=5))
    step = TransferStep(case.teacher, case.student, case.generator, case.config, dist.start("fp64", None), seed=0)
    assert step.vaccine is not None
    kept: list[tuple[int, float]] = []
    keep, selected = step.vaccine.keep, []

    def watch(images: Tensor, weight: float = 1.0) -> None:
        kept.append((at.epoch, weight))
        keep(images, weight)

    def select() -> None:
        selected.append(at.epoch)
        step.vaccine.decision = "accepted"  # type: ignore[union-attr]

    step.vaccine.keep, step.vaccine.select = watch, select  # type: ignore[method-assign]
    nothing = {"nonfinite": torch.zeros(())}  # of the updates themselves
    step.make = step.learn = lambda *given: dict(nothing)  # type: ignore[assignment]
    (batch, _) = case.batches()
    for at in islice(positions(), 7):
        step(batch, at)
    assert kept == [(3, 1.0), (3, 1.0), (3, 1), (4, 1.0), (4, 1.0), (4, 1)]
    assert selected == [5]


def test_self_retrospection_starts_on_time_afresh_and_on_other_images_each_step() -> None:
    """Published: a checkpoint is resumed with a fresh Adam, cosine over the batches that are left; G goes on."""
    case = Case("sr", pseudo_batches=6, retrospection={"start": 2, "restart_lr": 5e-4})
    step = TransferStep(case.teacher, case.student, case.generator, case.config, dist.start("fp64", None), seed=0)
    nothing = {"nonfinite": torch.zeros(())}  # of the updates themselves
    patched: list[tuple[int, list[float]]] = []
    forgotten: list[int] = []
    rates: dict[str, list[float]] = {name: [] for name in step.players}

    def learn(*given: Tensor) -> dict[str, Tensor]:
        patched.extend((at.epoch, mask.flatten().tolist()) for mask in given)
        return dict(nothing)

    step.make = step.perturb = lambda *given: dict(nothing)  # type: ignore[assignment]
    step.learn = learn  # type: ignore[assignment]
    step.players["student"].forget = lambda: forgotten.append(at.epoch)  # type: ignore[method-assign]
    (batch, _) = case.batches()
    for at in islice(positions(), 6):
        step(batch, at)
        for name, player in step.players.items():
            rates[name].append(player.rate)
    assert [number for number, _ in patched] == [n for n in range(2, 6) for _ in range(2)]  # two student steps each
    assert len({tuple(mask) for _, mask in patched}) > 3 and all(sum(mask) == 2 for _, mask in patched)
    assert forgotten == [2]

    def cosine(number: int, total: int) -> float:
        return (1 + math.cos(math.pi * number / total)) / 2

    assert rates["generator"] == pytest.approx([1e-3 * cosine(n, 6) for n in range(6)])
    late = [5e-4 * cosine(n, 4) for n in range(4)]
    assert rates["student"] == pytest.approx([2e-3 * cosine(0, 6), 2e-3 * cosine(1, 6), *late])


def test_later_epochs_are_those_of_the_source() -> None:
    class Source:
        num_batches = 3

        def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Any]:
            return iter([(epoch, start_batch)])

    later: Iterator[Any] = Later(Source(), 4).epoch(2, 1)
    assert next(later) == (6, 1)
