"""The part of graphs that a CPU can show: modes, and how warm-up is undone. tests/gpu has the rest."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_defend.engine.graphed import GraphedUpdate, restore
from dist_defend.errors import UserError

CPU = torch.device("cpu")


def test_on_without_a_gpu_is_refused_and_auto_says_what_it_took(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="key 'graph' is on, but inner step runs on the cpu"):
        GraphedUpdate("inner step", dict, list, CPU, "on")
    with caplog.at_level(logging.INFO, "dist_defend"):
        GraphedUpdate("inner step", dict, list, CPU, "auto")
        GraphedUpdate("outer step", dict, list, CPU, "off")
    assert [record.getMessage() for record in caplog.records] == ["inner step: eager, there is no GPU"]


def test_eager_calls_pass_through() -> None:
    total = torch.zeros(2)

    def update(x: Tensor) -> dict[str, Tensor]:
        total.add_(x)
        return {"sum": total.sum()}

    step = GraphedUpdate("step", update, lambda: [total], CPU, "auto")
    assert [step(torch.ones(2))["sum"].item() for _ in range(3)] == [2.0, 4.0, 6.0]


@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, torch.optim.Adam])
def test_warm_up_is_undone_with_the_state_that_it_made(optimizer_type: type[torch.optim.Optimizer]) -> None:
    def make() -> tuple[Tensor, torch.optim.Optimizer]:
        weight = torch.tensor([1.0, -2.0], requires_grad=True)
        options: dict[str, Any] = {"momentum": 0.9} if optimizer_type is torch.optim.SGD else {}
        return weight, optimizer_type([weight], lr=0.1, **options)  # type: ignore[call-arg]

    def update(weight: Tensor, optimizer: torch.optim.Optimizer) -> None:
        weight.grad = 2 * weight.detach()
        optimizer.step()

    def changed(weight: Tensor, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
        return [weight, *state]

    fresh, warm = make(), make()
    before = [(tensor, tensor.detach().clone()) for tensor in changed(*warm)]
    for _ in range(3):
        update(*warm)
    restore(before, changed(*warm))
    assert warm[0].equal(make()[0])
    for _ in range(4):
        update(*fresh)
        update(*warm)
        assert warm[0].equal(fresh[0])
