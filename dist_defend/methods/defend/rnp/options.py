"""What can be set, under the names that bboylyg/RNP and SCLBD/BackdoorBench publish."""

from dataclasses import dataclass
from typing import Any, Literal

from dist_defend.bounds import at_least_one, not_negative, positive
from dist_defend.engine.graphed import GraphMode
from dist_defend.methods.defend.pruning.options import MaskConfig


@dataclass(frozen=True, kw_only=True)
class Config(MaskConfig):
    """bboylyg/RNP's names and values; what SCLBD/BackdoorBench does otherwise is said beside them.

    Keys:
        unlearning_lr, recovering_lr: rates of the two phases
        unlearning_epochs, recovering_epochs: lengths of the two phases
        epochs_inclusive: one epoch of unlearning more, as range(0, epochs + 1) has; BackdoorBench: false
        schedule: epochs after which the rate of unlearning falls to a tenth
        clean_threshold: running training accuracy that ends unlearning
        not_unlearned: what is done when it is never reached
        max_grad_norm: of unlearning; the published 20 clips empty gradients, so nothing
        alpha: weight of the cross-entropy in recovering
        graph: whether the updates are CUDA graphs
    """

    unlearning_lr: float = 0.01
    unlearning_epochs: int = 20
    epochs_inclusive: bool = True
    schedule: tuple[int, ...] = (10, 20)
    clean_threshold: float = 0.20
    not_unlearned: Literal["use_last", "fail"] = "use_last"
    max_grad_norm: float | None = None
    alpha: float = 0.2
    recovering_lr: float = 0.2
    recovering_epochs: int = 20
    graph: GraphMode = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.schedule, default=1) < 1:
            raise ValueError(f"key 'schedule' is {list(self.schedule)}; epochs are counted from 1")
        at_least_one(self, "unlearning_epochs", "recovering_epochs")
        positive(self, "unlearning_lr", "recovering_lr", "alpha")
        not_negative(self, "clean_threshold")
        positive(self, "max_grad_norm")


PRESETS: dict[str, dict[str, Any]] = {
    "official": {"not_unlearned": "fail", "off_by_one": True, "exclude_target_from_acc": True},
    "backdoorbench": {"batch_size": 256, "epochs_inclusive": False, "off_by_one": True, "selection": "pruning_number"},
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
