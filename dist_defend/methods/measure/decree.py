"""DECREE (Feng et al., CVPR 2023): detect a backdoored encoder by the smallest trigger that makes features alike.

x' = (1 - M) x + M P,   min over M, P:  -C + c l1,   C = mean over b != b' of cos(f(x'_b), f(x'_b')),   l1 = 3 ||M||_1,
M = clip(tanh(m) / (2 - 1e-7) + 1/2, 0, 1), likewise P;   PL1 = l1 / (3 H W) of the smallest mask with |C| > threshold
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.attacks.attack import attack_from
from dist_defend.attacks.stamping import stamp_images
from dist_defend.attacks.trigger import blend
from dist_defend.batch import Batch
from dist_defend.bounds import at_least_one, positive, share
from dist_defend.data.augment import View
from dist_defend.data.loader import DatasetConfig
from dist_defend.detection import Detection, truth_of
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.dist import Ranks
from dist_defend.engine.graphed import GraphedUpdate, GraphMode
from dist_defend.engine.objective import at_least_float32
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.engine.step import Position
from dist_defend.engine.trainer import Stage
from dist_defend.engine.update import Update, check_finite
from dist_defend.errors import UserError
from dist_defend.methods.pictures import save_grid
from dist_defend.models.artifact import ModelCard
from dist_defend.models.folding import fold_frozen_norms
from dist_defend.ops.collectives import all_reduce_sum
from dist_defend.ops.hypergrad import all_reduce_together
from dist_defend.ops.streams import Stream, draws

log = logging.getLogger(__name__)
_EPS = 1e-7
_IN_A_ROW, _FACTOR, _LARGEST_COST = 6, 5.0, 1e5  # schedule of c: steps before a change, its factor, where rises end


@dataclass(frozen=True)
class Config:
    """Defaults are the published script's for images of CIFAR's size.

    Keys:
        encoder: model folder of the suspected encoder
        data: clean images; labels are not read
        seeds: one search for each seed, from its own random start; the verdict is by the median
        epochs: passes over the images, at most
        batch_size: images of a step over all ranks; the last batch may be smaller, but a single image is left out
        lr: initial learning rate of Adam, whose betas are 0.5 and 0.9
        milestones: epochs at which the learning rate becomes the next of later_lrs
        later_lrs: learning rates, one for each of milestones
        threshold: mean cosine above which a mask counts as found
        cost: initial weight c of the mask's L1 norm; six steps in a row with a mask found multiply it by 5, six without
            divide it by 5
        least_cost: c is divided only while it is at least this
        patience: a search ends after an epoch with mean cosine above threshold, once more than so many steps found no
            smaller mask
        bound: PL1 below which the encoder is called backdoored
        graph: capture updates as CUDA graphs: auto: on a GPU; on: an error without a GPU; off: never
    """

    encoder: str
    data: DatasetConfig
    seeds: tuple[int, ...] = (80, 81, 82)
    epochs: int = 1000
    batch_size: int = 128
    lr: float = 0.5
    milestones: tuple[int, ...] = (30, 50)
    later_lrs: tuple[float, ...] = (0.1, 0.05)
    threshold: float = 0.99
    cost: float = 1e-3
    least_cost: float = 1e-5
    patience: int = 10
    bound: float = 0.1
    graph: GraphMode = "auto"

    def __post_init__(self) -> None:
        at_least_one(self, "epochs", "patience")
        positive(self, "lr", "cost", "least_cost")
        share(self, "threshold", "bound")
        if self.batch_size < 2:
            raise ValueError(f"key 'batch_size' is {self.batch_size}; a cosine takes two images")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"key 'seeds' is {list(self.seeds)}; give at least one, none negative, each once")
        if len(self.milestones) != len(self.later_lrs) or sorted(self.milestones) != list(self.milestones):
            raise ValueError(
                f"key 'milestones' is {list(self.milestones)}; it must rise, with a rate each in later_lrs"
            )
        if min(self.later_lrs, default=1.0) <= 0:
            raise ValueError(f"key 'later_lrs' is {list(self.later_lrs)}; rates must be positive")


PRESETS: dict[str, dict[str, Any]] = {
    "cifar10": {},
    "imagenet": {"batch_size": 32, "milestones": [200, 500], "least_cost": 1e-7, "patience": 35},
}


class InversionStep:
    """S searches side by side, one for each seed, each as it would be alone. Results stay once a search has stopped."""

    def __init__(
        self, encoder: nn.Module, config: Config, image_size: int, ranks: Ranks, num_batches: int,
        graph: GraphMode = "off",
    ) -> None:  # fmt: skip
        self.encoder, self.config, self.num_batches = encoder.eval().requires_grad_(False), config, num_batches
        self.world_size, count = ranks.world_size, len(config.seeds)
        self.m, self.p = (
            nn.Parameter(start.to(ranks.device, ranks.dtype)) for start in starts(config.seeds, image_size)
        )
        self.masks, self.patterns = torch.zeros_like(self.m.detach()), torch.zeros_like(self.p.detach())
        zeros = torch.zeros(count, dtype=torch.float64, device=ranks.device)
        self.cost, self.best = zeros + config.cost, zeros + torch.inf  # best: l1 of the mask that is kept
        self.cosines, self.batches = zeros.clone(), zeros.clone()  # of the epoch
        self.successes, self.failures, self.stalled, self.stopped = (zeros.long() for _ in "1234")
        self.graphed = GraphedUpdate("the trigger inversion", self.learn, self.changed, ranks.device, graph)
        adam = OptimizerConfig("adam", config.lr, betas=(0.5, 0.9))
        self.update = Update([self.m, self.p], adam, self.graphed.is_graphed)

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        """Raises NonFiniteError on a CPU, with masks and patterns as they were."""
        rates = (self.config.lr, *self.config.later_lrs)
        self.update.set_rate(rates[sum(at.epoch >= epoch for epoch in self.config.milestones)])
        is_last = at.batch + 1 == self.num_batches
        return check_finite(self.graphed(batch.images, kind=is_last), "the gradient")

    def learn(self, images: Tensor) -> dict[str, Tensor]:
        """images (B, 3, H, W) -> scalars. Nothing here waits for the device or depends on values."""
        count = all_reduce_sum(torch.ones_like(images[:, 0, 0, 0]).sum())
        masks, patterns = self.triggers()
        stamped = blend(images, masks[:, None], patterns[:, None])
        features = functional.normalize(at_least_float32(self.encoder(stamped.flatten(0, 1))), dim=1)
        total = all_reduce_sum(features.unflatten(0, (len(masks), -1)).sum(1))
        cosine = (total.square().sum(1) - count) / (count * (count - 1))
        l1 = 3 * masks.flatten(1).sum(1)
        loss = (self.cost * l1 - cosine).sum()
        gradients = torch.autograd.grad(loss / self.world_size, [self.m, self.p])
        norm, nonfinite = self.update.step(all_reduce_together(list(gradients)))
        self.keep(cosine.detach(), l1.detach(), masks.detach(), patterns.detach())
        scalars = {"loss": loss.detach() / len(masks), "cosine": cosine.detach().mean(), "mask_l1": l1.detach().mean()}
        return {**scalars, "grad_norm": norm, "nonfinite": nonfinite}

    def triggers(self) -> tuple[Tensor, Tensor]:
        """Masks (S, 1, H, W) in [0, 1] and patterns (S, 3, H, W) in units of pixels, as they are now."""
        mask, pattern = ((torch.tanh(each) / (2 - _EPS) + 0.5).clamp(0, 1) for each in (self.m, self.p))
        return mask, pattern

    def keep(self, cosine: Tensor, l1: Tensor, masks: Tensor, patterns: Tensor) -> None:
        """Keep the smallest masks found and adapt c. cosine and l1 (S,) are those before the step's update."""
        is_found = cosine.abs() > self.config.threshold
        is_better = is_found & (l1 < self.best) & (self.stopped == 0)
        for kept, present in ((self.masks, masks), (self.patterns, patterns)):
            kept.copy_(torch.where(is_better[:, None, None, None], present, kept))
        self.best.copy_(torch.where(is_better, l1.double(), self.best))
        self.stalled.copy_((self.stalled + 1) * (~is_better & self.best.isfinite()))
        self.successes.copy_((self.successes + 1) * is_found)
        self.failures.copy_((self.failures + 1) * ~is_found)
        rises, falls = self.successes == _IN_A_ROW, self.failures == _IN_A_ROW
        raised = torch.where(self.cost < _LARGEST_COST, self.cost * _FACTOR, self.cost)
        lowered = torch.where(self.cost >= self.config.least_cost, self.cost / _FACTOR, self.cost)
        self.cost.copy_(torch.where(rises, raised, torch.where(falls, lowered, self.cost)))
        self.successes.mul_(~rises)
        self.failures.mul_(~falls)
        self.cosines += cosine
        self.batches += 1

    def end_epoch(self) -> bool:
        """Stop the searches that are done -> whether all have stopped. Waits for the device."""
        is_above = (self.cosines / self.batches).abs() > self.config.threshold
        self.stopped.copy_(self.stopped | (is_above & (self.stalled > self.config.patience)))
        self.cosines.zero_()
        self.batches.zero_()
        return bool(self.stopped.all())

    def changed(self) -> Iterator[Tensor]:
        """Every tensor that learn() writes to."""
        yield from (getattr(self, name) for name in _KEPT)
        yield from self.update.state()

    def state_dict(self) -> dict[str, Any]:
        return {"search": {n: getattr(self, n).detach() for n in _KEPT}, "optimizer": self.update.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """In place: a captured graph keeps its addresses."""
        for name in _KEPT:
            getattr(self, name).copy_(state["search"][name])
        self.update.load_state_dict(state["optimizer"])


_OF_SEEDS = ("cost", "best", "cosines", "batches", "successes", "failures", "stalled", "stopped")
_KEPT = ("m", "p", "masks", "patterns", *_OF_SEEDS)


def starts(seeds: tuple[int, ...], image_size: int) -> tuple[Tensor, Tensor]:
    """m (S, 1, H, W) and p (S, 3, H, W), float64, of which M and P are uniform draws in [0, 1)."""
    drawn = [draws(seed, Stream.MASK_START) for seed in seeds]
    values = [np.stack([draw.random((channels, image_size, image_size)) for draw in drawn]) for channels in (1, 3)]
    first, second = (torch.atanh((torch.from_numpy(value) - 0.5) * (2 - _EPS)) for value in values)
    return first, second


def region_of(card: ModelCard) -> Tensor | None:
    """Pixels (H, W) bool that the triggers of an encoder's card change in a black or white image; None: no pixel."""
    attack = attack_from(card.attack) if card.attack else None
    if attack is None or attack.trigger is None:
        return None
    size = card.image_size
    plain = torch.stack([torch.zeros(3, size, size), torch.ones(3, size, size)])
    changes = [(stamp_images(plain, trigger) - plain).abs() for trigger in attack.trigger.build_each(size)]
    region = torch.stack(changes).amax((0, 1, 2)) > 1e-3  # a smaller change is a rounding error
    return region if region.any() else None


def build(config: Config, context: Context) -> Plan:
    """One stage, which ends when all searches have stopped."""
    model, card, sha256 = context.load_encoder(config.encoder)
    dataset, rows = context.dataset("images", config.data)
    ranks, size, rest = context.ranks, model.image_size, len(rows) % config.batch_size
    if dataset.image_shape != (size, size, 3):
        raise UserError(
            f"{config.data.path} has images of {dataset.image_shape}, but {config.encoder} wants {size} px: prepare it "
            f"with --image-size {size}, or say 'resize: {size}' beside its path"
        )
    rows = rows[: len(rows) - (rest == 1)]
    if not len(rows) or 1 < rest < ranks.world_size:
        raise UserError(
            f"key 'decree.batch_size' is {config.batch_size}: of {len(rows)} images {rest} are left for the last "
            f"batch, too few for {ranks.world_size} rank(s); choose another batch size or number of images"
        )
    encoder = model.f.to(ranks.device, ranks.dtype).eval().requires_grad_(False)
    fold_frozen_norms(encoder, torch.zeros(1, 3, size, size, device=ranks.device, dtype=ranks.dtype))
    loader = context.train_loader(dataset, rows, config.batch_size, (View(),), drop_last=False)
    step = InversionStep(encoder, config, size, ranks, loader.num_batches, config.graph)

    def result() -> dict[str, Any]:
        pl1 = (step.best / (3 * size * size)).tolist()
        masks, patterns = step.masks.cpu(), step.patterns.cpu()
        found = [value for value in pl1 if value < torch.inf]
        metrics: dict[str, Any] = {"pl1": [value if value < torch.inf else None for value in pl1]}
        note, region = f"{len(found)} of {len(pl1)} seeds found a mask", region_of(card)
        if region is not None and found:
            inside = [float(mask[0][region].sum() / mask.sum()) for mask in masks if mask.any()]
            metrics |= {"mask_in_trigger": inside, "trigger_area": float(region.double().mean())}
            note += f"; {median(inside):.0%} of it in the card's trigger, {metrics['trigger_area']:.0%} of the picture"
        spread = (median(found), min(found), max(found)) if found else (None,) * 3
        detection = Detection(
            detector=context.method, quantity="PL1", score=spread[0], low=spread[1], high=spread[2],
            bound=config.bound, flags="below", truth=truth_of(card), note=note,
        )  # fmt: skip
        if ranks.is_main:
            log.info("%s: %s", config.encoder, detection.told())
            tensors = {"masks": masks.contiguous(), "patterns": patterns.contiguous()}
            save_file(tensors, context.folder / "triggers.safetensors")
            grey = masks.expand(-1, 3, -1, -1)
            grid = torch.stack([grey, patterns, masks * patterns], 1).flatten(0, 1)
            save_grid(context.folder / "found.png", grid, columns=3)
        return {
            "rows": [detection.row(context, dataset.manifest.name)],
            "suspect": {"folder": config.encoder, "sha256": sha256},
            "metrics": metrics,
        }

    stage = Stage("decree", loader, step, config.epochs, stop_when=step.end_epoch, shown=("loss", "mask_l1"))
    return Plan([stage], result)
