"""A run that goes from a CPU to a GPU and back, by its checkpoints: the numbers are those of the CPU alone.

A GPU's rate is a float32; the rates here are powers of two, which that does not round.
"""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_defend.engine import checkpoint
from dist_defend.engine.graphed import GraphMode
from dist_defend.engine.optim import OptimizerConfig
from tests.capture import cases
from tests.capture.cases import STEPS, Case, tensors
from tests.capture.emulator import EmulatedGraph, emulated_gpu

ADAM, SGD = OptimizerConfig("adam", lr=2**-12), OptimizerConfig("sgd", lr=2**-7, momentum=0.9)


def make(name: str, graph: GraphMode) -> Case:
    if name == "zskt":
        return cases.zskt(graph, generator_optimizer=ADAM, student_optimizer=SGD)
    if name == "ibau":
        return cases.ibau(graph, optimizer=ADAM, inner=OptimizerConfig("sgd", lr=1.0, momentum=0.5))
    arch = "ibau_vgg" if name == "rnp, dropout" else "small_resnet"
    return cases.unlearn(graph, arch=arch, lr=2**-7, schedule=(), max_grad_norm=1.0)


def part(name: str, path: Path | None, steps: range, is_on_gpu: bool) -> tuple[Case, list[dict[str, float]]]:
    """A process that goes on from a checkpoint; its step, and what it told."""
    place: AbstractContextManager[list[EmulatedGraph]] = emulated_gpu() if is_on_gpu else nullcontext([])
    with place as graphs:
        torch.manual_seed(3)
        case = make(name, "auto")
        if path is not None:
            state: dict[str, Any] = checkpoint.load(path)
            case.step.load_state_dict(state["step"])
            torch.set_rng_state(state["random"])
        told = [{key: value.item() for key, value in case.step(*case.given[n]).items()} for n in steps]
        assert bool(graphs) == is_on_gpu
        return case, told


def save(folder: Path, case: Case, number: int) -> Path:
    state = {"step": case.step.state_dict(), "random": torch.get_rng_state()}
    checkpoint.save(folder, number, state, 3)
    return checkpoint.path_of(folder, number)


def final(case: Case) -> list[Tensor]:
    """Rates aside: they are numbers on a CPU and tensors on a GPU."""
    return [*tensors([p for update in case.updates for p in update.parameters]),
            *tensors([value for update in case.updates for value in update.state()])]  # fmt: skip


@pytest.mark.parametrize("begins_on_gpu", [False, True])
@pytest.mark.parametrize("name", ["ibau", "rnp", "rnp, dropout", "zskt"])
def test_a_run_that_changes_devices_goes_on_with_the_same_numbers(
    name: str, begins_on_gpu: bool, tmp_path: Path
) -> None:
    alone, wanted = part(name, None, range(STEPS), is_on_gpu=False)
    path: Path | None = None
    told: list[dict[str, float]] = []
    for number, steps in enumerate((range(5), range(5, 11), range(11, STEPS))):
        case, more = part(name, path, steps, is_on_gpu=(number % 2 == 1) != begins_on_gpu)
        path, told = save(tmp_path, case, number), told + more
    assert told == wanted
    assert all(a.equal(b) for a, b in zip(final(case), final(alone), strict=True))
