"""ZSKT's options and presets."""

from dataclasses import dataclass, field
from typing import Any

from dist_defend.attacks.attack import AttackConfig
from dist_defend.bounds import at_least_one, not_negative, positive
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine.graphed import GraphMode
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.methods.defend.abd.options import RetrospectionConfig, VaccineConfig


@dataclass(frozen=True)
class Config:
    """Defaults are those of illidanlab/ABD for CIFAR-10 (preset cifar10), without a defence.

    Keys:
        teacher: model folder of the suspected classifier, which teaches
        test: labelled test images, used for measurement only
        student: architecture of the network that is trained (`dist-defend models`)
        attack: attack whose success is measured; null: the attack in the model's card, if there is one
        pseudo_batches: number of batches that the generator makes
        batch_size: images of a pseudo-batch over all ranks
        z_dim: length of the generator's noise
        generator_width: channels of the generator's first layers; an even number
        grey: the generator makes grey images, for teachers trained on grey ones
        bounded: the generator's images have pixels in [0, 1]; false, as published: normalised values without bounds
        generator_steps: updates of the generator per pseudo-batch
        student_steps: updates of the student per pseudo-batch
        temperature: softmax temperature of both networks in the distillation loss
        attention: weight beta of the attention loss; 0: none
        max_grad_norm: L2 norm to which larger gradients of generator and student are scaled down; student steps with
            self-retrospection are not clipped
        generator_optimizer: optimizer of the generator; milestones count pseudo-batches
        student_optimizer: optimizer of the student; milestones count pseudo-batches
        vaccine: ABD's shuffling vaccine; null: no vaccine
        retrospection: ABD's self-retrospection, from a pseudo-batch on; null: no retrospection
        evaluate_every: pseudo-batches between two measurements; there is one after the last pseudo-batch too
        graph: capture updates as CUDA graphs: auto: on a GPU; on: an error without a GPU; off: never
    """

    teacher: str
    test: DatasetConfig
    student: str = "wrn_16_1"
    attack: AttackConfig | None = None
    pseudo_batches: int = 80_000
    batch_size: int = 128
    z_dim: int = 100
    generator_width: int = 128
    grey: bool = False
    bounded: bool = False
    generator_steps: int = 1
    student_steps: int = 10
    temperature: float = 1.0
    attention: float = 250.0
    max_grad_norm: float = 5.0
    generator_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig("adam", lr=1e-3, schedule="cosine")
    )
    student_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig("adam", lr=2e-3, schedule="cosine")
    )
    vaccine: VaccineConfig | None = None
    retrospection: RetrospectionConfig | None = None
    evaluate_every: int = 200
    graph: GraphMode = "auto"

    def __post_init__(self) -> None:
        at_least_one(
            self, "pseudo_batches", "batch_size", "z_dim", "generator_steps", "student_steps", "evaluate_every"
        )
        if self.generator_width < 2 or self.generator_width % 2:
            raise ValueError(f"key 'generator_width' is {self.generator_width}; it must be even and positive")
        positive(self, "temperature", "max_grad_norm")
        not_negative(self, "attention")
        for key in ("generator_optimizer", "student_optimizer"):
            optimizer: OptimizerConfig = getattr(self, key)
            if optimizer.warmup_epochs:
                raise ValueError(
                    f"key '{key}.warmup_epochs' is {optimizer.warmup_epochs:g}; there is no warm-up here: set it to 0"
                )
        wanted, first = self.vaccine.selection_batches if self.vaccine else 0, self.first_kept
        if wanted and not first < wanted < self.pseudo_batches:
            raise ValueError(
                f"key 'vaccine.selection_batches' is {wanted}; it must be 0, or more than generator_steps + "
                f"student_steps = {first} and less than pseudo_batches = {self.pseudo_batches}"
            )
        start = self.retrospection.start if self.retrospection else 0
        if start >= self.pseudo_batches:
            raise ValueError(
                f"key 'retrospection.start' is {start}; it must be less than pseudo_batches = {self.pseudo_batches}"
            )

    @property
    def first_kept(self) -> int:
        """The first pseudo-batch whose images a vaccine is selected by, as published."""
        return self.generator_steps + self.student_steps


_GTSRB: dict[str, Any] = {"pseudo_batches": 10_000, "attention": 0.0, "temperature": 0.5, "evaluate_every": 100}
_LATE, _LATE_GTSRB = ({"retrospection": {"start": start, "restart_lr": 5e-4}} for start in (79_400, 9_800))
_SELECTED: dict[str, Any] = {"vaccine": {"selection_batches": 50}}
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {},
    "cifar10_vaccine": {"vaccine": {}},
    "cifar10_retrospection": _LATE,
    "cifar10_both": {"vaccine": {}, **_LATE},
    "gtsrb": _GTSRB,
    "gtsrb_vaccine": {**_GTSRB, **_SELECTED},
    "gtsrb_retrospection": {**_GTSRB, **_LATE_GTSRB},
    "gtsrb_both": {**_GTSRB, **_SELECTED, **_LATE_GTSRB},
}
