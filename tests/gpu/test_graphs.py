"""CUDA graphs of the second-order and the mask step: bitwise the eager step, and no wait for the device."""

import pytest
import torch
from torch import Tensor

from dist_defend.batch import Batch
from dist_defend.engine.graphed import GraphedUpdate, GraphMode
from dist_defend.engine.step import Position
from tests.capture import cases
from tests.capture.cases import CASES, tensors
from tests.gpu.settings import no_waits


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "BATCH", 16)
    monkeypatch.setattr(cases, "IMAGE", 32)


def on_gpu(batch: Batch, at: Position) -> tuple[Batch, Position]:
    return Batch(tuple(view.cuda() for view in batch.views), batch.labels.cuda(), batch.index.cuda()), at


@pytest.mark.parametrize("name", CASES)
def test_graph_equals_eager_bitwise_after_twenty_steps(name: str) -> None:
    states, told = [], []
    modes: tuple[GraphMode, ...] = ("off", "on")
    for graph in modes:
        torch.manual_seed(3)
        case = CASES[name](graph)
        scalars = [case.step(*on_gpu(*given)) for given in case.given]
        states.append(list(tensors(case.step.state_dict())))
        told.append([{key: value.item() for key, value in row.items()} for row in scalars])
    assert told[1] == told[0]
    assert len(states[0]) == len(states[1])
    assert all(a.equal(b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("graph", ["off", "on"])
def test_a_step_never_waits_for_the_device(name: str, graph: GraphMode) -> None:
    case = CASES[name](graph)
    batches = [on_gpu(*given) for given in case.given]
    for given in batches[:12]:  # every kind of step and every shape has been captured by then
        case.step(*given)
    with no_waits():
        for given in batches[12:]:
            case.step(*given)


@pytest.mark.parametrize("name", ["ibau", "rnp unlearn, dropout"])
def test_a_graph_resumes_where_it_was_saved(name: str) -> None:
    whole, first, second = (CASES[name]("on") for _ in range(3))
    torch.manual_seed(3)
    for given in whole.given:
        whole.step(*on_gpu(*given))
    torch.manual_seed(3)
    for given in first.given[:7]:
        first.step(*on_gpu(*given))
    second.step.load_state_dict(first.step.state_dict())
    for given in second.given[7:]:
        second.step(*on_gpu(*given))
    wanted, found = (tensors(case.step.state_dict()) for case in (whole, second))
    assert all(a.equal(b) for a, b in zip(wanted, found, strict=True))


def test_changing_shapes_are_refused() -> None:
    total = torch.zeros((), device="cuda")

    def update(x: Tensor) -> dict[str, Tensor]:
        total.add_(x.sum())
        return {"total": total}

    graphed = GraphedUpdate("sum", update, lambda: [total], torch.device("cuda"), "on")
    for size in range(1, 9):
        graphed(torch.ones(size, device="cuda"))
    assert total.item() == sum(range(1, 9))
    with pytest.raises(RuntimeError, match="inputs of yet another shape"):
        graphed(torch.ones(9, device="cuda"))
