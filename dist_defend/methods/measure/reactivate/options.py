"""The options of re-activation."""

from dataclasses import dataclass, field
from typing import Any

from dist_defend.attacks.attack import AttackConfig
from dist_defend.bounds import at_least_one
from dist_defend.data.augment import AugmentConfig
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine.graphed import GraphMode
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.methods.measure.probe import HeadConfig
from dist_defend.methods.measure.reactivate.query import QueryConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Defaults are ours, for encoders: the published ones break an encoder with its head (docs/methods/reactivate.md).

    Keys:
        model: model folder of a classifier or an encoder, usually one that a defence has made
        control: model folder of one of its kind that never saw the trigger; null: the ASR is not compared
        data: labelled training images of the task; an encoder's head is trained on all of them
        test: labelled images that only measure
        attack: null: the attack in the model's card
        num_images: N, drawn from ``data``
        num_poisoned: q of them, of other classes than the target, get trigger and target
        augment: how the clean ones are changed, once for all epochs
        train_mode: batch norms take the batch's statistics and change their own; false: they stay as they are
        batch_size: global; the last batch may be short
        epochs: passes over the N images
        optimizer: optimizer, rate and schedule
        head: of an encoder: how its head is trained before; null: as published
        query: a perturbation of each image is sought too that wakes the backdoor; it needs ``control``; null: none is
        graph: whether the updates are CUDA graphs
    """

    model: str
    control: str | None = None
    data: DatasetConfig
    test: DatasetConfig
    attack: AttackConfig | None = None
    num_images: int = 1000
    num_poisoned: int = 5
    augment: AugmentConfig = AugmentConfig()
    train_mode: bool = False
    batch_size: int = 128
    epochs: int = 5
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig("adam", lr=1e-4))
    head: HeadConfig | None = None
    query: QueryConfig | None = None
    graph: GraphMode = "auto"

    def __post_init__(self) -> None:
        at_least_one(self, "num_poisoned", "batch_size", "epochs")
        if self.num_images <= self.num_poisoned:
            raise ValueError(f"key 'num_images' is {self.num_images}; it must be more than num_poisoned")
        if self.augment.size is not None:
            raise ValueError(f"key 'augment.size' is {self.augment.size}; the images keep their size: leave it out")
        if self.query is not None and self.control is None:
            raise ValueError("key 'query' is set, which needs a clean network: name it as 'control'")


PRESETS: dict[str, dict[str, Any]] = {
    "published": {  # of classifiers; 1,000 are 2 % of CIFAR-10's images
        "train_mode": True,
        "augment": {"crop": "pad", "pad": 4, "flip": 0.5},
        "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
    },
    "gentle": {},  # the defaults
}
