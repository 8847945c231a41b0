"""The ledger's calls of defences."""

from collections.abc import Callable
from functools import partial
from itertools import cycle
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor

from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.step import GradientStep, Position, Step
from dist_defend.methods.defend import anp
from dist_defend.methods.defend.abd.options import RetrospectionConfig, VaccineConfig
from dist_defend.methods.defend.abd.retrospective_step import RetrospectiveStep
from dist_defend.methods.defend.abd.vaccine import Vaccine
from dist_defend.methods.defend.cmi.options import Config as CmiConfig
from dist_defend.methods.defend.cmi.options import SynthesisConfig
from dist_defend.methods.defend.cmi.steps import CmiBatches, CmiStep, PoolObjective
from dist_defend.methods.defend.cmi.synthesis import Synthesis
from dist_defend.methods.defend.ibau.options import Config as IbauConfig
from dist_defend.methods.defend.ibau.rounds import Rounds
from dist_defend.methods.defend.ibau.step import UnlearningStep
from dist_defend.methods.defend.kd import DistillationObjective
from dist_defend.methods.defend.nc.search import SearchConfig, SearchStep
from dist_defend.methods.defend.ood import OodObjective
from dist_defend.methods.defend.rnp.steps import RecoverStep, UnlearnStep
from dist_defend.methods.defend.tuning.step import TuningStep
from dist_defend.methods.defend.zskt.batches import LatentBatches
from dist_defend.methods.defend.zskt.options import Config as TransferConfig
from dist_defend.methods.defend.zskt.step import TransferStep
from dist_defend.models.classifier import Classifier
from dist_defend.models.generator import ZSKTGenerator
from dist_defend.models.masked_norm import mask_norms, norm_names
from dist_defend.ops.losses import Convention, distillation
from tests.capture import cases
from tests.capture.ledger import DEVICE
from tests.capture.ledger_parts import (
    CLASSES,
    DATA,
    RANKS,
    SIZE,
    Batches,
    Call,
    batch_of,
    classifier,
    gradient,
    images,
    stepped,
    surroundings,
    teacher,
)


def pair() -> Any:
    """What Pair holds of teacher and student."""
    suspect = teacher()

    def taught(x: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = suspect(x)
        return logits

    return SimpleNamespace(
        teacher=suspect, student=classifier("wrn_16_1"), image_size=SIZE, context=surroundings(), taught=taught,
        num_classes=CLASSES, path="m", card=SimpleNamespace(arch="wrn_16_2"),
    )  # fmt: skip


def distilled() -> Call:
    return gradient(DistillationObjective(pair(), 6.0, 0.95), batch_of(128))


def of_anything(vaccine: VaccineConfig | None = None) -> Call:
    both = pair()
    chosen = None if vaccine is None else Vaccine(both.teacher.net, vaccine, 0)
    return gradient(OodObjective(both, 8.0, chosen), batch_of(512))


def retrospective(
    both: Any, optimizer: str, batch_size: int, convention: Convention, **options: Any
) -> RetrospectiveStep:
    share = partial(distillation, temperature=8.0, batch_size=batch_size, convention=convention)
    return RetrospectiveStep(
        both, RetrospectionConfig(restart_lr=5e-4, **options), OptimizerConfig(cast(Any, optimizer)), share, share,
        batch_size=batch_size, steps_per_epoch=10, epochs=10, graph="on",
    )  # fmt: skip


def retrospection(batch_size: int, **options: Any) -> Call:
    """What one graph replays."""
    step = retrospective(pair(), "adam", batch_size, "mean", **options)
    start, patched = torch.zeros(1, 3, SIZE, SIZE, device=DEVICE), torch.zeros(batch_size, 1, 1, 1, device=DEVICE)
    return partial(step.imitate, images(batch_size), start, patched)


def inverted(part: str) -> Call:
    """Calls of CMI: an iteration of the synthesis, the last one of an epoch too, and a step on the pool."""
    config, both = CmiConfig("m", DATA, vaccine=VaccineConfig(), synthesis=SynthesisConfig(iterations=4)), pair()
    vaccine = Vaccine(both.teacher.net, VaccineConfig(), 0)
    synthesis = Synthesis(config.synthesis, both, 1024, vaccine)
    synthesis.pool.count, synthesis.bank.added = 512, 512
    if part == "retrospection":
        short: dict[str, Any] = {"inner_rounds": 2, "K": 2, "detach_reference": False}
        update: Step = retrospective(both, "sgd", config.update.batch_size, "batchmean", **short)
    else:
        update = GradientStep(PoolObjective(both, 20.0), config.update, RANKS, steps_per_epoch=10)
    source = CmiBatches(config, CLASSES, 0, RANKS)
    step = CmiStep(source, synthesis, update, both, 1)
    number = {"synthesis": 1, "last of the synthesis": config.synthesis.iterations - 1}.get(part, 4)
    batches = (next(iter(source.epoch(1, number))) for _ in range(9))
    return stepped(step, batches, cycle([Position(0, 0, number, 7)]))


def ibau(arch: str = "ibau_vgg", batch_size: int = 100, **options: Any) -> tuple[UnlearningStep, Rounds]:
    config = IbauConfig("m", DATA, DATA, batch_size=batch_size, graph="on", **options)
    rounds = Rounds(cast(Any, Batches(2 * batch_size, batch_size)), SIZE, RANKS, orders=config.num_orders)
    return UnlearningStep(classifier(arch, "none"), config, rounds, 0), rounds


def inner(arch: str, **options: Any) -> Call:
    step, rounds = ibau(arch, **options)
    padded, _, weights = rounds.padded(batch_of(100), 0)
    return partial(step.ascend, padded, weights)


def outer(arch: str, **options: Any) -> Call:
    step, rounds = ibau(arch, **options)
    padded, labels, weights = rounds.padded(batch_of(100), 0)
    return partial(step.unlearn, padded, labels, torch.zeros(100, 1, 1, 1, device=DEVICE), weights)


def unlearning(first: int, **options: Any) -> Call:
    """The calls from the first one of a round on; a round is two inner ones of each order and two outer ones."""
    step, rounds = ibau(**options)
    count = rounds.num_batches
    batches = (batch for _ in range(9) for batch in list(rounds.epoch(0))[first:])
    places = (Position(0, n, number, count * n + number) for n in range(9) for number in range(first, count))
    return stepped(step, batches, places)


def unlearn(arch: str = "resnet18", **options: Any) -> UnlearnStep:
    return UnlearnStep(classifier(arch), RANKS, graph="on", **options)


def recover(arch: str = "resnet18") -> RecoverStep:
    model = classifier(arch)
    return RecoverStep(model, mask_norms(model, norm_names(model)), RANKS, graph="on")


def learning(step: UnlearnStep | RecoverStep, batch_size: int = 128) -> Call:
    batch = batch_of(batch_size)
    return partial(step.learn, batch.images, batch.labels)


def pruned(**options: Any) -> Call:
    config = anp.Config(model="m", test=DATA, data=DATA, **options)
    with mock.patch.object(torch, "Generator", lambda device: torch._C.Generator("cpu")):
        model = classifier("preact_resnet18")
        objective = anp.AnpObjective(model, norm_names(model.net), config)
    sgd = UpdateConfig(epochs=10, optimizer=OptimizerConfig("sgd", lr=0.2))
    update = GradientStep(objective, sgd, RANKS, steps_per_epoch=10)
    return stepped(anp.AnpStep(update, objective, 0), cycle([batch_of(128)]))


def tuned(make: Callable[[Classifier, dict[str, Any]], TuningStep], arch: str = "preact_resnet18") -> Call:
    """What one graph of a tuning defence replays, for BackdoorBench's 256 images."""
    batch = batch_of(256)
    step = make(classifier(arch), {"ranks": RANKS, "steps_per_epoch": 10, "graph": "on"})
    return partial(step.learn, batch.images, batch.labels)


def tuning() -> Call:
    step = cases.ft(classifier("preact_resnet18"), {"ranks": RANKS, "steps_per_epoch": 10, "graph": "on"})
    return stepped(step, cycle([batch_of(256)]))


def searched() -> Call:
    step = SearchStep(classifier("preact_resnet18"), SearchConfig(), range(CLASSES), RANKS, 10, "on")
    return partial(step.learn, images(256))


_SV, _SR, _SHORT = VaccineConfig(), RetrospectionConfig(), RetrospectionConfig(inner_rounds=2, K=2)


def transfer(**options: Any) -> TransferStep:
    config = TransferConfig("m", DATA, graph="on", student_steps=1, **options)
    suspect = teacher().net
    return TransferStep(suspect, classifier("wrn_16_1").net, ZSKTGenerator(), config, RANKS, 0)


def transferred(**options: Any) -> Call:
    step = transfer(**options)
    latents = LatentBatches(step.config.batch_size, step.config.z_dim, 0, RANKS)
    batches = (batch for epoch in range(9) for batch in latents.epoch(epoch))
    return stepped(step, batches, (Position(0, epoch, 0, epoch) for epoch in range(9)))


def generator(**options: Any) -> Call:
    step = transfer(**options)
    weight = [step.weight] if step.vaccine else []
    return partial(step.generate, torch.zeros(step.config.batch_size, step.config.z_dim, device=DEVICE), *weight)


def student(**options: Any) -> Call:
    step = transfer(**options)
    patched = [torch.zeros(step.config.batch_size, 1, 1, 1, device=DEVICE)] if step.retrospection else []
    return partial(step.imitate, *patched)


def perturbation(**options: Any) -> Call:
    step = transfer(retrospection=RetrospectionConfig(**options))
    return partial(step.synthesise, torch.zeros(1, 3, SIZE, SIZE, device=DEVICE))


DEFENCES: dict[str, Callable[[], Call]] = {
    "kd: step": distilled,
    "ood: step": of_anything,
    "ood, sv: step": lambda: of_anything(_SV),
    "ood: retrospection update": lambda: retrospection(512),
    "cmi, synthesis: step": lambda: inverted("synthesis"),
    "cmi, last of the synthesis: step": lambda: inverted("last of the synthesis"),
    "cmi, distillation: step": lambda: inverted("distillation"),
    "cmi, retrospection: step": lambda: inverted("retrospection"),
    "ibau, inner: step": lambda: unlearning(0),
    "ibau, choice of two orders: step": lambda: unlearning(2, orders=2),
    "ibau, outer: step": lambda: unlearning(2),
    "ibau vgg: inner update": lambda: inner("ibau_vgg"),
    "ibau vgg: outer update": lambda: outer("ibau_vgg"),
    "ibau vgg, cg: outer update": lambda: outer("ibau_vgg", solver="cg"),
    "ibau resnet18: inner update": lambda: inner("resnet18"),
    "ibau resnet18: outer update": lambda: outer("resnet18"),
    "rnp, unlearn: step": lambda: stepped(unlearn(), cycle([batch_of(128)])),
    "rnp, recover: step": lambda: stepped(recover(), cycle([batch_of(128)])),
    "rnp resnet18: unlearn update": lambda: learning(unlearn()),
    "rnp resnet18, clipped: unlearn update": lambda: learning(unlearn(max_grad_norm=1.0)),
    "rnp resnet18: recover update": lambda: learning(recover()),
    "rnp vgg: unlearn update": lambda: learning(unlearn("ibau_vgg")),
    "anp: step": pruned,
    "ft: step": tuning,
    "ft: update": lambda: tuned(cases.ft),
    "ft_sam: update": lambda: tuned(cases.ft_sam_),
    "nad: update": lambda: tuned(cases.nad_),
    "nad wrn: update": lambda: tuned(cases.nad_, "wrn_16_1"),
    "fp: update": lambda: tuned(cases.fp_),
    "sau: update": lambda: tuned(cases.sau_),
    "reactivate: update": lambda: tuned(cases.reactivate_),
    "nc: search update": searched,
    "zskt: step": transferred,
    "zskt, sv: step": lambda: transferred(vaccine=_SV),
    "zskt, sr: step": lambda: transferred(retrospection=_SHORT),
    "zskt, both: step": lambda: transferred(vaccine=_SV, retrospection=_SHORT),
    "zskt: generator update": generator,
    "zskt, sv: generator update": lambda: generator(vaccine=_SV),
    "zskt: student update": student,
    "zskt, sr: student update": lambda: student(retrospection=_SR),
    "zskt, sr: perturbation update": perturbation,
    "zskt, sr on the student: perturbation update": lambda: perturbation(perturbs="student"),
}
