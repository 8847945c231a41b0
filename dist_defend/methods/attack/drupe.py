"""DRUPE (Tao et al., S&P 2024): BadEncoder with triggered features that are spread out and near the clean ones.

Beside BadEncoder's L1 and L2, with u' = f' / |f'| and one trigger e for all K references, which are of one class:

    L0 = -mean_b max_k s_kb,   s_kb = u'(x_b + e) . u'(r_k): each image is drawn to its nearest reference
    sigma = std_k mean_b s_kb: all references attract equally
    L3 = mean_{i <= j} u'(r_i) . u'(r_j): references stay apart
    S = (1 - 1/B) mean_{b, b'} u'(x_b + e) . u'(x_b' + e): triggered features stay apart
    W / D: sliced Wasserstein distance between f'(x + e) and f'(x), over the standard deviation of f'(x)
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dist_defend.batch import Batch
from dist_defend.bounds import not_negative, positive
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.step import GradientStep, Position
from dist_defend.errors import UserError
from dist_defend.methods.attack import badencoder
from dist_defend.ops.collectives import all_gather_rows, all_reduce_sum, world_size
from dist_defend.ops.losses import sliced_wasserstein
from dist_defend.ops.streams import Stream, draws
from dist_defend.ops.transfer import to_device

LOSSES = ("effectiveness", "reference_fidelity", "utility")  # L0, L1, L2
RISE = 1.25  # factor by which c and c1 rise
FALL = RISE**1.25  # divisor by which they fall


@dataclass(frozen=True)
class Config(badencoder.Config):
    """Defaults are Gwinhen/DRUPE's for the CIFAR-10 encoder, by the command of its readme.

    Keys:
        terms: terms beside BadEncoder's: drupe: all; wasserstein: W alone, with weight cost; nearest: none
        cost: initial weight c of sigma + S
        distance_cost: initial weight c1 of W / D
        projections: number of random directions of W
        warm_up_epochs: first epochs, without L0, in which the references are pushed apart (L3)
        spread_after: epochs after which S and W / D are part of the loss
        adapt_after: epochs after which c and c1 are adapted
        effective_below: an epoch's attack works if its mean L0 is below this and its mean L1 and L2 are below -0.9
        spread_below: c1 rises after an epoch whose attack works and whose S is below this, else it falls
        pause_below: c pauses after an epoch whose c1 rises and whose S is below this
    """

    one_trigger: bool = True
    terms: Literal["drupe", "wasserstein", "nearest"] = "drupe"
    cost: float = 0.1
    distance_cost: float = 1e-3
    projections: int = 50
    warm_up_epochs: int = 1
    spread_after: int = 4
    adapt_after: int = 20
    effective_below: float = -0.96
    spread_below: float = 0.6
    pause_below: float = 0.5
    update: UpdateConfig = field(
        default_factory=lambda: UpdateConfig(
            batch_size=256, epochs=120, optimizer=OptimizerConfig("sgd", lr=0.05, momentum=0.9, weight_decay=5e-4)
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "cost", "distance_cost", "projections")
        not_negative(self, "warm_up_epochs", "spread_after", "adapt_after")
        if not self.one_trigger:
            raise ValueError("key 'one_trigger' is false, but DRUPE's references share a trigger: leave it out")

    def check_references(self, classes: np.ndarray) -> None:
        if len(classes) < 2 or len(set(classes.tolist())) > 1:
            told = f"key 'drupe.reference' gives {len(classes)} of classes {sorted(set(classes.tolist()))}"
            raise UserError(f"{told}: DRUPE needs two or more of one class, as 'reference.count' takes from a data set")


PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {},
    "imagenet": {"spread_after": 2, "effective_below": -0.91},
    "clip": {"warm_up_epochs": 0, "spread_below": 0.8, "pause_below": 0.7},
    "wasserstein": {"terms": "wasserstein"},
    "wasserstein_clip": {"terms": "wasserstein", "adapt_after": 5, "spread_below": 0.8, "pause_below": 0.7},
}


class DrupeObjective(badencoder.BadEncoderObjective):
    """DRUPE's loss; arguments as BadEncoder's, with one trigger. sigma, S, W and D are over the images of all ranks.

    costs (3,): c, c1 and a count of epochs; c pauses while it is negative. sums (3,): L0, L1, L2 summed over the epoch.
    Both are buffers, so that checkpoints hold them. at: position of the present update.
    """

    costs: Tensor
    sums: Tensor

    def __init__(self, *parts: Any, config: Config, seed: int) -> None:
        super().__init__(*parts)
        self.lambda1, self.lambda2 = config.lambda1, config.lambda2
        self.config, self.seed, self.at = config, seed, Position()
        self.register_buffer("costs", self.references.new_tensor([config.cost, config.distance_cost, 0.0]))
        self.register_buffer("sums", self.references.new_zeros(len(LOSSES)))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        raw = self.encoded(batch)
        clean, (stamped,), augmented, references = self.parts(functional.normalize(raw, dim=1))
        raw_clean, (raw_stamped,), _, _ = self.parts(raw)
        both = all_gather_rows(torch.stack([raw_stamped, raw_clean], 1), [len(clean)] * world_size())
        all_stamped, all_clean = both.unbind(1)
        units, count = functional.normalize(all_stamped, dim=1), len(references)
        alike = (references @ references.T).triu().sum()
        terms = {
            "effectiveness": -(stamped @ references.T).amax(1).mean(),
            **self.kept(clean, augmented, batch.index),
            "imbalance": (units @ references.T).mean(0).std(),
            "reference_similarity": alike / (count * (count + 1) / 2),
            "similarity": units.mean(0).square().sum() * (1 - 1 / len(units)),
            "distance": sliced_wasserstein(all_stamped, all_clean, self.directions(raw)),
        }
        terms["relative_distance"] = terms["distance"] / all_clean.std(0).mean()
        return {"loss": self.total(terms), **terms}

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """The loss with the terms and weights of the present epoch, a scalar."""
        config, epoch = self.config, self.at.epoch + 1
        cost, distance_cost = self.costs[0], self.costs[1]
        kept = self.lambda1 * terms["reference_fidelity"] + self.lambda2 * terms["utility"]
        attack, sigma, alike = (terms[name] for name in ("effectiveness", "imbalance", "reference_similarity"))
        if config.terms != "drupe":
            return attack + kept + (cost * terms["distance"] if config.terms == "wasserstein" else 0)
        if epoch <= config.warm_up_epochs:
            return kept + torch.where(alike < 0.2, 0.3 * alike, 0.5 * alike)
        loss = attack + kept + torch.where(alike > 0.5, alike, 0.2 * alike * (alike > 0.4))
        if epoch <= config.spread_after:
            return loss + 2 * sigma
        spread = cost * (sigma + terms["similarity"]) + distance_cost * terms["relative_distance"]
        return loss + spread + torch.where(sigma > 0.1, 2 * sigma, 0.5 * sigma)

    def directions(self, features: Tensor) -> Tensor:
        """Unit columns (D, P), the same on all ranks and new in each update."""
        normal = draws(self.seed, Stream.DIRECTIONS, self.at.step).standard_normal(
            (features.shape[1], self.config.projections)
        )
        columns: Tensor = to_device(torch.from_numpy(normal), features.device, features.dtype)
        return columns.div(columns.norm(dim=0))

    @torch.no_grad()
    def follow(self, scalars: dict[str, Tensor], steps_per_epoch: int) -> None:
        """After an update: sum its losses; at the end of an epoch adapt the costs."""
        if self.at.batch == 0:
            self.sums.zero_()
        self.sums += all_reduce_sum(torch.stack([scalars[name] for name in LOSSES])) / world_size()
        if self.at.batch + 1 == steps_per_epoch and self.at.epoch + 1 > self.config.adapt_after:
            means = self.sums / steps_per_epoch
            self.costs.copy_(adapted(self.costs, means, scalars["similarity"], self.config))


def adapted(costs: Tensor, means: Tensor, similarity: Tensor, config: Config) -> Tensor:
    """c, c1 and the count (3,) after an epoch with these means of L0, L1, L2 (3,) and this S of its last batch."""
    cost, distance_cost, count = costs
    works = (means[0] < config.effective_below) & (means[1] < -0.9) & (means[2] < -0.9)
    spreads = works & (similarity < config.spread_below)
    rises = works & (count >= 0)
    cost = torch.where(rises, cost * RISE, torch.where(works, cost, cost / FALL))
    count = torch.where(works & ~rises, count + 1, 0.0)
    distance_cost = torch.where(spreads, distance_cost * RISE, distance_cost / FALL)
    pauses = spreads & (similarity < config.pause_below)
    return torch.stack([cost, distance_cost, torch.where(pauses, count - 1, count)])


class DrupeStep(GradientStep):
    """A gradient step that gives the objective its position and, after the update, the scalars."""

    objective: DrupeObjective

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        self.objective.at = at
        scalars = super().__call__(batch, at)
        self.objective.follow(scalars, self.steps_per_epoch)
        return scalars


def build(config: Config, context: Context) -> Plan:
    """One stage, as BadEncoder's. UserError unless there are two or more references, all of one class."""

    def make(*parts: Any) -> DrupeObjective:
        return DrupeObjective(*parts, config=config, seed=context.seed)

    def make_step(objective: Any, update: UpdateConfig, num_batches: int) -> GradientStep:
        return DrupeStep(objective, update, context.ranks, num_batches)

    return badencoder.attack_plan("drupe", config, context, make, make_step)
