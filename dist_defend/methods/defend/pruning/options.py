"""The options that all pruning methods have, and those of methods that learn a mask per neuron."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from dist_defend.attacks.attack import AttackConfig
from dist_defend.bounds import not_negative, positive
from dist_defend.data.loader import DatasetConfig
from dist_defend.methods.defend.defender import DefenderConfig
from dist_defend.methods.defend.pruning.masks import Candidate, Neuron, by_number, by_threshold, neuron_count


@dataclass(frozen=True, kw_only=True)
class PruningConfig(ABC):
    """How a stop of the sweep is chosen and what is counted.

    Keys:
        model: model folder of a classifier
        test: test set
        attack: the attack it is tested with; null: the model card's; without one only accuracy is measured
        selection: what chooses the stop that is delivered
        max_accuracy_drop: of the accuracy on the defender's images, relative; for selection: defence_data
        full_table: every stop on the test data, and the choice by test ASR in a row of its own
        acc_ratio: relative loss of test accuracy that the choice by test ASR allows
        exclude_target_from_acc: ACC without the target class, as bboylyg/RNP measures it
    """

    model: str
    test: DatasetConfig
    attack: AttackConfig | None = None
    selection: str = "defence_data"
    max_accuracy_drop: float = 0.02
    full_table: bool = True
    acc_ratio: float = 0.1
    exclude_target_from_acc: bool = False

    @abstractmethod
    def stops(self, order: Sequence[Neuron]) -> tuple[list[Candidate], Candidate | None]:
        """Stops of the sweep over these neurons, first those that prune least; and the one that ``selection`` names.

        None leaves the choice to the defender's images.
        """

    def pick(self, right: Sequence[int]) -> int:
        """The number of the stop that is delivered, by how many images each stop gets right."""
        return choose_by_clean_data(right, self.max_accuracy_drop)

    def __post_init__(self) -> None:
        not_negative(self, "max_accuracy_drop", "acc_ratio")


@dataclass(frozen=True, kw_only=True)
class NormPruningConfig(PruningConfig, ABC):
    """What is pruned is a channel of a batch norm.

    Keys:
        prune_beta: a pruned channel then passes nothing instead of the constant beta
    """

    prune_beta: bool = False


@dataclass(frozen=True, kw_only=True)
class MaskConfig(NormPruningConfig, DefenderConfig):
    """A mask in [0, 1] per neuron; the stops prune all masks up to a threshold, or a number of lowest masks.

    Keys:
        mask_file: a mask_values.txt; nothing is learned then
        pruning_by: whether stops are thresholds of masks or numbers of neurons
        pruning_max, pruning_step: the stops 0, step, ..., max
        off_by_one: by number, prune pruning_step more each time, as published
        adapt_statistics: batch norms follow what pruning changes, as seen on the defender's images
        selection: defence_data, or pruning_number as BackdoorBench does
        pruning_number: threshold, or number of neurons, of the model that is delivered then
    """

    usual_ratio: ClassVar[float] = 0.01

    batch_size: int = 128
    mask_file: str | None = None
    pruning_by: Literal["threshold", "number"] = "threshold"
    pruning_max: float = 0.90
    pruning_step: float = 0.05
    off_by_one: bool = False
    adapt_statistics: bool = False
    selection: Literal["defence_data", "pruning_number"] = "defence_data"
    pruning_number: float = 0.70

    def __post_init__(self) -> None:
        PruningConfig.__post_init__(self)
        DefenderConfig.__post_init__(self)
        positive(self, "pruning_step")
        not_negative(self, "pruning_max", "pruning_number")

    def stops(self, order: Sequence[Neuron]) -> tuple[list[Candidate], Candidate | None]:
        if self.pruning_by == "threshold":
            candidates = by_threshold(order, self.pruning_max, self.pruning_step)
            fixed = Candidate(self.pruning_number, neuron_count(order, self.pruning_number))
        else:
            candidates = by_number(self.pruning_max, self.pruning_step, self.off_by_one)
            fixed = Candidate(None, math.ceil(self.pruning_number) * (1 + self.off_by_one))
        return candidates, fixed if self.selection == "pruning_number" else None


def choose_by_clean_data(right: Sequence[int], max_drop: float) -> int:
    """The last stop before the first that costs more than max_drop of what stop 0 gets right, relatively.

    right: images of the defender that each stop classifies as their label. Nothing of the attack is looked at.
    """
    lost = [number for number, count in enumerate(right) if count < right[0] * (1 - max_drop)]
    return (lost[0] if lost else len(right)) - 1
