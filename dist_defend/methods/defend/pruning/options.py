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
        test: labelled test images, used for measurement only
        attack: attack whose success is measured; null: the attack in the model's card; without one only accuracy is
            measured
        selection: what chooses the stop (pruning level of the sweep) that is delivered
        max_accuracy_drop: relative loss of accuracy on the defender's images that is allowed; with selection:
            defence_data
        full_table: measure every stop on the test data, and report the stop of lowest test ASR as a row of its own
            (oracle)
        acc_ratio: relative change of test accuracy that is allowed to the oracle's stop
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
        """Stops of the sweep, in ascending number of neurons, and the fixed stop that ``selection`` asks for.

        None: there is no fixed stop, the defender's images choose. order: neurons by ascending score.
        """

    def pick(self, right: Sequence[int]) -> int:
        """Index of the stop to deliver. right: the number of images that each stop classifies correctly."""
        return choose_by_clean_data(right, self.max_accuracy_drop)

    def __post_init__(self) -> None:
        not_negative(self, "max_accuracy_drop", "acc_ratio")


@dataclass(frozen=True, kw_only=True)
class NormPruningConfig(PruningConfig, ABC):
    """Options of methods that prune channels of batch norms.

    Keys:
        prune_beta: set beta of a pruned channel to 0 too; false: the channel still passes the constant beta
    """

    prune_beta: bool = False


@dataclass(frozen=True, kw_only=True)
class MaskConfig(NormPruningConfig, DefenderConfig):
    """A mask in [0, 1] per neuron; the stops prune all masks up to a threshold, or a number of lowest masks.

    Keys:
        mask_file: a mask_values.txt to prune by; no masks are learned then
        pruning_by: whether stops are thresholds of masks or numbers of neurons
        pruning_max: largest stop, a threshold or a number of neurons
        pruning_step: step from 0 of the stops up to pruning_max
        off_by_one: by number: prune pruning_step neurons more at each stop, as published
        adapt_statistics: adapt running statistics to the pruned network, by the defender's images
        selection: what chooses the stop (pruning level of the sweep) that is delivered: defence_data: the last one
            within max_accuracy_drop; pruning_number, as in BackdoorBench: that key
        pruning_number: with selection: pruning_number: the threshold or number of neurons of the model that is
            delivered
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
    """The last stop before the first that loses more than the share max_drop of the images that stop 0 gets right.

    right: images of the defender that each stop classifies as their label. Nothing of the attack is looked at.
    """
    lost = [number for number, count in enumerate(right) if count < right[0] * (1 - max_drop)]
    return (lost[0] if lost else len(right)) - 1
