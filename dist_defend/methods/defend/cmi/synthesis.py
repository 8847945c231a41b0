"""Synthesis of a batch of images by inversion of the teacher (Fang et al. 2021, Contrastive Model Inversion)."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_defend.batch import Batch
from dist_defend.data.augment import AugmentConfig, crop_and_flip
from dist_defend.data.draws import draw
from dist_defend.data.order import rank_slice
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.engine.step import Position
from dist_defend.engine.update import Update, check_finite
from dist_defend.errors import UserError
from dist_defend.methods.defend.abd.epochs import FIRST_KEPT
from dist_defend.methods.defend.abd.pair import Pair
from dist_defend.methods.defend.abd.vaccine import Vaccine, suppression
from dist_defend.methods.defend.cmi.inversion import (
    Projection,
    batch_norms,
    contrast,
    disagreement,
    features,
    norm_inputs,
    statistics_distance,
)
from dist_defend.methods.defend.cmi.memory import ImagePool, MemoryBank
from dist_defend.methods.defend.cmi.options import SynthesisConfig
from dist_defend.models.generator import CMIGenerator
from dist_defend.ops.collectives import all_gather_rows, all_reduce_sum
from dist_defend.ops.hypergrad import all_reduce_together
from dist_defend.ops.streams import Stream, draws
from dist_defend.ops.transfer import to_device

_START, _BANK = range(2)  # what is drawn: generator and latent codes, rows of the bank
_GLOBAL_VIEW, _LOCAL_VIEW = range(2)


class Synthesis:
    """A generator and latent codes, initialised anew for every batch; the image pool and the memory bank.

    The images of the iteration with the lowest loss go to the pool, their features to the bank. Latent codes, views and
    the choice of rows are drawn from (seed, epoch or iteration) over the global batch; a rank works on its slice of it.
    """

    def __init__(self, config: SynthesisConfig, pair: Pair, capacity: int, vaccine: Vaccine | None) -> None:
        """capacity: images that the pool can hold. UserError if the teacher has no batch norm."""
        self.config, self.pair, self.vaccine = config, pair, vaccine
        ranks = pair.context.ranks
        self.device, self.dtype, self.seed = ranks.device, ranks.dtype, pair.context.seed
        self.own = rank_slice(config.batch_size, ranks.rank, ranks.world_size)
        self.norms = batch_norms(pair.teacher.net)
        if not self.norms:
            raise UserError(f"{pair.path}: {pair.card.arch} has no batch norm, whose statistics CMI inverts")
        size, batch = pair.image_size, self.own.stop - self.own.start
        dim = sum(norm.num_features for norm in self.norms)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.projection = Projection(dim, config.contrast.dim).to(self.device, self.dtype)
            self.generator = CMIGenerator(config.latent_dim, size, config.width)
        pair.context.synchronise(self.generator)
        self.generator.to(self.device, self.dtype)
        codes = torch.zeros(config.batch_size, config.latent_dim, device=self.device, dtype=self.dtype)
        self.codes = nn.Parameter(codes)  # of all ranks; each has gradients for its slice
        self.made = [*self.generator.parameters(), self.codes]
        self.of_made = Update(self.made, OptimizerConfig("adam", lr=config.lr, betas=(0.5, 0.999)))
        self.of_projection = Update(self.projection.parameters(), OptimizerConfig("adam", lr=config.contrast.lr))
        self.pool = ImagePool(capacity, size, self.device)
        self.bank = MemoryBank(config.contrast.bank_size, 2 * dim, self.device, self.dtype)
        self.best = torch.full((), float("inf"), device=self.device, dtype=self.dtype)
        self.best_images = torch.zeros(batch, 3, size, size, device=self.device, dtype=self.dtype)
        self.best_features = torch.zeros(batch, 2 * dim, device=self.device, dtype=self.dtype)

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        """One iteration. batch.labels (b,): the classes wanted.

        at.epoch: of the run; at.batch: iterations done in this epoch. Raises NonFiniteError on a CPU,
        with the weights as they were.
        """
        number = at.done(self.config.iterations)
        if at.batch == 0:
            self._restart(at.epoch)
        if self._selecting is not None and number == self._selecting.config.selection_batches:
            self._selecting.select()
        keeper = self._selecting if number >= FIRST_KEPT else None
        places = np.arange(self.own.start, self.own.stop)
        whole = self._draw(number, places, _GLOBAL_VIEW, self.config.global_view)
        local = self._draw(number, places, _LOCAL_VIEW, self.config.local_view)
        scalars = self.update(batch.labels, whole, local, self._earlier(number), keeper)
        check_finite(scalars, "the gradient of the synthesis")
        if at.batch == self.config.iterations - 1:
            self.pool.add(all_gather_rows(self.best_images))
            self.bank.add(all_gather_rows(self.best_features))
        return scalars

    def update(
        self, targets: Tensor, whole: Tensor, local: Tensor, earlier: Tensor, keeper: Vaccine | None = None
    ) -> dict[str, Tensor]:
        """One step of generator, codes and projection.

        targets (b,) int64; whole, local: the two views' parameters (b, NUM_PARAMETERS); earlier: rows of the bank.
        keeper: the vaccine whose selection keeps these images; None: none.
        """
        config, pair, total = self.config, self.pair, self.config.batch_size
        teacher, world_size = pair.teacher, pair.context.ranks.world_size
        images = self.generator(self.codes[self.own])
        x = teacher.normalize(crop_and_flip(images, whole, config.global_view))
        terms = {}
        with norm_inputs(self.norms) as inputs:
            if self.vaccine is not None and self.vaccine.is_used:
                logits, shuffled = self.vaccine.ensemble(x)
                terms["suppression"] = -self.vaccine.config.weight * suppression(logits, shuffled)
            else:
                logits = teacher.net(x)
        if keeper is not None:
            keeper.keep(x)
        terms["bn"] = config.bn * statistics_distance(self.norms, inputs) / world_size
        terms["one_hot"] = config.one_hot * F.cross_entropy(logits, targets, reduction="sum") / total
        if config.adversarial:
            terms["adversarial"] = -config.adversarial * disagreement(logits, pair.student.net(x)) / total
        with norm_inputs(self.norms) as local_inputs:
            teacher.net(teacher.normalize(crop_and_flip(images, local, config.local_view)))
        seen, seen_locally = features(inputs), features(local_inputs)
        loss = contrast(self.projection, seen_locally, seen, earlier, total, config.contrast.temperature)
        terms["contrast"] = config.contrast.weight * loss
        loss = torch.stack(list(terms.values())).sum()
        trained = [*self.made, *self.of_projection.parameters]
        gradients = all_reduce_together(list(torch.autograd.grad(loss, trained)))
        self._keep_if_better(all_reduce_sum(loss.detach()), images, torch.cat([seen_locally, seen], dim=1))
        norm = torch.nn.utils.get_total_norm(gradients)
        self.of_made.step(gradients[: len(self.made)], norm=norm)
        _, nonfinite = self.of_projection.step(gradients[len(self.made) :], norm=norm)
        told = {"synthesis_loss": loss, **terms}
        return {name: value.detach() * world_size for name, value in told.items()} | {
            "synthesis_grad_norm": norm,
            "nonfinite": nonfinite,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resume on any number of ranks needs; a collective call."""
        return {
            "generator": self.generator.state_dict(),
            "codes": self.codes.detach(),
            "projection": self.projection.state_dict(),
            "optimizers": [self.of_made.state_dict(), self.of_projection.state_dict()],
            "pool": self.pool.state_dict(),
            "bank": self.bank.state_dict(),
            "best": [self.best, all_gather_rows(self.best_images), all_gather_rows(self.best_features)],
            "vaccine": None if self.vaccine is None else self.vaccine.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict."""
        self.generator.load_state_dict(state["generator"])
        self.projection.load_state_dict(state["projection"])
        for update, saved in zip((self.of_made, self.of_projection), state["optimizers"], strict=True):
            update.load_state_dict(saved)
        self.pool.load_state_dict(state["pool"])
        self.bank.load_state_dict(state["bank"])
        best, images, seen = state["best"]
        with torch.no_grad():
            self.codes.copy_(state["codes"])
        self.best.copy_(best)
        self.best_images.copy_(images[self.own])
        self.best_features.copy_(seen[self.own])
        if self.vaccine is not None:
            self.vaccine.load_state_dict(state["vaccine"])

    @torch.no_grad()
    def _restart(self, epoch: int) -> None:
        """Initialise generator, latent codes and their optimizer anew, drawn from (seed, epoch)."""
        first = draws(self.seed, Stream.CMI_SYNTHESIS, _START, epoch).integers(2**62)
        generator = torch.Generator().manual_seed(int(first))
        reset(self.generator, generator)
        self.codes.copy_(torch.randn(self.codes.shape, generator=generator, dtype=torch.float64))
        self.of_made.forget()
        self.best.fill_(float("inf"))

    @torch.no_grad()
    def _keep_if_better(self, loss: Tensor, images: Tensor, seen: Tensor) -> None:
        """Keep images and features if their loss is the lowest so far; all are those from before the update."""
        is_better = loss < self.best
        for kept, new in ((self.best, loss), (self.best_images, images), (self.best_features, seen)):
            kept.copy_(torch.where(is_better, new, kept))

    def _earlier(self, number: int) -> Tensor:
        """Rows (n, 2 D) of the bank as negatives, drawn without replacement; n is 0 in the first epoch."""
        count = min(self.bank.filled, self.config.contrast.negatives)
        draw = draws(self.seed, Stream.CMI_SYNTHESIS, _BANK, number)
        chosen = draw.choice(self.bank.filled, count, replace=False)
        return self.bank.rows[to_device(torch.from_numpy(chosen), self.device)]

    def _draw(self, number: int, places: np.ndarray, view: int, config: AugmentConfig) -> Tensor:
        """Parameters (b, NUM_PARAMETERS) of an iteration's views."""
        size = self.pair.image_size
        params = draw(self.seed, number, places, view, config, size, size)
        return to_device(torch.from_numpy(params), self.device, self.dtype)

    @property
    def _selecting(self) -> Vaccine | None:
        """The vaccine, while it is still to be chosen."""
        return self.vaccine if self.vaccine is not None and self.vaccine.is_selecting else None


@torch.no_grad()
def reset(generator: nn.Module, random: torch.Generator) -> None:
    """Fresh weights: N(0, 0.02) of convolutions and linear layers, N(1, 0.02) of batch norms, 0 for biases."""
    for module in generator.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.modules.batchnorm._BatchNorm):
            is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            noise = torch.randn(module.weight.shape, generator=random, dtype=torch.float64)
            module.weight.copy_(0.02 * noise + is_norm)
            if module.bias is not None:
                module.bias.zero_()
