"""Teacher and student: loading the one, building the other, measuring what was learned."""

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dist_defend.attacks.poison import PoisonConfig, poison_from, triggered
from dist_defend.data.augment import AugmentConfig
from dist_defend.data.loader import DatasetConfig
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context
from dist_defend.errors import UserError
from dist_defend.evaluate import Count, evaluate_classifier
from dist_defend.methods.abd.diagnosis import diagnose
from dist_defend.methods.abd.vaccine import Vaccine
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.ops.collectives import convert_sync_batchnorm


class Pair:
    """A frozen teacher in eval mode and a fresh student of the same classes, image size and normalisation.

    The test set and the attack (the configured one, else the one in the teacher's card) only serve to measure.
    """

    def __init__(
        self,
        teacher: str,
        student: str,
        test: DatasetConfig,
        attack: PoisonConfig | None,
        context: Context,
        second_order: bool = False,
    ) -> None:
        """second_order: the student will be differentiated twice."""
        self.context, self.path = context, teacher
        self.teacher, self.card, self.sha256 = context.load_classifier(teacher)
        ranks = context.ranks
        self.teacher.to(ranks.device, ranks.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.teacher.eval().requires_grad_(False)
        data, rows = context.dataset("test", test, is_labelled=True)
        self.check_fit(data, test.path, is_labelled=True)
        self.task = data.manifest.name
        self.attack = attack or (poison_from(self.card.trigger) if self.card.trigger else None)
        if self.attack is not None and self.attack.target_class >= self.num_classes:
            raise UserError(
                f"key 'attack.target_class' is {self.attack.target_class}; the classes are 0 to {self.num_classes - 1}"
            )
        self.clean = context.eval_loader(data, rows)
        self.triggered = None if self.attack is None else context.eval_loader(triggered(data, self.attack), rows)
        torch.manual_seed(context.seed)
        resize = self.teacher.resize if _family(student) == _family(self.teacher.arch) else None
        self.student = build_classifier(student, self.num_classes, self.card.normalization, self.image_size, resize)
        if ranks.world_size > 1:
            convert_sync_batchnorm(self.student, second_order)
        self.latest: dict[str, Count] = {}

    @property
    def num_classes(self) -> int:
        return self.teacher.num_classes

    @property
    def image_size(self) -> int:
        """Pixels."""
        return self.teacher.image_size

    def check_fit(self, data: PreparedDataset, path: str, is_labelled: bool = False) -> None:
        """UserError unless the images have the teacher's size and, where labels matter, its number of classes."""
        size = self.image_size
        if data.image_shape != (size, size, 3):
            raise UserError(
                f"{path} has images of {data.image_shape}, but {self.path} wants {size} px: prepare it with "
                f"--image-size {size}"
            )
        if is_labelled and data.num_classes != self.num_classes:
            raise UserError(f"{path} has {data.num_classes} classes, but {self.path} has {self.num_classes}")

    def check_augment(self, augment: AugmentConfig, key: str) -> None:
        """UserError unless views have the teacher's size."""
        if augment.size not in (None, self.image_size):
            raise UserError(f"key '{key}.size' is {augment.size}, but {self.path} wants {self.image_size} px")

    @torch.no_grad()
    def taught(self, images: Tensor) -> Tensor:
        """The teacher's logits (B, C)."""
        with self.context.ranks.accelerator.autocast():
            return self.teacher(images)

    def measure(self, model: Classifier) -> dict[str, Count]:
        """acc, asr, asr_all, ra on the test set."""
        return evaluate_classifier(model, self.clean, self.triggered, self.context.ranks, self.attack)

    def evaluate(self, epoch: int) -> dict[str, float]:
        """Of the student, in percent, for the log."""
        self.latest = self.measure(self.student)
        return {name: count.percent for name, count in self.latest.items() if count.n}

    def defended_result(
        self, method: str, vaccine: Vaccine | None, has_retrospection: bool, metrics: dict[str, Any]
    ) -> dict[str, Any]:
        """As result, with the vaccine's outcome; where the trigger is known also whether it tells triggered images."""
        kind, is_defended = method, has_retrospection
        if vaccine is not None:
            kind, is_defended = f"{kind}+sv", is_defended or vaccine.is_used
            metrics = {**metrics, "vaccine": vaccine.outcome()}
            if self.triggered is not None:
                told = diagnose(vaccine.ensemble, self.teacher, self.clean, self.triggered, self.context.ranks)
                metrics["vaccine"]["oracle"] = told
        return self.result(f"{kind}+sr" if has_retrospection else kind, is_defended, metrics)

    def result(self, method: str, is_defended: bool, metrics: dict[str, Any]) -> dict[str, Any]:
        """Save the student; entries for result.json with the student's and the teacher's counts."""
        counts, teacher = self.latest or self.measure(self.student), self.measure(self.teacher)
        card = replace(
            self.card,
            arch=self.student.arch,
            backdoored=self.card.backdoored and not is_defended,  # may have been learned too
            parent_sha256=self.sha256,
            provenance={"method": method, "data": self.context.digests, "seed": self.context.seed},
        )
        row = {"run": self.context.folder.name, "kind": method, "task": self.task, "seed": self.context.seed}
        return {
            "model_sha256": self.context.save_model(self.student, card),
            "rows": [{**row, **{name: count.plain() for name, count in counts.items()}}],
            "metrics": {
                **{f"teacher_{name}": count.percent for name, count in teacher.items() if count.n},
                **metrics,
            },
        }


def _family(arch: str) -> str:
    """resnet of resnet18, timm:vit of timm:vit_tiny_patch16_224: such networks want images of one size."""
    return re.split(r"[_\d]", arch)[0]
