"""RNP's options, under the names of bboylyg/RNP and SCLBD/BackdoorBench."""

from dataclasses import dataclass
from typing import Any, Literal

from dist_defend.bounds import at_least_one, not_negative, positive
from dist_defend.engine.graphed import GraphMode
from dist_defend.methods.defend.pruning.options import MaskConfig


@dataclass(frozen=True, kw_only=True)
class Config(MaskConfig):
    """Names and defaults are those of bboylyg/RNP; the preset backdoorbench has SCLBD/BackdoorBench's values.

    Keys:
        unlearning_lr: learning rate of unlearning
        recovering_lr: learning rate of the masks in recovering
        unlearning_epochs: epochs of unlearning, at most
        recovering_epochs: epochs of recovering
        epochs_inclusive: unlearn one epoch more, as the published loop over range(0, epochs + 1); BackdoorBench: false
        schedule: epochs after which the learning rate of unlearning falls to a tenth
        clean_threshold: unlearning ends after an epoch with this running training accuracy or less
        not_unlearned: if clean_threshold is never reached: use_last: go on with the last state and warn; fail: end with
            an error
        max_grad_norm: L2 norm to which larger gradients of unlearning are scaled down; null: no limit, which is what
            the published clip of 20 amounts to: it runs before the backward pass
        alpha: weight of the cross-entropy in recovering
        graph: capture updates as CUDA graphs: auto: on a GPU; on: an error without a GPU; off: never
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
    "gentle": {  # not published; for small networks, whose accuracy collapses within an epoch at the published rate
        "unlearning_lr": 1e-3,
        "max_grad_norm": 1.0,
        "unlearning_epochs": 80,
        "schedule": [],
        "clean_threshold": 0.3,
        "recovering_lr": 0.25,
        "adapt_statistics": True,
    },
}
