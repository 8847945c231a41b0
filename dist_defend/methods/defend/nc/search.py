"""Neural Cleanse's search: for each class a small mask and pattern that turn all images into it (Wang et al. 2019).

x' = (1 - M) x + M P,   min over M, P:  CE(f(x'), t) + c ||M||_1;   M = tanh(a) / (2 + 1e-7) + 1/2, likewise P
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.attacks.trigger import blend
from dist_defend.batch import Batch
from dist_defend.bounds import at_least_one, positive
from dist_defend.engine.dist import Ranks
from dist_defend.engine.graphed import GraphedUpdate, GraphMode
from dist_defend.engine.objective import at_least_float32
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.engine.step import Position
from dist_defend.engine.update import Update, check_finite
from dist_defend.models.classifier import Classifier
from dist_defend.ops.collectives import all_reduce_sum
from dist_defend.ops.hypergrad import all_reduce_together


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Defaults are SCLBD/BackdoorBench's.

    Keys:
        epochs: passes over the defender's images, at most
        lr: learning rate of masks and patterns, by Adam with betas 0.5 and 0.9
        cost: initial weight c of the mask's L1 norm
        threshold: percent of the images that must be classified as the class for a mask to be kept and for c to rise
        patience: successive epochs at or above the threshold after which c rises, or below it after which c falls
        multiplier: factor by which c rises; it falls by multiplier^1.5
        early_patience: a class's search ends after so many epochs without a mask at least 1 % smaller, once c has risen
            and fallen
        classes_at_once: classes in one forward pass; fewer need less memory
        normalise_first_rows: reproduce an error of BackdoorBench, which normalises only the first three rows of the
            pattern, so that only these can take any colour
    """

    epochs: int = 80
    lr: float = 0.1
    cost: float = 1e-3
    threshold: float = 98.0
    patience: int = 5
    multiplier: float = 2.0
    early_patience: int = 25
    classes_at_once: int = 10
    normalise_first_rows: bool = False

    def __post_init__(self) -> None:
        at_least_one(self, "epochs", "patience", "early_patience", "classes_at_once")
        positive(self, "lr", "cost", "multiplier")
        if not 0 < self.threshold <= 100:
            raise ValueError(f"key 'threshold' is {self.threshold}; it must be above 0 and at most 100 percent")


class SearchStep:
    """All classes' searches side by side. Each keeps its best mask and pattern, which stay once it has stopped."""

    def __init__(
        self, model: Classifier, config: SearchConfig, classes: Sequence[int], ranks: Ranks, num_batches: int,
        graph: GraphMode = "off",
    ) -> None:  # fmt: skip
        self.model, self.config, self.num_batches, self.world_size = model, config, num_batches, ranks.world_size
        count, size = len(classes), model.image_size
        own: dict[str, Any] = {"device": ranks.device, "dtype": ranks.dtype}
        self.classes = torch.tensor(classes, device=ranks.device)
        self.a, self.b = (nn.Parameter(torch.ones(count, channels, size, size, **own)) for channels in (1, 3))
        self.cost = torch.full((count,), config.cost, **own)
        self.hits, self.norms, self.batches = (
            torch.zeros(count, dtype=torch.float64, device=ranks.device) for _ in "123"
        )
        self.best = torch.full((count,), torch.inf, dtype=torch.float64, device=ranks.device)  # ||M||_1 of the mask
        self.least = self.best.clone()  # the smallest best at earlier checks for an early end
        names = ("up", "down", "early", "has_risen", "has_fallen", "stopped")
        self.counters = {name: torch.zeros(count, dtype=torch.int64, device=ranks.device) for name in names}
        self.masks, self.patterns = (torch.zeros_like(each, requires_grad=False) for each in (self.a, self.b))
        self.graphed = GraphedUpdate("the trigger search", self.learn, self.changed, ranks.device, graph)
        adam = OptimizerConfig("adam", config.lr, betas=(0.5, 0.9))
        self.update = Update([self.a, self.b], adam, self.graphed.is_graphed)

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        """Raises NonFiniteError on a CPU, with masks and patterns as they were."""
        self.model.eval()
        is_last = at.batch + 1 == self.num_batches
        return check_finite(self.graphed(batch.images, kind=is_last), "the gradient")

    def learn(self, images: Tensor) -> dict[str, Tensor]:
        """images (B, 3, H, W) -> scalars. Nothing here waits for the device or depends on values."""
        count = all_reduce_sum(torch.ones_like(images[:, 0, 0, 0], dtype=torch.float32).sum())
        masks, patterns = self.triggers()
        errors, hits = [], []
        for part in torch.arange(len(self.classes), device=images.device).split(self.config.classes_at_once):
            stamped = blend(images, masks[part, None], patterns[part, None])
            logits = at_least_float32(self.model(stamped.flatten(0, 1)))
            wanted = self.classes[part].repeat_interleave(len(images))
            error = functional.cross_entropy(logits, wanted, reduction="none")
            errors.append(error.view(len(part), -1).sum(1))
            hits.append((logits.detach().argmax(1) == wanted).view(len(part), -1).sum(1))
        norms = masks.flatten(1).abs().sum(1)
        share = torch.cat(errors).sum() / count + (self.cost * norms).sum() / self.world_size
        gradients = torch.autograd.grad(share, [self.a, self.b])
        self.hits += 100 * all_reduce_sum(torch.cat(hits).double()) / count
        self.norms += norms.detach()
        self.batches += 1
        norm, nonfinite = self.update.step(all_reduce_together(list(gradients)))
        loss = share.detach() * self.world_size / len(self.classes)
        return {"loss": loss, "mask_norm": norms.detach().mean(), "grad_norm": norm, "nonfinite": nonfinite}

    def triggers(self) -> tuple[Tensor, Tensor]:
        """Masks (K, 1, H, W) in [0, 1] and patterns (K, 3, H, W) in units of pixels, as they are now."""
        mask, pattern = (torch.tanh(each) / (2 + 1e-7) + 0.5 for each in (self.a, self.b))
        if self.config.normalise_first_rows:
            mean, std = self.model.normalize.mean, self.model.normalize.std
            rows = (pattern[:, :, :3] - mean.view(1, 1, 3, 1)) / std.view(1, 1, 3, 1)
            pattern = torch.cat([rows, pattern[:, :, 3:]], 2) * std + mean
        return mask, pattern

    @torch.no_grad()
    def end_epoch(self) -> bool:
        """Keep the best masks, adapt c, stop searches -> whether all have stopped. Waits for the device."""
        config, now = self.config, self.counters
        hits, norms = self.hits / self.batches, self.norms / self.batches
        going = now["stopped"] == 0
        is_hit = hits >= config.threshold
        mask, pattern = self.triggers()
        is_better = going & is_hit & (norms < self.best)
        is_first = (self.masks == 0).all(3).all(2).all(1)  # the first epoch's mask is kept in any case, as published
        for kept, present in ((self.masks, mask), (self.patterns, pattern)):
            kept.copy_(torch.where((is_better | is_first)[:, None, None, None], present, kept))
        self.best.copy_(torch.where(is_better, norms, self.best))
        checked = going & self.best.isfinite()
        is_stuck = self.best >= 0.99 * self.least
        now["early"].copy_(torch.where(checked, (now["early"] + 1) * is_stuck, now["early"]))
        self.least.copy_(torch.where(checked, torch.minimum(self.least, self.best), self.least))
        is_over = checked & (now["has_risen"] * now["has_fallen"] > 0) & (now["early"] >= config.early_patience)
        now["stopped"] += is_over
        going = now["stopped"] == 0
        for name, is_so in (("up", is_hit), ("down", ~is_hit)):
            now[name].copy_(torch.where(going, (now[name] + 1) * is_so, now[name]))
        for name, flag, factor in (
            ("up", "has_risen", config.multiplier), ("down", "has_fallen", config.multiplier**-1.5)
        ):  # fmt: skip
            turns = going & (now[name] >= config.patience)
            self.cost.copy_(torch.where(turns, self.cost * factor, self.cost))
            now[name].masked_fill_(turns, 0)
            now[flag].masked_fill_(turns, 1)
        for total in (self.hits, self.norms, self.batches):
            total.zero_()
        return not bool(going.any())

    def changed(self) -> Iterator[Tensor]:
        """Every tensor that learn() writes to."""
        yield from (self.a, self.b, self.hits, self.norms, self.batches)
        yield from self.update.state()

    def state_dict(self) -> dict[str, Any]:
        return {
            "tensors": {name: getattr(self, name).detach() for name in _KEPT},
            "counters": self.counters,
            "optimizer": self.update.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """In place: a captured graph keeps its addresses."""
        for name in _KEPT:
            getattr(self, name).copy_(state["tensors"][name])
        for name, counter in self.counters.items():
            counter.copy_(state["counters"][name])
        self.update.load_state_dict(state["optimizer"])


_KEPT = ("a", "b", "cost", "hits", "norms", "batches", "best", "least", "masks", "patterns")


def anomaly_indices(norms: Tensor) -> Tensor:
    """|L - median| / MAD of mask norms L (K,), negative above the median; MAD = 1.4826 median |L - median|.

    The median of an even number is the lower one. Without any spread it is inf, or nan at the median itself.
    """
    middle = norms.median()
    apart = (norms - middle).abs()
    index = apart / (1.4826 * apart.median())
    return torch.where(norms <= middle, index, -index)
