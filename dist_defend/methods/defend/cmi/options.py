"""CMI's options, and the presets published with ABD."""

from dataclasses import dataclass, field
from typing import Any

from dist_defend.attacks.attack import AttackConfig
from dist_defend.bounds import at_least_one, not_negative, positive
from dist_defend.data.augment import AugmentConfig
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine.graphed import GraphMode
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.methods.defend.abd.epochs import check_defence
from dist_defend.methods.defend.abd.options import RetrospectionConfig, VaccineConfig


@dataclass(frozen=True)
class ContrastConfig:
    """The contrastive loss that keeps a new batch unlike what was synthesised before.

    Keys:
        weight: weight of this loss
        temperature: temperature of this loss
        negatives: rows drawn from the memory bank in each iteration, as negatives
        bank_size: rows of the memory bank, which holds features of the latest images
        dim: length of the projected features
        lr: learning rate of the projection, by Adam
    """

    weight: float = 0.8
    temperature: float = 0.1
    negatives: int = 4096
    bank_size: int = 40960
    dim: int = 256
    lr: float = 1e-3

    def __post_init__(self) -> None:
        not_negative(self, "weight")
        positive(self, "temperature", "negatives", "bank_size", "dim", "lr")


@dataclass(frozen=True)
class SynthesisConfig:
    """Model inversion of one batch of images.

    Keys:
        batch_size: images that an epoch synthesises, over all ranks
        iterations: updates of generator and latent codes per batch
        lr: learning rate of generator and latent codes, by Adam with betas 0.5 and 0.999
        latent_dim: length of a latent code
        width: channels of the generator's last hidden layer
        bn: weight of the distance to the teacher's batch-norm statistics
        one_hot: weight of the cross-entropy with the drawn classes
        adversarial: weight of the disagreement between teacher and student
        contrast: contrastive loss that keeps a new batch unlike the earlier ones
        global_view, local_view: augmentation that makes each view of the synthesised images: crop and flip only; the
            other losses use the global view
    """

    batch_size: int = 256
    iterations: int = 200
    lr: float = 1e-3
    latent_dim: int = 256
    width: int = 64
    bn: float = 1.0
    one_hot: float = 1.0
    adversarial: float = 0.5
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    global_view: AugmentConfig = field(default_factory=lambda: AugmentConfig(crop="pad", pad=4, flip=0.5))
    local_view: AugmentConfig = field(
        default_factory=lambda: AugmentConfig(crop="random_resized", scale=(0.25, 1.0), flip=0.5)
    )

    def __post_init__(self) -> None:
        at_least_one(self, "batch_size", "iterations", "latent_dim", "width")
        not_negative(self, "bn", "one_hot", "adversarial")
        positive(self, "lr")
        for key in ("global_view", "local_view"):
            view: AugmentConfig = getattr(self, key)
            if view.recolours or view.size is not None:
                raise ValueError(f"key '{key}' must be a crop and a flip only, of the images' own size")


@dataclass(frozen=True)
class Config:
    """Defaults are those of illidanlab/ABD's sweeps. An epoch: synthesise one batch, then distil on all so far.

    Keys:
        teacher: model folder of the suspected classifier, with batch norm, which teaches
        test: labelled test images, used for measurement only
        student: architecture of the network that is trained (`dist-defend models`)
        attack: attack whose success is measured; null: the attack in the model's card, if there is one
        synthesis: synthesis of images by model inversion
        temperature: softmax temperature of both networks in the distillation loss
        distillation_steps: updates of the student in an epoch
        augment: augmentation of the training images
        update: batch size, epochs, optimizer and the like of the student
        vaccine: ABD's shuffling vaccine; null: no vaccine
        retrospection: ABD's self-retrospection, from an epoch on; null: no retrospection
        graph: capture the retrospection's updates as CUDA graphs: auto: on a GPU; on: an error without a GPU; off:
            never
        evaluate_every: epochs between two measurements; there is one after the last epoch too
    """

    teacher: str
    test: DatasetConfig
    student: str = "wrn_16_1"
    attack: AttackConfig | None = None
    synthesis: SynthesisConfig = field(default_factory=SynthesisConfig)
    temperature: float = 20.0
    distillation_steps: int = 400
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(crop="pad", pad=4, flip=0.5))
    update: UpdateConfig = field(
        default_factory=lambda: UpdateConfig(
            batch_size=128,
            epochs=200,
            optimizer=OptimizerConfig("sgd", lr=0.1, momentum=0.9, weight_decay=1e-4, schedule="cosine"),
        )
    )
    vaccine: VaccineConfig | None = None
    retrospection: RetrospectionConfig | None = None
    graph: GraphMode = "auto"
    evaluate_every: int = 10

    def __post_init__(self) -> None:
        positive(self, "temperature")
        at_least_one(self, "distillation_steps", "evaluate_every")
        if self.update.accumulation != 1:
            raise ValueError(f"key 'update.accumulation' is {self.update.accumulation}; CMI has whole batches, say 1")
        if self.synthesis.batch_size > self.synthesis.contrast.bank_size:
            raise ValueError(
                f"key 'synthesis.contrast.bank_size' is {self.synthesis.contrast.bank_size}; it must hold a batch of "
                f"{self.synthesis.batch_size}"
            )
        check_defence(self.vaccine, self.retrospection, self.update.epochs)


_RETROSPECTION = {
    "start": 197, "restart_lr": 5e-4, "synthesis_penalty": 0.0, "detach_reference": False,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "vaccine": {"vaccine": {}},
    "retrospection": {"retrospection": _RETROSPECTION},
    "both": {"vaccine": {}, "retrospection": _RETROSPECTION},
}
