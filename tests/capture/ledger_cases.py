"""What ledger.json counts: every step with what the trainer does around it, and every update that becomes a graph.

A key ``NAME: step`` is a whole call of a step with its batch, at a size that the method is used at; ``NAME: PART
update`` is what one graph replays.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from dist_defend.attacks.input_aware import Generators
from dist_defend.attacks.reference import ReferenceConfig
from dist_defend.batch import Batch
from dist_defend.counts import extract_features, knn_predict, predict
from dist_defend.data.augment import View
from dist_defend.data.loader import DatasetConfig, LoaderConfig
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context, UpdateConfig
from dist_defend.engine.dist import Ranks
from dist_defend.engine.objective import Objective
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.engine.step import GradientStep, Position, Step
from dist_defend.engine.trainer import Stage, Trainer, TrainerConfig
from dist_defend.methods.attack import badencoder, input_aware
from dist_defend.methods.defend import anp
from dist_defend.methods.defend.abd.options import RetrospectionConfig, VaccineConfig
from dist_defend.methods.defend.abd.retrospective_step import RetrospectiveStep
from dist_defend.methods.defend.abd.vaccine import Vaccine
from dist_defend.methods.defend.ibau.options import Config as IbauConfig
from dist_defend.methods.defend.ibau.rounds import Rounds
from dist_defend.methods.defend.ibau.step import UnlearningStep
from dist_defend.methods.defend.kd import DistillationObjective
from dist_defend.methods.defend.mimic import MimicObjective
from dist_defend.methods.defend.mimic.information import InformationConfig, LayerInformation
from dist_defend.methods.defend.nc.search import SearchConfig, SearchStep
from dist_defend.methods.defend.ood import OodObjective
from dist_defend.methods.defend.rnp.steps import RecoverStep, UnlearnStep
from dist_defend.methods.defend.tuning.step import TuningStep
from dist_defend.methods.defend.zskt.batches import LatentBatches
from dist_defend.methods.defend.zskt.options import Config as TransferConfig
from dist_defend.methods.defend.zskt.step import TransferStep
from dist_defend.methods.measure import probe, zeroshot
from dist_defend.methods.pretrain.classifier import ClassificationObjective
from dist_defend.methods.pretrain.simclr import SimCLRObjective
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.models.encoder import SimCLR, build_simclr
from dist_defend.models.generator import ZSKTGenerator
from dist_defend.models.masked_norm import mask_norms, norm_names
from dist_defend.ops.losses import Convention, distillation
from tests.capture import cases
from tests.capture.ledger import DEVICE, Accelerator

SIZE, CLASSES, ROWS = 32, 10, 1000
RANKS = Ranks(cast(Any, Accelerator()), torch.float32)
Call = Callable[[], object]
_DATA = DatasetConfig("data")


def images(count: int, size: int = SIZE) -> Tensor:
    """As a loader gives them on a GPU."""
    return torch.empty(count, 3, size, size, device=DEVICE).contiguous(memory_format=torch.channels_last)


def batch_of(count: int, views: int = 1, size: int = SIZE) -> Batch:
    labels, index = torch.zeros(2, count, dtype=torch.int64, device=DEVICE).unbind()
    return Batch(tuple(images(count, size) for _ in range(views)), labels, index)


class Batches:
    """As data.loader.Loader, on a GPU."""

    def __init__(self, num_samples: int, batch_size: int, views: int = 1, size: int = SIZE) -> None:
        self.num_samples, self.batch_size, self.views, self.size = num_samples, batch_size, views, size
        self.num_batches = -(-num_samples // batch_size)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        for number in range(start_batch, self.num_batches):
            count = min(self.batch_size, self.num_samples - number * self.batch_size)
            yield batch_of(count, self.views, self.size)


@dataclass
class Surroundings(Context):
    """What a method's build() is given: models with fresh weights, and data sets without content."""

    arch: str = "resnet18_cifar"
    size: int = SIZE
    has_content = False

    def dataset(self, role: str, config: DatasetConfig, is_labelled: bool = False) -> tuple[Any, np.ndarray]:
        labels, shape = np.arange(ROWS) % CLASSES, (self.size, self.size, 3)
        names = tuple(map(str, range(CLASSES)))
        data = SimpleNamespace(image_shape=shape, labels=labels, num_classes=CLASSES, classes=names, path=Path("data"))
        return data, np.arange(ROWS)

    def check_order(self, dataset: PreparedDataset, rows: np.ndarray, batch_size: int) -> None:
        """Nothing to tell."""

    def load_encoder(self, folder: str) -> tuple[SimCLR, Any, str]:
        card = SimpleNamespace(backdoored=False, attack=None, guessed=())
        return encoder(self.arch, self.size), card, ""

    def _loader(
        self, dataset: PreparedDataset, rows: np.ndarray | None, batch_size: int, views: Sequence[View], **how: Any
    ) -> Any:
        return Batches(ROWS if rows is None else len(rows), batch_size, len(views), self.size)


def surroundings(**options: Any) -> Surroundings:
    return Surroundings(RANKS, 0, LoaderConfig(), Path("run"), **options)


def stepped(step: Step, batches: Iterator[Batch], at: Iterator[Position] | None = None) -> Call:
    """What Trainer.fit does with every batch."""
    trainer = Trainer(RANKS, cast(Any, None), TrainerConfig())
    places = at or cycle([Position()])

    def call() -> None:
        batch = next(batches)
        trainer._add(step(trainer._move(batch), next(places)), len(batch.labels))

    return call


def staged(stage: Stage) -> Call:
    """The step of a stage, with its own batches."""
    return stepped(stage.step, (batch for epoch in range(9) for batch in stage.loader.epoch(epoch)))


def gradient(objective: Objective, batch: Batch, **options: Any) -> Call:
    update = UpdateConfig(epochs=10, optimizer=OptimizerConfig("adam"), **options)
    step = GradientStep(objective, update, RANKS, steps_per_epoch=10)
    return stepped(step, cycle([batch]))


def encoder(arch: str = "resnet18_cifar", size: int = SIZE) -> SimCLR:
    return build_simclr(arch, "cifar10", size)


def classifier(arch: str, normalization: str = "cifar10") -> Classifier:
    model = build_classifier(arch, CLASSES, normalization, SIZE)
    moved: Classifier = model.to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def teacher(arch: str = "wrn_16_2") -> Classifier:
    return classifier(arch).eval().requires_grad_(False)


def simclr(**options: Any) -> Call:
    objective = SimCLRObjective(encoder(), 0.5, grad_cache="accumulation" in options)
    return gradient(objective, batch_of(256, 2), **options)


def attack(arch: str = "resnet18_cifar", size: int = SIZE, batch_size: int = 256) -> Call:
    """BadEncoder as it is built: norms folded, one reference, clean features computed once."""
    reference = np.zeros((1, size, size, 3), np.uint8), np.zeros(1, np.int64)
    config = badencoder.Config("encoder", _DATA, ReferenceConfig("r.npz"), update=UpdateConfig(batch_size, epochs=1))
    with mock.patch.object(badencoder, "references_from", lambda *_: reference):
        (stage,) = badencoder.build(config, surroundings(arch=arch, size=size)).stages
    return staged(stage)


def mimic() -> Call:
    return gradient(MimicObjective(encoder(), encoder().to(DEVICE), 0.5, (1000.0,) * 4, 1.0), batch_of(128, 2))


def information() -> Call:
    context = surroundings()
    network = encoder().to(DEVICE)
    step = LayerInformation(InformationConfig(), network, context, *context.dataset("", _DATA))
    return staged(step.stage(lambda: None))


def heads() -> Call:
    """Of one encoder, with three seeds; batches and dropout draws come from the host."""
    tasks = {"task": probe.TaskConfig(_DATA, _DATA, 0)}
    config = probe.Config({"clean": "m"}, tasks, seeds=(1, 2, 3), update=UpdateConfig(256, 1))
    context = surroundings()
    made = probe.TrainedHeads("task", config, [encoder().f.to(DEVICE)], context, context.dataset("", _DATA))
    return staged(made.stages[0])


def neighbours() -> Call:
    queries, bank = (torch.zeros(count, 512, device=DEVICE) for count in (512, 50_000))
    return partial(knn_predict, queries, bank, torch.zeros(50_000, dtype=torch.int64, device=DEVICE), CLASSES)


def zero_shot() -> Call:
    """A batch of images against the classes' texts."""
    tower, texts = encoder("open_clip:RN50", 224).f.to(DEVICE), torch.zeros(CLASSES, 1024, device=DEVICE)

    def call() -> Tensor:
        features, _, _ = extract_features(tower, cast(Any, Batches(256, 256, size=224)), RANKS)
        return zeroshot.logits(features, texts).argmax(1)

    return call


def evaluation() -> Call:
    return partial(predict, classifier("preact_resnet18"), cast(Any, Batches(512, 512)), RANKS)


def classification(**options: Any) -> Call:
    return gradient(ClassificationObjective(classifier("preact_resnet18")), batch_of(128), **options)


_INPUT_AWARE = input_aware.Config(_DATA, _DATA)


def mask_stage() -> Call:
    generators = Generators(SIZE, "cifar10").to(DEVICE)
    return gradient(input_aware.MaskObjective(generators, _INPUT_AWARE), batch_of(128))


def joint_stage() -> Call:
    generators = Generators(SIZE, "cifar10").to(DEVICE)
    step = input_aware.JointStep(classifier("preact_resnet18"), generators, _INPUT_AWARE, RANKS, 10)
    return stepped(step, cycle([batch_of(128)]))


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


def ibau(arch: str = "ibau_vgg", batch_size: int = 100, **options: Any) -> tuple[UnlearningStep, Rounds]:
    config = IbauConfig("m", _DATA, _DATA, batch_size=batch_size, graph="on", **options)
    rounds = Rounds(cast(Any, Batches(2 * batch_size, batch_size)), SIZE, RANKS)
    return UnlearningStep(classifier(arch, "none"), config, rounds, 0), rounds


def inner(arch: str, **options: Any) -> Call:
    step, rounds = ibau(arch, **options)
    padded, _, weights = rounds.padded(batch_of(100), 0)
    return partial(step.ascend, padded, weights)


def outer(arch: str, **options: Any) -> Call:
    step, rounds = ibau(arch, **options)
    padded, labels, weights = rounds.padded(batch_of(100), 0)
    return partial(step.unlearn, padded, labels, torch.zeros(100, 1, 1, 1, device=DEVICE), weights)


def unlearning(first: int) -> Call:
    """The calls from the first one of a round on; a round is two inner ones and two outer ones."""
    step, rounds = ibau()
    batches = (batch for _ in range(9) for batch in list(rounds.epoch(0))[first:])
    places = (Position(0, n, number, 4 * n + number) for n in range(9) for number in range(first, 4))
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
    config = anp.Config(model="m", test=_DATA, data=_DATA, **options)
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


def searched() -> Call:
    step = SearchStep(classifier("preact_resnet18"), SearchConfig(), range(CLASSES), RANKS, 10, "on")
    return partial(step.learn, images(256))


_SV, _SR = VaccineConfig(), RetrospectionConfig()


def transfer(**options: Any) -> TransferStep:
    config = TransferConfig("m", _DATA, graph="on", student_steps=1, **options)
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


CASES: dict[str, Callable[[], Call]] = {
    "simclr: step": simclr,
    "simclr, cached gradients: step": lambda: simclr(accumulation=2),
    "badencoder: step": attack,
    "badencoder, clip: step": lambda: attack("open_clip:RN50", 224, 16),
    "mimic: step": mimic,
    "mimic, information: step": information,
    "classifier: step": classification,
    "classifier, clipped: step": lambda: classification(max_grad_norm=1.0),
    "input_aware, mask: step": mask_stage,
    "input_aware, joint: step": joint_stage,
    "kd: step": distilled,
    "ood: step": of_anything,
    "ood, sv: step": lambda: of_anything(_SV),
    "ood: retrospection update": lambda: retrospection(512),
    "ibau, inner: step": lambda: unlearning(0),
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
    "ft: update": lambda: tuned(cases.ft),
    "ft_sam: update": lambda: tuned(cases.ft_sam_),
    "nad: update": lambda: tuned(cases.nad_),
    "nad wrn: update": lambda: tuned(cases.nad_, "wrn_16_1"),
    "fp: update": lambda: tuned(cases.fp_),
    "sau: update": lambda: tuned(cases.sau_),
    "nc: search update": searched,
    "zskt: step": transferred,
    "zskt, sv: step": lambda: transferred(vaccine=_SV),
    "zskt, sr: step": lambda: transferred(retrospection=_SR),
    "zskt, both: step": lambda: transferred(vaccine=_SV, retrospection=_SR),
    "zskt: generator update": generator,
    "zskt, sv: generator update": lambda: generator(vaccine=_SV),
    "zskt: student update": student,
    "zskt, sr: student update": lambda: student(retrospection=_SR),
    "zskt, sr: perturbation update": perturbation,
    "zskt, sr on the student: perturbation update": lambda: perturbation(perturbs="student"),
    "probe, head: step": heads,
    "probe, knn: block of queries": neighbours,
    "zeroshot: batch": zero_shot,
    "evaluation: batch": evaluation,
}
