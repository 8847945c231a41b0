"""The options that all tuning defences have, with SCLBD/BackdoorBench's values."""

from dataclasses import dataclass, field

from dist_defend.attacks.attack import AttackConfig
from dist_defend.bounds import at_least_one, not_negative
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine.graphed import GraphMode
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.methods.defend.defender import DefenderConfig


def sgd(lr: float = 0.01, **other: object) -> OptimizerConfig:
    """BackdoorBench's SGD: momentum 0.9, weight decay 5e-4 on all weights, a cosine of 100 epochs that rises again."""
    usual = {"momentum": 0.9, "weight_decay": 5e-4, "schedule": "cosine_epochs", "period": 100}
    return OptimizerConfig("sgd", lr, **(usual | other))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class TuningConfig(DefenderConfig):
    """All weights are trained on the defender's images. The last epoch is delivered, or one chosen by held-out images.

    Keys:
        model: model folder of the suspected classifier
        test: labelled test images, used for measurement only
        attack: attack whose success is measured; null: the attack in the model's card, if there is one
        epochs: passes over the defender's images
        optimizer: optimizer, learning rate and schedule
        evaluate_every: epochs between two measurements; there is one after the last epoch too
        graph: capture updates as CUDA graphs: auto: on a GPU; on: an error without a GPU; off: never
        held_out: share of the defender's images that are not trained on and choose the epoch; 0, as published: the last
            epoch is delivered
        max_accuracy_drop: relative loss of accuracy on the held-out images that is allowed; the last epoch within it is
            delivered
    """

    model: str
    test: DatasetConfig
    attack: AttackConfig | None = None
    epochs: int = 100
    optimizer: OptimizerConfig = field(default_factory=sgd)
    evaluate_every: int = 10
    graph: GraphMode = "auto"
    held_out: float = 0.0
    max_accuracy_drop: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "epochs", "evaluate_every")
        not_negative(self, "max_accuracy_drop")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"key 'held_out' is {self.held_out}; it must be at least 0 and below 1")
