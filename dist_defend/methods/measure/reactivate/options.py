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
        control: model folder of a clean model of the same kind, which never saw the trigger; null: no comparison
        data: labelled training images of the task; an encoder's head is trained on all of them
        test: labelled test images, used for measurement only
        attack: attack whose trigger is stamped and whose success is measured; null: the attack in the model's card
        num_images: N, the number of images of the tuning, drawn from ``data``
        num_poisoned: q, the number of these images, of other classes than the target, that get trigger and target label
        augment: augmentation of the clean images, made once for all epochs
        train_mode: batch norms use the batch's statistics and update the running ones; false: running statistics are
            used and stay
        batch_size: images of an update over all ranks; the last batch may be smaller
        epochs: passes over the N images
        optimizer: optimizer, learning rate and schedule
        head: training of an encoder's head before the tuning; null: as published
        query: query-based re-activation too, by a learned perturbation of each image; it needs ``control``; null: none
        graph: capture updates as CUDA graphs: auto: on a GPU; on: an error without a GPU; off: never
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
