"""Fine-tuning, the baseline that Liu et al. (2018, Fine-Pruning) compare with: train on a few clean images.

Only one thing is asked of the images: they are clean and labelled. Neither trigger nor target class is known.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import functional

from dist_defend.attacks.attack import AttackConfig
from dist_defend.batch import Batch
from dist_defend.data.augment import AugmentConfig, View
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.objective import Objective, at_least_float32
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.trainer import Stage
from dist_defend.models.classifier import Classifier
from dist_defend.trial import Trial


@dataclass(frozen=True)
class Config:
    """Defaults are our own choice: Liu et al. name no rate.

    Keys:
        model: model folder of the suspected classifier
        data: the defender's clean, labelled images
        test: labelled images that only measure
        attack: what is measured before and after; null: the attack in the model's card, if there is one
        smoothing: share of each label that is spread over all classes (label smoothing), 0 to 1
        augment: how training images are changed
        update: batch size, epochs, and the optimizer
        evaluate_every: epochs between two measurements; there is one after the last epoch too
    """

    model: str
    data: DatasetConfig
    test: DatasetConfig
    attack: AttackConfig | None = None
    smoothing: float = 0.0
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(crop="pad", pad=4, flip=0.5))
    update: UpdateConfig = field(
        default_factory=lambda: UpdateConfig(
            batch_size=128, epochs=10, optimizer=OptimizerConfig("sgd", lr=0.01, momentum=0.9, weight_decay=5e-4)
        )
    )
    evaluate_every: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"key 'smoothing' is {self.smoothing}; it must be at least 0 and below 1")
        if self.evaluate_every < 1:
            raise ValueError(f"key 'evaluate_every' is {self.evaluate_every}; it must be at least 1")


class FineTuning(Objective):
    """Mean cross-entropy of images (B, 3, H, W) in [0, 1] with their labels (B,)."""

    def __init__(self, model: Classifier, smoothing: float) -> None:
        super().__init__()
        self.model, self.smoothing = model, smoothing

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits = at_least_float32(self.model(batch.images))
        return {"loss": functional.cross_entropy(logits, batch.labels, label_smoothing=self.smoothing)}


def build(config: Config, context: Context) -> Plan:
    """One stage, and a result that measures before and after."""
    trial = Trial(config.model, context)
    data, rows = trial.dataset("defence", config.data)
    trial.test_on(config.test, config.attack, without=(data, rows))
    trial.look(data, rows)
    context.synchronise(trial.model)
    loader = context.train_loader(data, rows, config.update.batch_size, (View(config.augment),))
    step = context.gradient_step(FineTuning(trial.model, config.smoothing), config.update, loader.num_batches)

    def evaluate(_: int) -> dict[str, float]:
        return trial.evaluate(trial.model)

    def result() -> dict[str, Any]:
        return trial.result(trial.model, provenance={"epochs": config.update.epochs})

    return Plan([Stage("fine_tune", loader, step, config.update.epochs, evaluate, config.evaluate_every)], result)
