"""What no graph can hold is found by the emulator: each of these updates is wrong in one way, on a GPU silently."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_defend.engine import dist
from dist_defend.engine.graphed import GraphedUpdate, GraphMode
from dist_defend.methods.defend.zskt.step import TransferStep
from tests.capture import cases, emulator
from tests.capture.cases import Case, tensors
from tests.capture.emulator import emulated_gpu

CPU = torch.device("cpu")
Update = Callable[..., dict[str, Tensor]]


def outcome(make: Callable[[GraphMode], Case], graph: GraphMode, steps: int = 9) -> list[Tensor]:
    """The state after so many steps: two epochs and a half, with a change of the rate at the third."""
    torch.manual_seed(3)
    case = make(graph)
    for given in case.given[:steps]:
        case.step(*given)
    return list(tensors(case.step.state_dict()))


def is_equal(make: Callable[[GraphMode], Case]) -> bool:
    with emulated_gpu():
        states = [outcome(make, graph) for graph in ("off", "on")]
    return all(a.equal(b) for a, b in zip(*states, strict=True))


def graphed(update: Update, *changed: Tensor) -> GraphedUpdate:
    return GraphedUpdate("update", update, lambda: changed, CPU, "on")


def test_the_updates_that_mutants_are_made_of_are_right() -> None:
    assert is_equal(cases.unlearn)


def test_a_frozen_rate() -> None:
    def frozen(graph: GraphMode) -> Case:
        case = cases.unlearn(graph)
        (update,) = case.updates
        update._rate = None
        update.set_rate(update.config.lr)  # a number
        return case

    assert not is_equal(frozen)


def looks(weight: Tensor) -> dict[str, Callable[[Tensor], Any]]:
    return {
        "item": lambda x: weight.add_(x.sum().item()),
        "a branch": lambda x: weight.add_(x if x.sum() > 0 else -x),
        "a list": lambda x: weight.add_(sum(x.tolist())),
        "numpy": lambda x: weight.add_(float(x.numpy().sum())),
        "to the host": lambda x: weight.add_(x.cpu()),
        "a mask": lambda x: weight.add_(x[x > 0].sum()),
        "a masked write": lambda x: weight.index_put_((x > 0,), x.sum()),
        "where it is not zero": lambda x: weight.add_(x.nonzero().sum()),
        "equal": lambda x: weight.add_(float(torch.equal(x, weight))),
        "data of the host": lambda x: weight.add_(torch.tensor([1.0, 2.0])),
    }


@pytest.mark.parametrize("name", looks(torch.zeros(2)))
def test_a_look_at_a_value(name: str) -> None:
    weight = torch.zeros(2)
    look = looks(weight)[name]

    def update(x: Tensor) -> dict[str, Tensor]:
        look(x)
        return {"total": weight.sum()}

    with emulated_gpu(), pytest.raises(emulator.CaptureViolation):
        graphed(update, weight)(torch.ones(2))
    assert weight.isfinite().all()


def test_a_look_at_a_value_in_a_step() -> None:
    with emulated_gpu():
        case = cases.unlearn("on")
        (graph,) = case.graphs
        plain = graph.update
        graph.update = lambda *given: {key: value / value.detach().item() for key, value in plain(*given).items()}
        with pytest.raises(emulator.CaptureViolation, match="item"):
            case.step(*case.given[0])


def test_a_freed_buffer() -> None:
    kept = {"target": torch.zeros(2)}

    def update(x: Tensor) -> dict[str, Tensor]:
        kept["target"].copy_(x)
        return {"total": x.sum()}

    with emulated_gpu():
        call = graphed(update)
        assert [call(torch.ones(2))["total"].item() for _ in range(2)] == [2.0, 2.0]
        assert kept["target"].tolist() == [1.0, 1.0]
        kept["target"] = torch.zeros(2)
        with pytest.raises(emulator.StaleMemory):
            call(torch.ones(2))


def test_drafts_that_are_freed_while_a_graph_writes_to_them() -> None:
    with emulated_gpu():
        case = cases.selected("on", least=1.0)
        assert isinstance(case.step, TransferStep)
        for given in case.given[:7]:  # the vaccine is rejected before the last of them
            case.step(*given)
        case.step.drafts = []
        with pytest.raises(emulator.StaleMemory):
            case.step(*case.given[7])


def test_a_node_of_another_stream() -> None:
    with emulated_gpu():
        case = cases.unlearn("on")
        (update,) = case.updates
        held = update.parameters[0].clone()  # its graph holds the parameter's node
        with pytest.raises(emulator.StaleStream):
            case.step(*case.given[0])
        del held
        case.step(*case.given[0])


def test_a_node_that_the_warm_up_leaves() -> None:
    weight, kept = torch.ones(2, requires_grad=True), []

    def update(x: Tensor) -> dict[str, Tensor]:
        kept.append((weight * x).sum())
        (slope,) = torch.autograd.grad(kept[-1], weight, retain_graph=True)
        with torch.no_grad():
            weight.sub_(slope)
        return {"loss": kept[-1].detach()}

    with emulated_gpu(), pytest.raises(emulator.StaleStream):
        graphed(update, weight)(torch.ones(2))


def test_a_draw_of_an_unknown_generator() -> None:
    weight, generator = torch.zeros(2), torch.Generator()

    def update(x: Tensor) -> dict[str, Tensor]:
        weight.add_(torch.rand(2, generator=generator))
        return {"total": weight.sum()}

    with emulated_gpu(), pytest.raises(emulator.CaptureViolation, match="generator"):
        graphed(update, weight)(torch.ones(2))


def test_a_draw_of_the_host_is_frozen() -> None:
    def drawn(graph: GraphMode) -> Case:
        case, host = cases.unlearn(graph), np.random.default_rng(0)
        (step,) = case.graphs
        plain = step.update
        step.update = lambda images, labels: plain(images * float(host.uniform(0.5, 1.5)), labels)
        return case

    assert not is_equal(drawn)


def test_a_draw_inside_goes_on_as_eager_draws_do() -> None:
    def noisy(graph: GraphMode) -> Case:
        case = cases.unlearn(graph)
        (step,) = case.graphs
        plain = step.update
        step.update = lambda images, labels: plain(images + 0.1 * torch.randn_like(images), labels)
        return case

    assert is_equal(noisy)
    with emulated_gpu() as graphs:
        outcome(noisy, "on")
        assert [graph.random for graph in graphs] == 2 * [["aten.randn_like.default"]]


@pytest.mark.parametrize("part", ["parameters", "buffers", "momentum", "counts"])
def test_a_write_that_changed_does_not_name(part: str) -> None:
    with emulated_gpu():
        case = cases.unlearn("on")
        (graph,), (update,), model = case.graphs, case.updates, case.step.model  # type: ignore[attr-defined]
        parts = {
            "parameters": model.parameters,
            "buffers": model.buffers,
            "momentum": update.state,
            "counts": lambda: [case.step.counts],  # type: ignore[attr-defined]
        }
        plain = graph.changed

        def without() -> list[Tensor]:
            left_out = {id(tensor) for tensor in parts[part]()}
            return [tensor for tensor in plain() if id(tensor) not in left_out]

        graph.changed = without
        with pytest.raises(emulator.UnnamedWrite):
            case.step(*case.given[0])


def test_what_every_call_overwrites_needs_no_name() -> None:
    total, scratch = torch.zeros(2), torch.zeros(2)

    def update(x: Tensor) -> dict[str, Tensor]:
        scratch.copy_(x)
        total.add_(scratch)
        return {"total": total.sum()}

    def reads_first(x: Tensor) -> dict[str, Tensor]:
        total.add_(scratch)
        return update(x)

    with emulated_gpu():
        call = graphed(update, total)
        assert [call(torch.ones(2))["total"].item() for _ in range(3)] == [2.0, 4.0, 6.0]
        with pytest.raises(emulator.UnnamedWrite):
            graphed(reads_first, total)(torch.ones(2))


def test_other_threads_do_not_end_a_capture() -> None:
    done = threading.Event()
    loader = threading.Thread(target=done.wait)
    loader.start()
    try:
        with emulated_gpu() as graphs:
            call = graphed(lambda x: {"total": x.sum()})
            assert call(torch.ones(3))["total"].item() == 3.0 and len(graphs) == 1
            with pytest.raises(emulator.CaptureViolation, match="thread"):
                torch.cuda.graph(torch.cuda.CUDAGraph())
    finally:
        done.set()
        loader.join()


def test_graphs_end_before_the_group_that_they_sum_over(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []
    with emulated_gpu() as graphs:
        call = graphed(lambda x: {"total": x.sum()})
        call(torch.ones(2))
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(
            torch.distributed, "destroy_process_group", lambda: ended.extend(graph.has_ended for graph in graphs)
        )
        dist.stop()
        assert ended == [True]
        with pytest.raises(RuntimeError, match="replay"):
            call(torch.ones(2))


def test_another_setting_of_tf32_is_another_graph() -> None:
    """A graph keeps the kernels that its capture chose; whichever of torch's names for the setting a program uses."""
    cudnn: Any = torch.backends.cudnn
    with emulated_gpu() as graphs:
        call = graphed(lambda x: {"total": x.sum()})
        try:
            for is_allowed in (True, False, True):
                cudnn.allow_tf32 = is_allowed
                call(torch.ones(2))
            assert len(graphs) == 2
            cudnn.conv.fp32_precision = "ieee"
            call(torch.ones(2))
            assert len(graphs) == 3
        finally:
            cudnn.conv.fp32_precision = "tf32"
            cudnn.allow_tf32 = True


def test_more_shapes_than_can_be_meant_are_refused() -> None:
    total = torch.zeros(())

    def update(x: Tensor) -> dict[str, Tensor]:
        total.add_(x.sum())
        return {"total": total}

    with emulated_gpu() as graphs:
        call = graphed(update, total)
        for size in [*range(1, 9), *range(1, 9)]:
            call(torch.ones(size))
        assert total.item() == 2 * sum(range(1, 9)) and len(graphs) == 8
        with pytest.raises(RuntimeError, match="inputs of yet another shape"):
            call(torch.ones(9))


def test_each_shape_has_its_graph_and_all_write_to_the_same_state() -> None:
    with emulated_gpu() as graphs:
        outcome(cases.unlearn, "on")
        outcome(cases.ibau, "on")
        assert len(graphs) == 2 + 2  # a short batch is a shape of its own in RNP, and padded in I-BAU
    assert torch.cuda.CUDAGraph.__module__.startswith("torch")
