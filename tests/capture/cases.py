"""Every update that becomes a CUDA graph, as a step with twenty batches; on a CPU, or on a GPU where there is one."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn

from dist_defend.batch import Batch
from dist_defend.data.loader import DatasetConfig
from dist_defend.data.order import rank_slice
from dist_defend.engine import dist
from dist_defend.engine.dist import Ranks
from dist_defend.engine.graphed import GraphedUpdate, GraphMode
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.engine.step import Position, Step
from dist_defend.engine.update import Update
from dist_defend.methods.defend import fp, ft_sam, nad, sau
from dist_defend.methods.defend.abd import vaccine
from dist_defend.methods.defend.abd.options import RetrospectionConfig, VaccineConfig
from dist_defend.methods.defend.abd.retrospective_step import RetrospectiveStep
from dist_defend.methods.defend.ibau.options import Config
from dist_defend.methods.defend.ibau.rounds import Rounds
from dist_defend.methods.defend.ibau.step import UnlearningStep
from dist_defend.methods.defend.nc.search import SearchConfig, SearchStep
from dist_defend.methods.defend.rnp.steps import RecoverStep, UnlearnStep
from dist_defend.methods.defend.tuning.options import sgd
from dist_defend.methods.defend.tuning.step import TuningStep
from dist_defend.methods.defend.zskt.batches import LatentBatches
from dist_defend.methods.defend.zskt.options import Config as TransferConfig
from dist_defend.methods.defend.zskt.step import TransferStep
from dist_defend.methods.measure.decree import Config as InversionConfig
from dist_defend.methods.measure.decree import InversionStep
from dist_defend.methods.measure.reactivate.networks import ReactivationStep
from dist_defend.methods.measure.reactivate.options import Config as ReactivationConfig
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.models.generator import ZSKTGenerator
from dist_defend.models.masked_norm import mask_norms, norm_names
from dist_defend.ops.collectives import convert_sync_batchnorm
from dist_defend.ops.losses import Convention, distillation
from tests.numerics.test_ibau_steps import InMemory
from tests.steps import positions

BATCH, IMAGE, STEPS = 4, 8, 20  # small enough for a CPU; tests/gpu takes larger ones
PRECISION = "fp32"
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Case:
    """A step, what it is given, and its parts: graphs and optimizers."""

    step: Step
    given: list[tuple[Batch, Position]]
    graphs: tuple[GraphedUpdate, ...]
    updates: tuple[Update, ...]


def images_and_labels(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, IMAGE, IMAGE, generator=generator), torch.randint(0, 10, (count,), generator=generator)


def classifier(arch: str, ranks: Ranks) -> Classifier:
    """On the device, with the same weights each time; the stream of random numbers stays where it is."""
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        model = build_classifier(arch, 10, "none", IMAGE)
    model.to(ranks.device, ranks.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def synchronised(model: Module, ranks: Ranks, second_order: bool = False) -> Module:
    """The model, whose batch norms are then those of the global batch."""
    if ranks.world_size > 1:
        convert_sync_batchnorm(model, second_order)
    return model


def own(batch: Batch, ranks: Ranks) -> Batch:
    """This rank's share of a global batch."""
    part = rank_slice(len(batch.labels), ranks.rank, ranks.world_size)
    return Batch((batch.images[part].to(ranks.dtype),), batch.labels[part], batch.index[part])


@dataclass
class Shares(InMemory):
    """A loader whose batches are this rank's shares; without the empty ones."""

    ranks: Ranks

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        shares = (own(batch, self.ranks) for batch in super().epoch(epoch, start_batch))
        return (share for share in shares if len(share.labels))


def ibau(graph: GraphMode, arch: str = "ibau_vgg", is_constant: bool = False, **options: Any) -> Case:
    """Rounds of six batches; the last of a pass is short, and padded. is_constant: graphs find them on the device.

    With orders a round is longer: so many passes of three batches, and the outer one.
    """
    images, labels = images_and_labels(2 * BATCH + 3)
    ranks = dist.start(PRECISION, None)
    options = {"patched_fraction": 0.3, "project_radius": 10.0, **options}
    config = Config("m", DatasetConfig("d"), DatasetConfig("t"), batch_size=BATCH, graph=graph, **options)
    loader: Any = Shares(images, labels, BATCH, ranks)
    rounds = Rounds(loader, IMAGE, ranks, is_constant, config.num_orders)
    step = UnlearningStep(classifier(arch, ranks), config, rounds, seed=0)
    batches = (batch for epoch in range(STEPS) for batch in rounds.epoch(epoch))
    given = list(islice(zip(batches, positions(rounds.num_batches), strict=False), STEPS))
    return Case(step, given, (step.inner, step.outer), (step.update, step.inner_update))


def labelled(ranks: Ranks) -> tuple[list[tuple[Batch, Position]], int]:
    """Epochs of so many batches, the last of them of another shape: of two ranks for the second one alone."""
    images, labels = images_and_labels(3 * BATCH - 1)
    loader = Shares(images, labels, BATCH, ranks)
    batches = (batch for epoch in range(STEPS) for batch in loader.epoch(epoch))
    return list(islice(zip(batches, positions(loader.num_batches), strict=False), STEPS)), loader.num_batches


def unlearn(graph: GraphMode, arch: str = "small_resnet", **options: Any) -> Case:
    ranks = dist.start(PRECISION, None)
    given, epoch = labelled(ranks)
    options = {"schedule": (2, 4), "num_batches": epoch, **options}
    step = UnlearnStep(synchronised(classifier(arch, ranks), ranks), ranks, graph=graph, **options)
    return Case(step, given, (step.graphed,), (step.update,))


def recover(graph: GraphMode, arch: str = "small_resnet", **options: Any) -> Case:
    ranks = dist.start(PRECISION, None)
    model = classifier(arch, ranks)
    names = norm_names(model)
    masks = mask_norms(synchronised(model, ranks), names)
    given, epoch = labelled(ranks)
    step = RecoverStep(model, masks, ranks, graph=graph, num_batches=epoch, **options)
    return Case(step, given, (step.graphed,), (step.update,))


def zskt(graph: GraphMode, **options: Any) -> Case:
    options = {"pseudo_batches": STEPS, "student_steps": 2, **options}
    config = TransferConfig("m", DatasetConfig("t"), batch_size=BATCH, graph=graph, **options)
    ranks = dist.start(PRECISION, None)
    teacher = classifier("wrn_16_1", ranks).net.eval().requires_grad_(False)
    generator = synchronised(ZSKTGenerator(image_size=IMAGE, width=2 * BATCH).to(ranks.device), ranks)
    student = synchronised(classifier("wrn_10_1", ranks).net, ranks, config.retrospection is not None)
    step = TransferStep(teacher, student, generator, config, ranks, seed=0)
    latents = LatentBatches(BATCH, config.z_dim, 0, ranks)
    batches = (batch for epoch in range(STEPS) for batch in latents.epoch(epoch))
    floats = (batch._replace(views=(batch.images.to(ranks.dtype),)) for batch in batches)
    graphs = (step.make, step.perturb, step.learn)
    return Case(step, list(zip(floats, positions(), strict=False)), graphs, tuple(step.players.values()))


def selected(graph: GraphMode, least: float) -> Case:
    """A vaccine that is selected after six pseudo-batches, and taken if its tail ratio is more than ``least``."""
    case = zskt(graph, vaccine=VaccineConfig(selection_batches=6))
    assert isinstance(case.step, TransferStep) and case.step.vaccine is not None
    select = case.step.vaccine.select

    def with_least() -> None:
        with mock.patch.object(vaccine, "LEAST_TAIL_RATIO", least):
            select()

    case.step.vaccine.select = with_least  # type: ignore[method-assign]
    return case


def retrospective(graph: GraphMode, optimizer: OptimizerConfig, convention: Convention, **options: Any) -> Case:
    """OOD's and CMI's last epochs, of five batches; they differ in optimizer and divergence."""
    ranks = dist.start(PRECISION, None)
    context = SimpleNamespace(ranks=ranks, seed=0)
    teacher = classifier("wrn_16_1", ranks).eval().requires_grad_(False)
    pair: Any = SimpleNamespace(
        student=synchronised(classifier("wrn_10_1", ranks), ranks, second_order=True),
        teacher=teacher,
        image_size=IMAGE,
        context=context,
    )
    share = partial(distillation, temperature=2.0, batch_size=BATCH)
    config = RetrospectionConfig(restart_lr=1e-3, inner_rounds=2, K=3, **options)
    step = RetrospectiveStep(
        pair, config, optimizer, share, partial(share, convention=convention),
        batch_size=BATCH, steps_per_epoch=5, epochs=STEPS // 5, graph=graph,
    )  # fmt: skip
    images, labels = images_and_labels(STEPS * BATCH)
    batches = Shares(images, labels, BATCH, ranks).epoch(0)
    return Case(step, list(zip(batches, positions(5), strict=False)), (step.graphed,), (step.update,))


def tuned(graph: GraphMode, make: Callable[[Classifier, dict[str, Any]], TuningStep]) -> Case:
    """make: gets the model and the options of its step."""
    ranks = dist.start(PRECISION, None)
    given, epoch = labelled(ranks)
    model = classifier("small_resnet", ranks)
    synchronised(model, ranks)
    step = make(model, {"ranks": ranks, "steps_per_epoch": epoch, "graph": graph})
    return Case(step, given, (step.graphed,), (step.update,))


def ft(model: Classifier, options: dict[str, Any]) -> TuningStep:
    return TuningStep(model, sgd(period=4), epochs=STEPS, **options)


def ft_sam_(model: Classifier, options: dict[str, Any]) -> TuningStep:
    return ft_sam.SamStep(ft_sam.Config(**_DEFENCE), model=model, **options)


def nad_(model: Classifier, options: dict[str, Any]) -> TuningStep:
    return nad.AttentionStep(nad.Config(**_DEFENCE), model, copy.deepcopy(model), **options)


def fp_(model: Classifier, options: dict[str, Any]) -> TuningStep:
    step = fp.PrunedStep(fp.Config(**_DEFENCE), model, "linear", **options)
    step.prune([1, 3])
    return step


def sau_(model: Classifier, options: dict[str, Any]) -> TuningStep:
    return sau.SharedStep(sau.Config(**_DEFENCE), model, **options)


def reactivate_(model: Classifier, options: dict[str, Any]) -> TuningStep:
    config = ReactivationConfig(**_DEFENCE, epochs=STEPS, graph=options.pop("graph"))
    return ReactivationStep(config, model, lambda: None, **options)


def nc(graph: GraphMode) -> Case:
    ranks = dist.start(PRECISION, None)
    given, epoch = labelled(ranks)
    step = SearchStep(classifier("small_resnet", ranks), SearchConfig(), [0, 3], ranks, epoch, graph)
    return Case(step, given, (step.graphed,), (step.update,))


def decree(graph: GraphMode) -> Case:
    """Masks are found by the first steps, and the cost rises within twenty."""
    ranks = dist.start(PRECISION, None)
    given, epoch = labelled(ranks)
    encoder = classifier("small_resnet", ranks).net
    config = InversionConfig("e", DatasetConfig("d"), seeds=(0, 3), threshold=0.5)
    step = InversionStep(encoder, config, IMAGE, ranks, epoch, graph)
    return Case(step, given, (step.graphed,), (step.update,))


_DEFENCE: dict[str, Any] = {"model": "m", "data": DatasetConfig("d"), "test": DatasetConfig("t")}
_ADAM = OptimizerConfig("adam", lr=1e-3)
_SGD = OptimizerConfig("sgd", lr=1e-3, momentum=0.9)
_MULTISTEP = OptimizerConfig("sgd", lr=0.1, momentum=0.9, schedule="multistep", milestones=(3, 9))
_LATE = RetrospectionConfig(start=3, restart_lr=5e-4, inner_rounds=2)
_OF_STUDENT = RetrospectionConfig(start=3, inner_rounds=2, perturbs="student", statistics="published")
CASES: dict[str, Callable[[GraphMode], Case]] = {
    "ibau": ibau,
    "ibau, kept": lambda graph: ibau(graph, is_constant=True),
    "ibau, orders": lambda graph: ibau(graph, is_constant=True, orders=3),
    "ibau, cg": lambda graph: ibau(graph, solver="cg"),
    "ibau, amsgrad": lambda graph: ibau(graph, optimizer=OptimizerConfig("adam", lr=1e-4, amsgrad=True)),
    "ibau, sgd outside and inside": lambda graph: ibau(graph, optimizer=_SGD, inner=_SGD),
    "ibau, lars": lambda graph: ibau(graph, optimizer=OptimizerConfig("lars", lr=1e-2)),
    "ibau, adam inside, clamped": lambda graph: ibau(graph, inner=OptimizerConfig("adam", lr=1.0), clamp=True),
    "ibau, batch norm": lambda graph: ibau(graph, arch="small_resnet"),
    "rnp unlearn": unlearn,
    "rnp unlearn, clipped": lambda graph: unlearn(graph, max_grad_norm=1.0),
    "rnp unlearn, dropout": lambda graph: unlearn(graph, arch="ibau_vgg", max_grad_norm=1.0),
    "rnp recover": recover,
    "ft": partial(tuned, make=ft),
    "ft_sam": partial(tuned, make=ft_sam_),
    "nad": partial(tuned, make=nad_),
    "fp": partial(tuned, make=fp_),
    "sau": partial(tuned, make=sau_),
    "reactivate": partial(tuned, make=reactivate_),
    "nc": nc,
    "decree": decree,
    "zskt": zskt,
    "zskt, multistep": lambda graph: zskt(graph, student_optimizer=_MULTISTEP),
    "zskt, vaccine": lambda graph: zskt(graph, vaccine=VaccineConfig()),
    "zskt, retrospection": lambda graph: zskt(graph, retrospection=_LATE),
    "zskt, retrospection on the student": lambda graph: zskt(graph, retrospection=_OF_STUDENT),
    "zskt, both": lambda graph: zskt(graph, vaccine=VaccineConfig(), retrospection=_LATE),
    "zskt, vaccine rejected": lambda graph: selected(graph, least=1.0),
    "zskt, vaccine taken": lambda graph: selected(graph, least=-1.0),
    "ood": lambda graph: retrospective(graph, _ADAM, "batchmean", statistics="published"),
    "ood, on the student": lambda graph: retrospective(graph, _ADAM, "mean", perturbs="student"),
    "cmi": lambda graph: retrospective(graph, _SGD, "mean", detach_reference=False),
}


def tensors(state: Any) -> Iterator[Tensor]:
    """Copies of all in a state."""
    if isinstance(state, Tensor):
        yield state.detach().clone()
    for child in state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else []:
        yield from tensors(child)
