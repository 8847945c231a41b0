"""I-BAU's options and presets."""

from dataclasses import dataclass, field
from typing import Any, Literal

from dist_defend.attacks.attack import AttackConfig
from dist_defend.bounds import at_least_one, not_negative, positive
from dist_defend.data.augment import AugmentConfig
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine.graphed import GraphMode
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.keys import UNWRITTEN

LARGEST_EXACT = 1024  # values of delta: Hessian products per step, and rows and columns of the dense matrix


@dataclass(frozen=True)
class Config:
    """Defaults are those of YiZeng623/I-BAU's defense.py (preset official).

    Keys:
        model: model folder of the suspected classifier
        data: the defender's clean, labelled images
        test: labelled test images, used for measurement only
        attack: attack whose success is measured after each round; null: the attack in the model's card, if there is one
        rounds: number of rounds; each finds a perturbation and unlearns it
        batch_size: images of an update over all ranks
        augment: augmentation of the defender's images, which are then shuffled too; null: images as they are, in order
        evaluate_every: rounds between two measurements; there is one after the last round too
        inner: optimizer of the perturbation delta (inner maximisation)
        penalty: lambda, weight of |delta|^2 in the inner loss
        space: what delta is added to: pixels: images in [0, 1]; normalized: images after normalisation by mean and
            standard deviation
        clamp: clip x + delta to [0, 1]
        project_radius: radius of the L2 ball that delta is projected to after the inner pass; null: no limit
        orders: inner passes of a round, each over the images in another order; the delta of the largest norm is used;
            null: one pass, as published
        optimizer: optimizer of the weights (outer minimisation)
        solver: solver of the hypergradient's linear system: Neumann series, conjugate gradients, or the dense matrix,
            for at most 1024 values of delta
        K: iterations of neumann and cg
        step_size: step size eta of the fixed-point map
        patched_fraction: share of the images of a batch that carry delta, rounded down
        min_patched: least number of images of a batch that carry delta
        graph: capture updates as CUDA graphs: auto: on a GPU; on: an error without a GPU; off: never
    """

    model: str
    data: DatasetConfig
    test: DatasetConfig
    attack: AttackConfig | None = None
    rounds: int = 5
    batch_size: int = 100
    augment: AugmentConfig | None = None
    evaluate_every: int = 1
    # inner maximisation
    inner: OptimizerConfig = field(default_factory=lambda: OptimizerConfig("sgd", lr=10.0, momentum=0.0))
    penalty: float = 1e-3
    space: Literal["pixels", "normalized"] = "pixels"
    clamp: bool = False
    project_radius: float | None = None
    orders: int | None = field(default=None, metadata=UNWRITTEN)
    # outer minimisation
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig("adam", lr=1e-3))
    solver: Literal["neumann", "cg", "exact"] = "neumann"
    K: int = 5
    step_size: float = 0.1
    patched_fraction: float = 0.01
    min_patched: int = 0
    graph: GraphMode = "auto"

    def __post_init__(self) -> None:
        at_least_one(self, "rounds", "batch_size", "evaluate_every", "orders", "K")
        not_negative(self, "penalty", "min_patched")
        positive(self, "step_size")
        if not 0 <= self.patched_fraction <= 1:
            raise ValueError(f"key 'patched_fraction' is {self.patched_fraction}; it must be in [0, 1]")
        if self.project_radius is not None and not self.project_radius > 0:
            raise ValueError(f"key 'project_radius' is {self.project_radius}; it must be positive, or null for none")
        if self.clamp and self.space == "normalized":
            raise ValueError("key 'clamp' is true, but key 'space' is 'normalized', which has no bounds; say pixels")
        for key in ("inner", "optimizer"):
            optimizer: OptimizerConfig = getattr(self, key)
            if optimizer.schedule != "constant" or optimizer.warmup_epochs:
                raise ValueError(f"key '{key}.schedule' must be constant without warm-up; I-BAU has no schedule")

    @property
    def num_orders(self) -> int:
        """Inner passes of a round."""
        return self.orders or 1

    def num_patched(self, size: int) -> int:
        """How many images of a batch of that size carry delta: the published int(fraction size), min_patched at least.

        With the published values a batch of less than 100 images has none, so it only fine-tunes.
        """
        return max(min(self.min_patched, size), int(self.patched_fraction * size))


PRESETS: dict[str, dict[str, Any]] = {
    "official": {},
    "notebook_cifar10": {"rounds": 1, "project_radius": 10.0},
    "notebook_gtsrb": {"rounds": 1, "project_radius": 10.0, "clamp": True, "inner": {"name": "adam", "lr": 1.0}},
    "backdoorbench": {
        "batch_size": 256,
        "augment": {"crop": "pad", "pad": 4, "flip": 0.5},  # flip for CIFAR only
        "space": "normalized",
        "optimizer": {"name": "adam", "lr": 1e-4, "amsgrad": True},
    },
    "hundred_images": {  # the paper claims that so few suffice, and gives no recipe
        "rounds": 30,
        "batch_size": 10,
        "patched_fraction": 0.2,
        "optimizer": {"name": "adam", "lr": 5e-4},
        "evaluate_every": 10,
    },
}
