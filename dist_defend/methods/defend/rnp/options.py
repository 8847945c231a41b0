"""What can be set, under the names that bboylyg/RNP and SCLBD/BackdoorBench publish."""

from dataclasses import dataclass, field
from typing import Any, Literal

from dist_defend.attacks.attack import AttackConfig
from dist_defend.data.augment import AugmentConfig
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine.graphed import GraphMode


@dataclass(frozen=True)
class Config:
    """bboylyg/RNP's names and values; what SCLBD/BackdoorBench does otherwise is said beside them.

    The defender's images are ``ratio`` of ``data``, drawn at random (null: 0.01, unless ``data`` itself takes a part),
    or the rows that the text file ``index`` names.
    """

    model: str  # model folder of a classifier
    data: DatasetConfig
    test: DatasetConfig
    attack: AttackConfig | None = None  # null: the model card's; without one only accuracy is measured
    ratio: float | None = None
    index: str | None = None
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(crop="pad", pad=4, flip=0.5))
    batch_size: int = 128  # BackdoorBench: 256
    unlearning_lr: float = 0.01
    unlearning_epochs: int = 20
    epochs_inclusive: bool = True  # one epoch more, as range(0, epochs + 1) has; BackdoorBench: false
    schedule: tuple[int, ...] = (10, 20)  # epochs after which the rate of unlearning falls to a tenth
    clean_threshold: float = 0.20  # running training accuracy that ends unlearning
    not_unlearned: Literal["use_last", "fail"] = "use_last"  # when it is never reached
    max_grad_norm: float | None = None  # the published 20 clips empty gradients, so nothing
    alpha: float = 0.2
    recovering_lr: float = 0.2
    recovering_epochs: int = 20
    mask_file: str | None = None  # a mask_values.txt; unlearning and recovering are skipped
    pruning_by: Literal["threshold", "number"] = "threshold"
    pruning_max: float = 0.90
    pruning_step: float = 0.05
    off_by_one: bool = False  # by number: prune pruning_step more each time, as published
    prune_beta: bool = False  # a pruned channel then passes nothing instead of the constant beta
    adapt_statistics: bool = False  # batch norms follow what pruning changes, as seen on the defender's images
    selection: Literal["defence_data", "pruning_number"] = "defence_data"  # BackdoorBench: pruning_number
    max_accuracy_drop: float = 0.02  # of the accuracy on the defender's images, relative; for defence_data
    pruning_number: float = 0.70  # threshold, or number of neurons
    full_table: bool = True  # every stop on the test data, and the choice by test ASR in a row of its own
    acc_ratio: float = 0.1  # relative loss of test accuracy that the choice by test ASR allows
    exclude_target_from_acc: bool = False  # ACC without the target class, as bboylyg/RNP measures it
    graph: GraphMode = "auto"

    def __post_init__(self) -> None:
        if min(self.schedule, default=1) < 1:
            raise ValueError(f"key 'schedule' is {list(self.schedule)}; epochs are counted from 1")
        takes_part = self.data.fraction < 1 or self.data.max_samples is not None
        choices = [("ratio", self.ratio is not None), ("index", self.index is not None), ("data", takes_part)]
        chosen = [name for name, is_chosen in choices if is_chosen]
        if len(chosen) > 1:
            raise ValueError(f"key '{chosen[0]}' is set, but '{chosen[1]}' chooses the images already: leave one out")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"key 'ratio' is {self.ratio}; it must be in (0, 1]")
        for key in ("batch_size", "unlearning_epochs", "recovering_epochs"):
            if getattr(self, key) < 1:
                raise ValueError(f"key '{key}' is {getattr(self, key)}; it must be at least 1")
        for key in ("unlearning_lr", "recovering_lr", "alpha", "pruning_step"):
            if not getattr(self, key) > 0:
                raise ValueError(f"key '{key}' is {getattr(self, key)}; it must be positive")
        for key in ("clean_threshold", "pruning_max", "max_accuracy_drop", "pruning_number", "acc_ratio"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"key '{key}' is {getattr(self, key)}; it must not be negative")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"key 'max_grad_norm' is {self.max_grad_norm}; it must be positive")


PRESETS: dict[str, dict[str, Any]] = {
    "official": {"not_unlearned": "fail", "off_by_one": True, "exclude_target_from_acc": True},
    "backdoorbench": {
        "batch_size": 256,
        "epochs_inclusive": False,
        "off_by_one": True,
        "selection": "pruning_number",
    },
    "gentle": {  # not published: small networks, which lose everything at once at the published rate
        "unlearning_lr": 1e-3,
        "max_grad_norm": 1.0,
        "unlearning_epochs": 80,
        "schedule": [],
        "clean_threshold": 0.3,
        "recovering_lr": 0.25,
        "adapt_statistics": True,
    },
}
