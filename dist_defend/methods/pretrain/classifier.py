"""Supervised training of a classifier on clean data, or on data that an attacker has poisoned.

A poisoned run differs from a clean one in its data set alone.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dist_defend.attacks.attack import AttackConfig
from dist_defend.attacks.poison import STAMPED, image_size_of, poisoned, save_flags
from dist_defend.batch import Batch
from dist_defend.bounds import at_least_one
from dist_defend.counts import percents, warn_near_chance
from dist_defend.data.augment import AugmentConfig, View
from dist_defend.data.classes import named_classes, tell_missing_classes
from dist_defend.data.loader import DatasetConfig
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.objective import Objective, at_least_float32
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.trainer import Stage
from dist_defend.errors import UserError
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.trial import Examination


@dataclass(frozen=True)
class Config:
    """Defaults are SCLBD/BackdoorBench's for CIFAR-10; it flips images of no other set (``augment: {crop: pad}``).

    Keys:
        data: clean, labelled training images
        test: labelled test images, used for measurement only
        arch: architecture of the network (`dist-defend models`)
        normalization: normalisation constants of the network's first layer
        augment: augmentation of the training images
        attack: the attack on the training images; null: none. With rate 0 the model stays clean and is tested with the
            trigger
        update: batch size, epochs, optimizer and the like
        evaluate_every: epochs between two measurements; there is one after the last epoch too
    """

    data: DatasetConfig
    test: DatasetConfig
    arch: str = "preact_resnet18"
    normalization: str = "cifar10_backdoorbench"
    augment: AugmentConfig = AugmentConfig(crop="pad", pad=4, flip=0.5)
    attack: AttackConfig | None = None
    update: UpdateConfig = UpdateConfig(
        batch_size=128,
        epochs=100,
        optimizer=OptimizerConfig("sgd", lr=0.01, momentum=0.9, weight_decay=5e-4, schedule="cosine"),
    )
    evaluate_every: int = 10

    def __post_init__(self) -> None:
        at_least_one(self, "evaluate_every")


PRESETS: dict[str, dict[str, Any]] = {
    "backdoorbench": {},
    "rnp": {  # bboylyg/RNP, train_backdoor.py; its loader does not shuffle
        "arch": "resnet18",
        "normalization": "cifar10",
        "update": {
            "batch_size": 128,
            "epochs": 61,
            "optimizer": {
                "name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4,
                "schedule": "multistep", "milestones": [10, 20],
            },
        },
    },
    "abd_cifar10": {  # Hong et al. 2023: the teachers of ABD
        "arch": "wrn_16_2",
        "normalization": "cifar10",
        "update": {
            "batch_size": 128,
            "epochs": 200,
            "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "cosine"},
        },
    },
    "abd_gtsrb": {
        "arch": "wrn_16_2",
        "normalization": "gtsrb",
        "update": {
            "batch_size": 256,
            "epochs": 200,
            "optimizer": {"name": "adam", "lr": 0.1, "weight_decay": 5e-4, "schedule": "cosine"},
        },
    },
    "ibau": {"arch": "ibau_vgg", "normalization": "none"},  # YiZeng623/I-BAU tells the network, not how it was trained
}  # fmt: skip


class ClassificationObjective(Objective):
    """Mean cross-entropy over the batch's images (B, 3, H, W) and labels (B,); ``train_acc`` in [0, 1]."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits = at_least_float32(self.model(batch.images))
        hits = (logits.argmax(1) == batch.labels).to(logits.dtype)
        return {"loss": functional.cross_entropy(logits, batch.labels), "train_acc": hits.mean()}


def build(config: Config, context: Context) -> Plan:
    """One stage: train from fresh weights, evaluating as configured."""
    clean_train, rows = context.dataset("train", config.data, is_labelled=True)
    test, test_rows = context.dataset("test", config.test, is_labelled=True)
    context.check_classes(clean_train.classes, config.data.path, test.classes, config.test.path)
    size = _image_size(clean_train, test, config)
    torch.manual_seed(context.seed)
    model = build_classifier(config.arch, test.num_classes, config.normalization, image_size=size)
    context.synchronise(model)
    train, flags = clean_train, np.zeros(len(clean_train), np.uint8)
    if config.attack is not None:
        train = poisoned(clean_train, rows, config.attack, context.seed)
        flags = train.flags
        if config.attack.choose == "first":
            _tell_missing(context, clean_train, rows, flags, config)
    examination = Examination(test, test_rows, config.attack, test.num_classes, context)
    update, shown = config.update, ("loss", "train_acc")
    loader = context.train_loader(train, rows, update.batch_size, (View(config.augment),), update.accumulation)
    step = context.gradient_step(ClassificationObjective(model), update, loader.num_batches)
    is_backdoored = bool((flags == STAMPED).any())

    kind = "backdoored" if is_backdoored else "clean"

    def result() -> dict[str, Any]:
        on_clean, on_triggered = examination.predict(model)
        counts = examination.counts(on_clean, on_triggered)
        warn_near_chance(kind, examination.task, counts["acc"], model.num_classes)
        folder = context.folder if context.ranks.is_main else None
        examination.look_inside(kind, model)
        examination.save_examples()
        card = context.card(
            model,
            {"epochs": update.epochs, "seed": context.seed, **save_flags(flags, folder)},
            classes=named_classes(test.classes, clean_train.classes),
            backdoored=is_backdoored,
            attack=asdict(config.attack) if config.attack is not None and is_backdoored else None,
        )
        return {
            "model_sha256": context.save_model(model, card),
            "rows": [examination.row(kind, counts)],
            **examination.names(),
            "metrics": {
                "num_poisoned": int((flags == STAMPED).sum()),
                "per_class_accuracy": examination.per_class(on_clean),
            },
        }

    def evaluate(epoch: int) -> dict[str, float]:
        return percents(examination.measure(model))

    stage = Stage("classifier", loader, step, update.epochs, evaluate, config.evaluate_every, shown=shown)
    return Plan([stage], result)


def _tell_missing(
    context: Context, clean: PreparedDataset, rows: np.ndarray, flags: np.ndarray, config: Config
) -> None:
    """Warn of classes that could be poisoned and are not, for instance if the first rows are all of one class."""
    assert config.attack is not None
    labels, target = clean.labels[rows], config.attack.target_class
    if config.attack.avoid_target:
        labels = np.where(labels == target, -1, labels)
    elif config.attack.labels == "clean_label":
        labels = np.where(labels == target, labels, -1)
    poisons = np.flatnonzero(flags[rows] == STAMPED)
    missing = tell_missing_classes(labels, poisons, clean.classes) if len(poisons) else None
    if missing is not None:
        context.tell(
            f"key 'classifier.attack.choose' is first: of {config.data.path} {missing}; say random, or prepare it "
            "again without --keep-order"
        )


def _image_size(train: PreparedDataset, test: PreparedDataset, config: Config) -> int:
    """The side of the images in pixels. UserError unless both sets have it, and the views too."""
    if train.image_shape != test.image_shape:
        raise UserError(
            f"{config.test.path} has images of {test.image_shape}, {config.data.path} of {train.image_shape}: use two "
            "splits of one data set, or say resize for both"
        )
    size = image_size_of(train)
    if config.augment.size not in (None, size):
        raise UserError(
            f"key 'classifier.augment.size' is {config.augment.size}, but the test images have {size} px: leave it "
            "out, or prepare the data set at that size"
        )
    return size
