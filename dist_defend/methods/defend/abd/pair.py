"""Teacher and student: the teacher is loaded, the student built, trained by a method and measured."""

import re
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_defend.attacks.attack import AttackConfig
from dist_defend.data.augment import AugmentConfig
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine.context import Context
from dist_defend.errors import UserError
from dist_defend.methods.defend.abd.diagnosis import diagnose
from dist_defend.methods.defend.abd.vaccine import Vaccine
from dist_defend.models.classifier import build_classifier
from dist_defend.trial import Trial


class Perturbing(Protocol):
    """A step of self-retrospection."""

    def perturbation(self) -> Tensor | None:
        """The latest delta (1, 3, H, W); None before there is one. A collective call."""


class Pair:
    """A frozen teacher in eval mode and a fresh student of the same classes, image size and normalisation.

    The test set and the attack (the configured one, else the one in the teacher's card) only serve to measure.
    """

    def __init__(
        self,
        teacher: str,
        student: str,
        test: DatasetConfig,
        attack: AttackConfig | None,
        context: Context,
        second_order: bool = False,
    ) -> None:
        """second_order: the student will be differentiated twice."""
        self.context, self.path = context, teacher
        self.trial = Trial(teacher, context)
        self.teacher, self.card = self.trial.model, self.trial.card
        self.teacher.eval().requires_grad_(False)
        self.test = self.trial.test_on(test, attack)
        torch.manual_seed(context.seed)
        resize = self.teacher.resize if _family(student) == _family(self.teacher.arch) else None
        self.student = build_classifier(student, self.num_classes, self.card.normalization, self.image_size, resize)
        context.synchronise(self.student, second_order)

    @property
    def num_classes(self) -> int:
        return self.teacher.num_classes

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.teacher.image_size

    def check_augment(self, augment: AugmentConfig) -> None:
        """UserError unless the augmented images have the teacher's image size."""
        if augment.size not in (None, self.image_size):
            key = f"{self.context.method}.augment.size"
            raise UserError(f"key '{key}' is {augment.size}, but {self.path} wants {self.image_size} px")

    @torch.no_grad()
    def taught(self, images: Tensor) -> Tensor:
        """The teacher's logits (B, C)."""
        with self.context.ranks.accelerator.autocast():
            logits: Tensor = self.teacher(images)
        return logits

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Accuracy and ASR of the student in percent, for the log."""
        return self.trial.evaluate(self.student)

    def result(
        self, metrics: dict[str, Any], vaccine: Vaccine | None = None, retrospection: Perturbing | None = None
    ) -> dict[str, Any]:
        """Save the student; returns the entries of result.json, in which the teacher is the suspect.

        With a vaccine the metrics have its outcome and, where the trigger is known, how well it separates triggered
        images (diagnose). A perturbation of the retrospection is kept for the report.
        """
        variant = "" if retrospection is None else "+sr"
        if retrospection is not None:
            with self.context.clock.measuring():
                delta = retrospection.perturbation()
            if delta is not None:
                self.test.show_perturbation(delta)
        if vaccine is not None:
            variant = f"+sv{variant}"
            metrics = {**metrics, "vaccine": vaccine.outcome()}
            if self.test.triggered is not None:
                loaders = self.test.clean, self.test.triggered
                told = diagnose(vaccine.ensemble, self.teacher, *loaders, self.context.ranks)
                metrics["vaccine"]["oracle"] = told
        return self.trial.result(self.student, variant=variant, metrics=metrics)


def _family(arch: str) -> str:
    """resnet for resnet18, timm:vit for timm:vit_tiny_patch16_224. Networks of one family resize images alike."""
    return re.split(r"[_\d]", arch)[0]
