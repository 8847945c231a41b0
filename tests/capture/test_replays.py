"""Each graphed update over twenty steps: its replays equal its eager calls bitwise, whatever happens on the way."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dist_defend.batch import Batch
from dist_defend.engine import checkpoint
from dist_defend.engine.step import Position
from tests.capture.cases import CASES, STEPS, Case, tensors
from tests.capture.emulator import EmulatedGraph, emulated_gpu

SAVED, CHANGED, BACK = 5, 11, 14  # steps before which the run is resumed, has other rates, is set back


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def drive(case: Case, given: Sequence[tuple[Batch, Position]]) -> list[dict[str, float]]:
    """The scalars of each step."""
    return [{key: value.item() for key, value in case.step(batch, at).items()} for batch, at in given]


def slow_down(case: Case) -> None:
    """A new rate in the middle of the run; where there is a schedule the next step follows that."""
    for update in case.updates:
        update.set_rate(update.config.lr / 4)


def eager(name: str) -> tuple[list[Tensor], list[dict[str, float]]]:
    """Straight through; the state in the end, and the scalars."""
    case = CASES[name]("off")
    told = drive(case, case.given[:CHANGED])
    slow_down(case)
    told += drive(case, case.given[CHANGED:])
    assert not any(graph.is_graphed for graph in case.graphs)
    return list(tensors(case.step.state_dict())), told


def replayed(name: str, folder: Path) -> tuple[list[Tensor], list[dict[str, float]]]:
    """From graphs; saved, resumed by a new process' step, and set back after steps that do not count."""

    def save(case: Case) -> Path:
        checkpoint.save(folder, SAVED, {"step": case.step.state_dict(), "random": torch.get_rng_state()}, 1)
        return checkpoint.path_of(folder, SAVED)

    def resume(case: Case, path: Path) -> None:
        state = checkpoint.load(path)
        case.step.load_state_dict(state["step"])
        torch.set_rng_state(state["random"])

    first = CASES[name]("on")
    told = drive(first, first.given[:SAVED])
    saved = save(first)
    case = CASES[name]("on")
    resume(case, saved)
    told += drive(case, case.given[SAVED:CHANGED])
    slow_down(case)
    told += drive(case, case.given[CHANGED:BACK])
    saved, rates = save(case), [update.rate for update in case.updates]
    drive(case, case.given[BACK : BACK + 3])
    resume(case, saved)
    for update, rate in zip(case.updates, rates, strict=True):
        update.set_rate(rate)
    told += drive(case, case.given[BACK:])
    return list(tensors(case.step.state_dict())), told


def draws(graphs: Sequence[EmulatedGraph]) -> set[str]:
    return {name for graph in graphs for name in graph.random}


@pytest.mark.parametrize("name", CASES)
def test_replays_equal_eager_calls(name: str, tmp_path: Path) -> None:
    with emulated_gpu() as graphs:
        torch.manual_seed(3)
        wanted, wanted_told = eager(name)
        assert not graphs
        torch.manual_seed(3)
        found, told = replayed(name, tmp_path)
        assert len(told) == STEPS and told == wanted_told
        assert len(found) == len(wanted) and all(a.equal(b) for a, b in zip(found, wanted, strict=True))
        assert min(graph.kernels for graph in graphs) > 0
        assert draws(graphs) == ({"aten.bernoulli_.float"} if "dropout" in name else set())
