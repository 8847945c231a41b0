"""The options of ABD's two parts, as each distillation method has them."""

from dataclasses import dataclass
from typing import Literal

from dist_defend.bounds import at_least_one, not_negative, positive


@dataclass(frozen=True)
class VaccineConfig:
    """The shuffling vaccine; defaults are those of illidanlab/ABD.

    Keys:
        weight: of the suppression loss
        members: shuffled copies of the teacher
        layers: convolutions, the last ones, whose input channels are shuffled
        through_members: the suppression loss is differentiated through the shuffled copies too
        selection_batches: the vaccine is chosen by its tail ratio after so many batches; 0: the first one is used
    """

    weight: float = 0.1
    members: int = 3
    layers: int = 5
    through_members: bool = True
    selection_batches: int = 0

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"key 'weight' is {self.weight}; it must be positive (no vaccine: leave the section out)")
        at_least_one(self, "members")
        not_negative(self, "layers", "selection_batches")


@dataclass(frozen=True)
class RetrospectionConfig:
    """Self-retrospection; defaults: illidanlab/ABD's sweeps, but for delta_init, min_patched and statistics.

    Keys:
        start: pseudo-batch (ZSKT) or epoch from which on it runs
        restart_lr: a fresh optimizer from there on, from this rate down; null: the optimizer goes on
        perturbs: whose predictions the perturbation delta is to change
        delta_init: small random numbers, or zero, a stationary point that only rounding errors leave
        inner_rounds: Adam steps on delta
        inner_lr: rate of those steps
        synthesis_penalty: weight of |delta|^2 in those steps
        penalty: weight of |delta|^2 in the fixed-point map of the hypergradient
        patched_fraction: share of the global batch that carries delta in the outer loss, rounded down
        min_patched: images that carry delta at least; published: 0
        K: iterations of the fixed-point map
        step_size: of the fixed-point map
        detach_reference: the outer loss is not differentiated through the clean images' logits
        statistics: clean: batch norm's statistics are those of clean passes; published: perturbed passes move them too
    """

    start: int = 0
    restart_lr: float | None = None
    # the perturbation
    perturbs: Literal["teacher", "student"] = "teacher"
    delta_init: Literal["small", "zero"] = "small"
    inner_rounds: int = 10
    inner_lr: float = 0.1
    synthesis_penalty: float = 1e-3
    # the hypergradient
    penalty: float = 1e-3
    patched_fraction: float = 0.02
    min_patched: int = 1
    K: int = 5
    step_size: float = 0.1
    detach_reference: bool = True
    statistics: Literal["clean", "published"] = "clean"

    def __post_init__(self) -> None:
        at_least_one(self, "inner_rounds", "K")
        not_negative(self, "start", "synthesis_penalty", "penalty", "min_patched")
        positive(self, "restart_lr", "inner_lr", "step_size")
        if not 0 <= self.patched_fraction <= 1:
            raise ValueError(f"key 'patched_fraction' is {self.patched_fraction}; it must be in [0, 1]")

    def num_patched(self, batch_size: int) -> int:
        """How many images of a global batch carry delta: int(fraction batch_size), min_patched at least."""
        return max(min(self.min_patched, batch_size), int(self.patched_fraction * batch_size))
