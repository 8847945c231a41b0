"""CUDA graphs of the second-order and the mask step: bitwise the eager step, and no wait for the device."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_defend.batch import Batch
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine import dist
from dist_defend.engine.graphed import GraphedUpdate, GraphMode
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.engine.step import Position, Step
from dist_defend.methods.defend.abd.options import RetrospectionConfig, VaccineConfig
from dist_defend.methods.defend.ibau.options import Config
from dist_defend.methods.defend.ibau.rounds import Rounds
from dist_defend.methods.defend.ibau.step import UnlearningStep
from dist_defend.methods.defend.rnp.steps import RecoverStep, UnlearnStep
from dist_defend.methods.defend.zskt.batches import LatentBatches
from dist_defend.methods.defend.zskt.options import Config as TransferConfig
from dist_defend.methods.defend.zskt.step import TransferStep
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.models.generator import ZSKTGenerator
from dist_defend.models.masked_norm import mask_norms, norm_names
from tests.numerics.test_ibau_steps import InMemory
from tests.steps import positions

SIZE, STEPS = 16, 20


@pytest.fixture(autouse=True)
def deterministic() -> Any:
    """Graph and eager run the same kernels; only atomics could make them differ."""
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = False


Case = tuple[Step, list[tuple[Batch, Position]]]


def data(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, 32, 32, generator=generator), torch.randint(0, 10, (count,), generator=generator)


def classifier(arch: str) -> Classifier:
    torch.manual_seed(1)
    return build_classifier(arch, 10, "none")


def ibau_step(graph: GraphMode, **options: Any) -> Case:
    """Ten rounds' worth of batches, the last of each pass partial."""
    images, labels = data(2 * SIZE + 5)
    options = {"patched_fraction": 0.2, "project_radius": 10.0, **options}
    config = Config("m", DatasetConfig("d"), DatasetConfig("t"), batch_size=SIZE, graph=graph, **options)
    rounds = Rounds(InMemory(images, labels, SIZE), 32, dist.start("fp32", None))  # type: ignore[arg-type]
    step = UnlearningStep(classifier("ibau_vgg"), config, rounds, seed=0)
    batches = (batch for epoch in range(STEPS) for batch in rounds.epoch(epoch))
    return step, list(islice(zip(batches, positions(rounds.num_batches), strict=False), STEPS))


def rnp_batches() -> list[tuple[Batch, Position]]:
    images, labels = data(2 * SIZE + 6)
    parts = list(torch.arange(len(labels)).split(SIZE))
    batches = (Batch((images[part],), labels[part], part) for _ in range(STEPS) for part in parts)
    return list(islice(zip(batches, positions(len(parts)), strict=False), STEPS))


def unlearn_step(graph: GraphMode) -> Case:
    model = classifier("small_resnet").cuda()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ranks = dist.start("fp32", None)
    return UnlearnStep(model, ranks, schedule=(2,), graph=graph), rnp_batches()


def recover_step(graph: GraphMode) -> Case:
    model = classifier("small_resnet").cuda()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    masks = mask_norms(model, norm_names(model))
    return RecoverStep(model, masks, dist.start("fp32", None), graph=graph), rnp_batches()


def transfer_step(graph: GraphMode, **options: Any) -> Case:
    config = TransferConfig("m", DatasetConfig("t"), batch_size=SIZE, student_steps=2, graph=graph, **options)
    ranks = dist.start("fp32", None)
    teacher = classifier("wrn_16_1").net.cuda().eval().requires_grad_(False)
    step = TransferStep(teacher, classifier("wrn_10_1").net, ZSKTGenerator(width=16), config, ranks, seed=0)
    latents = LatentBatches(SIZE, config.z_dim, 0, ranks)
    batches = (batch for epoch in range(STEPS) for batch in latents.epoch(epoch))
    floats = (batch._replace(views=(batch.images.float(),)) for batch in batches)
    return step, list(zip(floats, positions(), strict=False))


CASES: dict[str, Callable[[GraphMode], Case]] = {
    "ibau": ibau_step,
    "ibau amsgrad": lambda graph: ibau_step(graph, optimizer=OptimizerConfig("adam", lr=1e-4, amsgrad=True)),
    "ibau adam inside, clamped": lambda graph: ibau_step(graph, inner=OptimizerConfig("adam", lr=1.0), clamp=True),
    "ibau cg": lambda graph: ibau_step(graph, solver="cg"),
    "rnp unlearn": unlearn_step,
    "rnp recover": recover_step,
    "zskt": transfer_step,
    "zskt with both defences": lambda graph: transfer_step(
        graph, vaccine=VaccineConfig(), retrospection=RetrospectionConfig(start=3, restart_lr=5e-4, inner_rounds=2)
    ),
}


def on_gpu(batch: Batch, at: Position) -> tuple[Batch, Position]:
    return Batch(tuple(view.cuda() for view in batch.views), batch.labels.cuda(), batch.index.cuda()), at


def tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state.detach().clone()]
    children = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []
    return [tensor for child in children for tensor in tensors(child)]


@pytest.mark.parametrize("name", CASES)
def test_graph_equals_eager_bitwise_after_twenty_steps(name: str) -> None:
    states, told = [], []
    for graph in ("off", "on"):
        step, batches = CASES[name](graph)
        scalars = [step(*on_gpu(*given)) for given in batches]
        states.append(tensors(step.state_dict()))
        told.append([{key: value.item() for key, value in row.items()} for row in scalars])
    assert told[1] == told[0]
    assert len(states[0]) == len(states[1])
    assert all(a.equal(b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("graph", ["off", "on"])
def test_a_step_never_waits_for_the_device(name: str, graph: GraphMode) -> None:
    step, batches = CASES[name](graph)
    batches = [on_gpu(*given) for given in batches]
    for given in batches[:12]:  # every kind of step and every shape has been captured by then
        step(*given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for given in batches[12:]:
            step(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_resumes_where_it_was_saved() -> None:
    whole, batches = ibau_step("on")
    for given in batches:
        whole(*on_gpu(*given))
    first, _ = ibau_step("on")
    for given in batches[:7]:
        first(*on_gpu(*given))
    second, _ = ibau_step("on")
    second.load_state_dict(first.state_dict())
    for given in batches[7:]:
        second(*on_gpu(*given))
    assert all(a.equal(b) for a, b in zip(tensors(whole.state_dict()), tensors(second.state_dict()), strict=True))


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
