"""The options of ABD's two parts, the same for zskt, cmi and ood."""

from dataclasses import dataclass
from typing import Literal

from dist_defend.bounds import at_least_one, not_negative, positive


@dataclass(frozen=True)
class VaccineConfig:
    """The shuffling vaccine. Defaults are illidanlab/ABD's.

    Keys:
        weight: weight of the suppression loss
        members: number of shuffled copies of the teacher
        layers: number of convolutions, the last ones of the teacher, whose input channels are shuffled
        through_members: differentiate the suppression loss through the shuffled copies too; false: through the teacher
            alone
        selection_batches: number of batches after which a vaccine is chosen by its tail ratio, with no vaccine until
            then; 0: the first shuffle is used from the start
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
    """Self-retrospection. Defaults are those of illidanlab/ABD's sweeps, except delta_init, min_patched and statistics.

    Keys:
        start: pseudo-batch (zskt) or epoch (cmi, ood) at which it starts, counted from 0
        restart_lr: learning rate of a fresh optimizer of the student at ``start``; null: zskt keeps its optimizer, cmi
            and ood start a fresh one at the rate of ``update``
        perturbs: network whose predictions the perturbation delta is to change
        delta_init: delta at first: small random numbers, or zero (published), a stationary point that delta leaves by
            rounding errors alone
        inner_rounds: Adam steps on delta
        inner_lr: learning rate of these Adam steps
        synthesis_penalty: weight of |delta|^2 in the loss of these Adam steps
        penalty: weight of |delta|^2 in the fixed-point map of the hypergradient
        patched_fraction: share of the global batch that carries delta in the outer loss, rounded down
        min_patched: least number of images that carry delta; published: 0
        K: iterations of the fixed-point map
        step_size: step size eta of the fixed-point map
        detach_reference: treat the clean images' logits in the outer loss as constants; false: differentiate through
            them
        statistics: passes of the student that move its running statistics: clean: those of clean images; published:
            perturbed ones too
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
