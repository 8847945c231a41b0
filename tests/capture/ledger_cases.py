"""What ledger.json counts: every step with what the trainer does around it, and every update that becomes a graph.

A key ``NAME: step`` is a whole call of a step with its batch, at a size that the method is used at; ``NAME: PART
update`` is what one graph replays.
"""

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from dist_defend.attacks.input_aware import Generators
from dist_defend.attacks.reference import ReferenceConfig
from dist_defend.counts import extract_features, knn_predict, predict
from dist_defend.engine.context import UpdateConfig
from dist_defend.methods.attack import badencoder, drupe, input_aware
from dist_defend.methods.defend.mimic import MimicObjective
from dist_defend.methods.defend.mimic.information import InformationConfig, LayerInformation
from dist_defend.methods.defend.nad_simclr import AttentionObjective
from dist_defend.methods.measure import decree, probe, zeroshot
from dist_defend.methods.pretrain.classifier import ClassificationObjective
from dist_defend.methods.pretrain.simclr import SimCLRObjective
from tests.capture.ledger import DEVICE
from tests.capture.ledger_defences import DEFENCES
from tests.capture.ledger_loaders import LOADERS, OF_JPEGS
from tests.capture.ledger_parts import (
    CLASSES,
    DATA,
    RANKS,
    SIZE,
    Batches,
    Call,
    batch_of,
    classifier,
    encoder,
    gradient,
    images,
    staged,
    stepped,
    surroundings,
)


def simclr(**options: Any) -> Call:
    objective = SimCLRObjective(encoder(), 0.5, grad_cache="accumulation" in options)
    return gradient(objective, batch_of(256, 2), **options)


def attack(
    arch: str = "resnet18_cifar", size: int = SIZE, batch_size: int = 256, method: Any = badencoder, count: int = 1
) -> Call:
    """BadEncoder, or DRUPE, as it is built: norms folded, so many references, clean features computed once."""
    references = np.zeros((count, size, size, 3), np.uint8), np.zeros(count, np.int64)
    config = method.Config("encoder", DATA, ReferenceConfig("r.npz"), update=UpdateConfig(batch_size, epochs=1))
    with mock.patch.object(badencoder, "references_from", lambda *_: references):
        (stage,) = method.build(config, surroundings(arch=arch, size=size)).stages
    return staged(stage)


def mimic() -> Call:
    return gradient(MimicObjective(encoder(), encoder().to(DEVICE), 0.5, (1000.0,) * 4, 1.0), batch_of(128, 2))


def attention() -> Call:
    return gradient(AttentionObjective(encoder(), encoder().to(DEVICE), 0.5, (500.0, 1000.0, 1000.0)), batch_of(64, 2))


def information() -> Call:
    context = surroundings()
    network = encoder().to(DEVICE)
    step = LayerInformation(InformationConfig(), network, context, *context.dataset("", DATA))
    return staged(step.stage(lambda: None))


def heads() -> Call:
    """Of one encoder, with three seeds; batches and dropout draws come from the host."""
    tasks = {"task": probe.TaskConfig(DATA, DATA, 0)}
    config = probe.Config({"clean": "m"}, tasks, seeds=(1, 2, 3), update=UpdateConfig(256, 1))
    context = surroundings()
    made = probe.TrainedHeads("task", config, [encoder().f.to(DEVICE)], context, context.dataset("", DATA))
    return staged(made.stages[0])


def inversion(is_update: bool) -> Call:
    """As DECREE is built: three seeds, norms folded; a whole call, or what its graph replays."""
    (stage,) = decree.build(decree.Config("encoder", DATA, graph="on"), surroundings()).stages
    assert isinstance(stage.step, decree.InversionStep)
    return partial(stage.step.learn, images(128)) if is_update else staged(stage)


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


_INPUT_AWARE = input_aware.Config(DATA, DATA)


def mask_stage() -> Call:
    generators = Generators(SIZE, "cifar10").to(DEVICE)
    return gradient(input_aware.MaskObjective(generators, _INPUT_AWARE), batch_of(128))


def joint_stage() -> Call:
    generators = Generators(SIZE, "cifar10").to(DEVICE)
    step = input_aware.JointStep(classifier("preact_resnet18"), generators, _INPUT_AWARE, RANKS, 10)
    return stepped(step, cycle([batch_of(128)]))


CASES: dict[str, Callable[[], Call]] = {
    "simclr: step": simclr,
    "simclr, cached gradients: step": lambda: simclr(accumulation=2),
    "badencoder: step": attack,
    "badencoder, clip: step": lambda: attack("open_clip:RN50", 224, 16),
    "drupe: step": lambda: attack(method=drupe, count=3),
    "mimic: step": mimic,
    "mimic, information: step": information,
    "nad_simclr: step": attention,
    "classifier: step": classification,
    "classifier, clipped: step": lambda: classification(max_grad_norm=1.0),
    "input_aware, mask: step": mask_stage,
    "input_aware, joint: step": joint_stage,
    "decree: step": lambda: inversion(is_update=False),
    "decree: update": lambda: inversion(is_update=True),
    "probe, head: step": heads,
    "probe, knn: block of queries": neighbours,
    "zeroshot: batch": zero_shot,
    "evaluation: batch": evaluation,
    **DEFENCES,
    **LOADERS,
    **OF_JPEGS,
}
