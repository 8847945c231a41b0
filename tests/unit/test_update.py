"""Update: torch's optimizers, told their gradients, with what a captured step needs; compared with torch by hand."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_defend.engine.objective import NonFiniteError
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.engine.update import Update, check_finite

CONFIGS = {
    "adam": OptimizerConfig("adam", lr=0.1, weight_decay=0.01, amsgrad=True),
    "adamw": OptimizerConfig("adamw", lr=0.1, weight_decay=0.01),
    "sgd": OptimizerConfig("sgd", lr=0.1, momentum=0.9),
    "lars": OptimizerConfig("lars", lr=0.1, momentum=0.9),
}
KINDS: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def parameters(seed: int = 0) -> list[nn.Parameter]:
    """A kernel in another memory order, a vector and a number."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, 2, 3, 3), (4,), ())
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    values[0] = values[0].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(value) for value in values]


def gradients(count: int) -> Iterator[list[Tensor]]:
    for seed in range(1, count + 1):
        yield [p.detach().contiguous() for p in parameters(seed)]


def values(update: Update) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in (*update.parameters, *update.state())]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("is_graphed", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_an_update_is_torchs(name: str, is_graphed: bool) -> None:
    theirs, config = parameters(), CONFIGS[name]
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    options |= {"momentum": 0.9} if name == "sgd" else {"amsgrad": config.amsgrad}
    optimizer, update = KINDS[name](theirs, **options), Update(parameters(), config, is_graphed)
    for number, given in enumerate(gradients(4)):
        rate = 0.1 / (number + 1)
        optimizer.param_groups[0]["lr"] = rate
        update.set_rate(rate)
        for parameter, gradient in zip(theirs, given, strict=True):
            parameter.grad = gradient.clone()
        total = math.sqrt(sum(gradient.square().sum().item() for gradient in given))
        torch.nn.utils.clip_grad_norm_(theirs, 1.5)
        optimizer.step()
        norm, nonfinite = update.step(given, max_norm=1.5)
        assert norm.item() == pytest.approx(total, rel=1e-12) and nonfinite == 0
        assert update.rate == rate
        for mine, expected in zip(update.parameters, theirs, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_not_finite_moves_nothing(name: str, bad: float) -> None:
    update = Update(parameters(), CONFIGS[name])
    good, worse, again = gradients(3)
    update.step(good)
    before = values(update)
    worse[1][2] = bad
    _, nonfinite = update.step(worse, max_norm=1.0)
    assert nonfinite == 1 and same(values(update), before)
    with pytest.raises(NonFiniteError, match="the slope is not finite"):
        check_finite({"nonfinite": nonfinite}, "the slope")
    _, nonfinite = update.step(again)
    assert check_finite({"nonfinite": nonfinite}, "the slope") == {"nonfinite": 0}
    assert not same(values(update), before)


def test_two_updates_are_left_out_together() -> None:
    first, second = Update(parameters(), CONFIGS["adam"]), Update(parameters(), CONFIGS["sgd"])
    (good,) = gradients(1)
    before = values(second)
    norm, nonfinite = second.step(good, norm=torch.tensor(math.nan))
    assert norm.isnan() and nonfinite == 1 and same([p.detach() for p in second.parameters], before[:3])
    assert first.step(good, norm=torch.tensor(2.0))[0] == 2.0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_state_goes_on_and_is_nobody_elses(name: str) -> None:
    first, second = (Update(parameters(), CONFIGS[name]) for _ in range(2))
    early, late = gradients(2)
    first.step(early)
    with torch.no_grad():
        for mine, theirs in zip(second.parameters, first.parameters, strict=True):
            mine.copy_(theirs)
    second.load_state_dict(first.state_dict())
    for update in (first, second):
        update.step([gradient.clone() for gradient in late])
    assert same(values(first), values(second))
    kept = {id(tensor) for tensor in first.state()}
    assert kept and not kept & {id(tensor) for tensor in second.state()}


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_state_is_loaded_to_where_a_captured_step_writes(name: str) -> None:
    update, other = (Update(parameters(), CONFIGS[name], is_graphed=True) for _ in range(2))
    first, second = gradients(2)
    update.step(first)
    other.step(second)
    places = [tensor.data_ptr() for tensor in update.state()]
    update.load_state_dict(other.state_dict())
    assert [tensor.data_ptr() for tensor in update.state()] == places
    assert same(list(update.state()), list(other.state()))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_state_of_no_update_is_loaded_in_place_too(name: str) -> None:
    update, fresh = (Update(parameters(), CONFIGS[name], is_graphed=True) for _ in range(2))
    early, late = gradients(2)
    unused = update.state_dict()
    update.step(early)
    places = [tensor.data_ptr() for tensor in update.state()]
    update.load_state_dict(unused)
    assert places and [tensor.data_ptr() for tensor in update.state()] == places
    with torch.no_grad():
        for mine, initial in zip(update.parameters, fresh.parameters, strict=True):
            mine.copy_(initial)
    for each in (update, fresh):
        each.step([gradient.clone() for gradient in late])
    assert same(values(update), values(fresh))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_forgotten_update_is_a_fresh_one(name: str) -> None:
    update = Update(parameters(), CONFIGS[name])
    early, late = gradients(2)
    update.step(early)
    update.forget()
    fresh = Update([nn.Parameter(p.detach().clone()) for p in update.parameters], CONFIGS[name])
    for each in (update, fresh):
        each.step([gradient.clone() for gradient in late])
    assert same(values(update), values(fresh))


def test_another_optimizers_state_is_refused() -> None:
    update = Update(parameters(), CONFIGS["adam"])
    other = Update(parameters(), CONFIGS["sgd"])
    other.step(next(gradients(1)))
    with pytest.raises(ValueError, match="the optimizer keeps"):
        update.load_state_dict(other.state_dict())
