"""The information estimators against the published code's values, their definitions, and cases with a known answer."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from dist_defend.ops.mutual_info import Club, DonskerVaradhan, InfoNCE
from tests.numerics.det import det_images, det_init, golden

GOLDEN = golden("mimic_estimators")
X, Y = det_images((12, 20), 1), det_images((12, 6), 2)
Estimator = TypeVar("Estimator", Club, InfoNCE, DonskerVaradhan)
PERMUTATION = torch.tensor(GOLDEN["dv_perm"])


def built(kind: type[Estimator]) -> Estimator:
    """The estimator with the golden weights."""
    estimator = (kind(20, 6) if kind is DonskerVaradhan else kind(20, 6, hidden=16)).double()
    det_init(estimator, {Club: 3, InfoNCE: 4, DonskerVaradhan: 5}[kind])
    return estimator


def assert_value(value: Tensor, key: str) -> None:
    assert value.item() == pytest.approx(GOLDEN[key], rel=1e-9)


def test_values_are_the_published_ones() -> None:
    club = built(Club)
    assert_value(club.bound(X, Y, PERMUTATION), "club")
    assert_value(club.loss(X, Y, PERMUTATION), "club_learn")
    nce = built(InfoNCE)
    assert_value(nce.bound(X, Y, PERMUTATION), "infonce")
    assert nce.loss(X, Y, PERMUTATION).item() == -nce.bound(X, Y, PERMUTATION).item()
    dv = built(DonskerVaradhan)
    assert_value(dv.bound(X, Y, PERMUTATION), "dv")
    assert_value(dv.scores(X, Y, PERMUTATION)[0].mean(), "dv_T0_mean")
    assert dv.scores(X, Y, PERMUTATION)[1].tolist() == pytest.approx(GOLDEN["dv_T1"], rel=1e-9)
    assert dv.loss(X, Y, PERMUTATION).item() == -dv.bound(X, Y, PERMUTATION).item()


def critic(estimator: DonskerVaradhan | InfoNCE, x: Tensor, y: Tensor) -> Tensor:
    """The critic on concatenated pairs, as published."""
    pairs = torch.cat([x, y], dim=1)
    scores: Tensor = estimator.rest(torch.nn.functional.linear(pairs, estimator.pair.weight, estimator.pair.bias))
    return scores.squeeze(1)


def dv_by_definition(sign: float = 1.0, fixed: bool = False, averaged: bool = True) -> Tensor:
    dv = built(DonskerVaradhan)
    joint = critic(dv, X, Y).mean()
    independent = critic(dv, X, Y if fixed else Y[PERMUTATION]).exp()
    return joint - sign * (independent.mean() if averaged else independent.sum()).log()


def nce_by_definition(across_y: bool = False, averaged: bool = True) -> Tensor:
    nce = built(InfoNCE)
    table = torch.stack([critic(nce, X, y.expand(12, -1)) for y in Y])  # [i, j] = F(x_j, y_i)
    own = table.logsumexp(0 if across_y else 1)
    return table.diagonal().mean() - own.mean() + (math.log(12) if averaged else 0)


def club_by_definition(sign: float = -1.0, scale: float = 2.0, drop_own: bool = False) -> Tensor:
    club = built(Club)
    mean: Tensor = club.mean(X)
    variance: Tensor = club.log_variance(X).exp()
    squares = (Y[None] - mean[:, None]).square()  # N x N x D
    rows = (squares.sum(1) - drop_own * (Y - mean).square()) / (12 - drop_own)
    return ((sign * (Y - mean).square() + rows) / (scale * variance)).sum(1).mean()


def test_definitions_give_the_published_values_and_mutants_do_not() -> None:
    definitions: dict[str, Callable[..., Tensor]] = {
        "dv": dv_by_definition,
        "infonce": nce_by_definition,
        "club": club_by_definition,
    }
    mutants: dict[str, list[dict[str, object]]] = {
        "dv": [{"sign": -1.0}, {"fixed": True}, {"averaged": False}],
        "infonce": [{"across_y": True}, {"averaged": False}],
        "club": [{"sign": 1.0}, {"scale": 1.0}, {"drop_own": True}],
    }
    for key, definition in definitions.items():
        assert_value(definition(), key)
        for mutant in mutants[key]:
            with pytest.raises(AssertionError):
                assert_value(definition(**mutant), key)


@pytest.mark.parametrize("kind", [DonskerVaradhan, InfoNCE])
def test_the_split_first_layer_has_the_gradient_of_the_whole_one(kind: Any) -> None:
    split, whole = built(kind), built(kind)
    split.bound(X, Y, PERMUTATION).backward()
    if isinstance(whole, DonskerVaradhan):
        value = critic(whole, X, Y).mean() - critic(whole, X, Y[PERMUTATION]).exp().mean().log()
    else:
        assert isinstance(whole, InfoNCE)
        table = torch.stack([critic(whole, X, y.expand(12, -1)) for y in Y])
        value = table.diagonal().mean() - table.logsumexp(1).mean()
    value.backward()
    for (name, mine), theirs in zip(split.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-14, msg=name)


def test_donsker_varadhan_ignores_a_constant_and_survives_huge_scores() -> None:
    dv = built(DonskerVaradhan)
    before = dv.bound(X, Y, PERMUTATION).item()
    weight, bias = list(dv.rest.parameters())[-2:]
    with torch.no_grad():
        bias.add_(5)
        assert dv.bound(X, Y, PERMUTATION).item() == pytest.approx(before, rel=1e-10)
        bias.add_(1e4)  # exp of it overflows
        assert dv.bound(X, Y, PERMUTATION).item() == pytest.approx(before, abs=1e-9)
        weight.zero_()
    assert dv.bound(X, Y, PERMUTATION).item() == pytest.approx(0, abs=1e-9)


def test_infonce_is_zero_for_a_constant_critic_and_at_most_log_n() -> None:
    nce = built(InfoNCE)
    assert nce.bound(X, Y).item() <= GOLDEN["infonce_le_logN"] == pytest.approx(math.log(12))
    with torch.no_grad():
        nce.rest.get_parameter("1.weight").zero_()
    assert nce.bound(X, Y).item() == pytest.approx(0, abs=1e-12)


def test_club_bounds_the_information_of_gaussians_from_above() -> None:
    """With the true conditional of D pairs of correlation r, its expectation is D r^2 / (1 - r^2)."""
    dims, r, n = 5, 0.8, 20000
    x = det_images((n, dims), 0)
    y = r * x + math.sqrt(1 - r**2) * det_images((n, dims), 1)

    class TrueConditional(Club):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def _gaussian(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return r * x, torch.full_like(x, math.log(1 - r**2))

    assert TrueConditional().bound(x, y).item() == pytest.approx(dims * r**2 / (1 - r**2), rel=0.05)
