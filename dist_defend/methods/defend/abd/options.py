"""The options of ABD's two parts, as each distillation method has them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class VaccineConfig:
    """The shuffling vaccine; defaults are those of illidanlab/ABD."""

    weight: float = 0.1  # of the suppression loss
    members: int = 3  # shuffled copies of the teacher
    layers: int = 5  # convolutions, the last ones, whose input channels are shuffled
    through_members: bool = True  # the suppression loss is differentiated through the shuffled copies too
    selection_batches: int = (
        0  # the vaccine is chosen by its tail ratio after so many batches; 0: the first one is used
    )

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"key 'weight' is {self.weight}; it must be positive (no vaccine: leave the section out)")
        if self.members < 1:
            raise ValueError(f"key 'members' is {self.members}; it must be at least 1")
        for key in ("layers", "selection_batches"):
            if getattr(self, key) < 0:
                raise ValueError(f"key '{key}' is {getattr(self, key)}; it must not be negative")


@dataclass(frozen=True)
class RetrospectionConfig:
    """Self-retrospection; defaults: illidanlab/ABD's sweeps, but for delta_init, min_patched and statistics."""

    start: int = 0  # pseudo-batch (ZSKT) or epoch from which on it runs
    restart_lr: float | None = None  # a fresh optimizer from there on, from this rate down; None: it goes on
    # the perturbation
    perturbs: Literal["teacher", "student"] = "teacher"  # whose predictions delta is to change
    delta_init: Literal["small", "zero"] = "small"  # zero is a stationary point, which only rounding errors leave
    inner_rounds: int = 10  # Adam steps on delta
    inner_lr: float = 0.1
    synthesis_penalty: float = 1e-3  # on |delta|^2 in those steps
    # the hypergradient
    penalty: float = 1e-3  # on |delta|^2 in the fixed-point map
    patched_fraction: float = 0.02  # of the global batch that carries delta in the outer loss, rounded down
    min_patched: int = 1  # images that carry delta at least; published: 0
    K: int = 5  # v_K of the fixed-point iteration
    step_size: float = 0.1  # of the fixed-point map
    detach_reference: bool = True  # the outer loss is not differentiated through the clean images' logits
    statistics: Literal["clean", "published"] = "clean"  # published: perturbed passes move batch norm's statistics too

    def __post_init__(self) -> None:
        for key in ("inner_rounds", "K"):
            if getattr(self, key) < 1:
                raise ValueError(f"key '{key}' is {getattr(self, key)}; it must be at least 1")
        for key in ("start", "synthesis_penalty", "penalty", "min_patched"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"key '{key}' is {getattr(self, key)}; it must not be negative")
        for key in ("restart_lr", "inner_lr", "step_size"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ValueError(f"key '{key}' is {value}; it must be positive")
        if not 0 <= self.patched_fraction <= 1:
            raise ValueError(f"key 'patched_fraction' is {self.patched_fraction}; it must be in [0, 1]")

    def num_patched(self, batch_size: int) -> int:
        """How many images of a global batch carry delta: int(fraction batch_size), min_patched at least."""
        return max(min(self.min_patched, batch_size), int(self.patched_fraction * batch_size))
