"""Clean distillation (Hinton et al. 2015): the student sees labelled images of the teacher's own task.

The baseline of Hong et al. (ICML 2023, ABD): how much of a teacher's backdoor survives distillation on clean images.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from dist_defend.attacks.attack import AttackConfig
from dist_defend.batch import Batch
from dist_defend.bounds import at_least_one, positive, share
from dist_defend.data.augment import AugmentConfig, View
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.objective import Objective, at_least_float32
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.trainer import Stage
from dist_defend.methods.defend.abd.pair import Pair
from dist_defend.ops.losses import distillation


@dataclass(frozen=True)
class Config:
    """Defaults are those of illidanlab/ABD's zskt/kd_distill.py; its sweeps take a fifth of the training images.

    Keys:
        teacher: model folder of the suspected classifier, which teaches
        data: clean, labelled training images of the teacher's task
        test: labelled test images, used for measurement only
        student: architecture of the network that is trained (`dist-defend models`)
        attack: attack whose success is measured; null: the attack in the model's card, if there is one
        temperature: softmax temperature of both networks in the distillation loss
        alpha: weight of the distillation loss; the cross-entropy with the labels has weight 1 - alpha
        augment: augmentation of the training images
        update: batch size, epochs, optimizer and the like
        evaluate_every: epochs between two measurements; there is one after the last epoch too
    """

    teacher: str
    data: DatasetConfig
    test: DatasetConfig
    student: str = "wrn_16_1"
    attack: AttackConfig | None = None
    temperature: float = 6.0
    alpha: float = 0.95
    augment: AugmentConfig = AugmentConfig(crop="pad", pad=4, flip=0.5)
    update: UpdateConfig = UpdateConfig(
        batch_size=128, epochs=170, optimizer=OptimizerConfig("sgd", lr=0.1, momentum=0.9, weight_decay=5e-4)
    )
    evaluate_every: int = 10

    def __post_init__(self) -> None:
        positive(self, "temperature")
        share(self, "alpha")
        at_least_one(self, "evaluate_every")


PRESETS: dict[str, dict[str, Any]] = {
    "zskt_code": {},
    "cmi_code": {  # cmi/vanilla_kd.py, which crashes as published
        "temperature": 1.0,
        "alpha": 1.0,
        "update": {
            "batch_size": 128,
            "epochs": 200,
            "optimizer": {
                "name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4,
                "schedule": "multistep", "milestones": [120, 150, 180],
            },
        },
    },
}  # fmt: skip


class DistillationObjective(Objective):
    """alpha T^2 / C * KL(teacher || student) at temperature T + (1 - alpha) * cross-entropy, means over the batch.

    The published code divides by the C classes (reduction ``mean`` of torch's kl_div).
    """

    def __init__(self, pair: Pair, temperature: float, alpha: float) -> None:
        super().__init__()
        self.student = pair.student
        self.taught, self.temperature, self.alpha = pair.taught, temperature, alpha

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        wanted = at_least_float32(self.taught(batch.images))
        logits = at_least_float32(self.student(batch.images))
        kl = distillation(logits, wanted, self.temperature)
        cross_entropy = functional.cross_entropy(logits, batch.labels)
        loss = self.alpha * self.temperature**2 * kl + (1 - self.alpha) * cross_entropy
        return {"loss": loss, "kl": kl, "cross_entropy": cross_entropy}


def build(config: Config, context: Context) -> Plan:
    """One stage: distil on labelled images."""
    pair = Pair(config.teacher, config.student, config.test, config.attack, context)
    data, rows = pair.trial.dataset("defence", config.data)
    pair.check_augment(config.augment)
    update, views = config.update, (View(config.augment),)
    loader = context.train_loader(data, rows, update.batch_size, views, update.accumulation)
    objective = DistillationObjective(pair, config.temperature, config.alpha)
    step = context.gradient_step(objective, update, loader.num_batches)
    pair.trial.look(data, rows)
    stage = Stage("kd", loader, step, update.epochs, pair.evaluate, config.evaluate_every, shown=("loss", "kl"))
    return Plan([stage], lambda: pair.result({"images": len(rows)}))
