"""One step of a round: gradient ascent on the perturbation, or an update of the weights by the hypergradient."""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_defend.batch import Batch
from dist_defend.engine.graphed import GraphedUpdate, will_capture
from dist_defend.engine.step import Position
from dist_defend.engine.update import Update, check_finite
from dist_defend.methods.defend.ibau.options import Config
from dist_defend.methods.defend.ibau.orders import Orders
from dist_defend.methods.defend.ibau.rounds import Rounds
from dist_defend.models.classifier import Classifier
from dist_defend.models.folding import FoldedNetwork
from dist_defend.ops.collectives import all_reduce_sum
from dist_defend.ops.hypergrad import (
    Solver,
    check_twice_differentiable,
    conjugate_gradient,
    exact,
    hypergradient,
    neumann,
    total_norms,
)
from dist_defend.ops.losses import weighted_cross_entropy
from dist_defend.ops.second_order import CheapSecondOrder
from dist_defend.ops.streams import Stream, draws
from dist_defend.ops.transfer import to_device

log = logging.getLogger(__name__)


class UnlearningStep:
    """min over theta of max over delta of the cross-entropy of f_theta(x + delta) (Zeng et al. 2022, section 4).

    A round has T inner calls for each order, then T outer ones, over the batches of ``rounds``. The model stays
    in eval mode, so running statistics are constant and images do not influence each other. Only the choice of patched
    images is random: it is drawn from (seed, round, batch) over the global batch.
    """

    def __init__(self, model: Classifier, config: Config, rounds: Rounds, seed: int) -> None:
        self.model, self.config, self.rounds, self.seed = model, config, rounds, seed
        self.ranks = ranks = rounds.ranks
        model.to(ranks.device, ranks.dtype, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        is_normalized = config.space == "normalized"
        self.network: nn.Module = model.net if is_normalized else model
        self.enter: nn.Module = model.normalize if is_normalized else nn.Identity()
        _warn_of_unpatched(config, rounds)
        check_twice_differentiable(self.network, rounds.image_size, f"{config.model} ({model.arch})")
        delta = torch.zeros(1, 3, *2 * (rounds.image_size,), device=ranks.device, dtype=ranks.dtype)
        self.folded = FoldedNetwork(self.network, delta)
        self.parameters = list(model.parameters())
        self.delta = nn.Parameter(delta)
        self.orders = Orders(delta, config.rounds, rounds.orders) if rounds.orders > 1 else None
        self.first = rounds.first()
        self.solver = solver_of(config)
        self.kept = rounds.keep() if will_capture(ranks.device, config.graph) else None
        ascend, unlearn = (self.ascend, self.unlearn) if self.kept is None else (self._ascend_next, self._unlearn_next)
        self.inner = GraphedUpdate("I-BAU inner step", ascend, self._changed, ranks.device, config.graph)
        self.outer = GraphedUpdate("I-BAU outer step", unlearn, self._changed, ranks.device, config.graph)
        self.update = Update(self.parameters, config.optimizer, self.outer.is_graphed)
        self.inner_update = Update([self.delta], config.inner, self.inner.is_graphed)

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        """Raises NonFiniteError on a CPU, with the weights as they were."""
        turn, number = divmod(at.batch, self.rounds.batches)
        is_inner = turn < self.rounds.orders
        if is_inner and number == 0:
            self._restart()
        patched = [] if is_inner else [self._patched(at.epoch, number)]
        if self.kept is None:
            images, labels, weights = self.rounds.padded(batch, number)
            given = [images, weights] if is_inner else [images, labels, *patched, weights]
        else:
            self.kept.aim(number)
            given = patched
        if is_inner:
            scalars = check_finite(self.inner(*given), "the perturbation's gradient")
            if self.orders is not None and number == self.rounds.batches - 1:
                scalars |= self.orders.note(self.delta, at.epoch, turn)
            if at.batch == self.rounds.inner_batches - 1:
                self._project()
        else:
            scalars = check_finite(self.outer(*given), "the hypergradient")
        return scalars

    def ascend(self, images: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """delta <- delta - lr grad(penalty |delta|^2 - CE(f(x + delta), argmax f(x))); images (B, 3, H, W)."""
        x = self.enter(images)
        with torch.no_grad(), self.folded() as network:
            pseudo_labels = network(x).argmax(1)
            with torch.enable_grad():
                logits = network(self._bounded(x + self.delta))
        loss = weighted_cross_entropy(logits, pseudo_labels, -weights)
        (slope,) = torch.autograd.grad(loss, self.delta)
        penalty = self.config.penalty * self.delta.detach().square().sum()  # not by norm(): its gradient at 0 is nan
        _, nonfinite = self.inner_update.step([all_reduce_sum(slope) + 2 * self.config.penalty * self.delta.detach()])
        return {
            "inner_loss": loss.detach() * self.ranks.world_size + penalty,
            "delta_norm": self.delta.detach().norm(),
            "nonfinite": nonfinite,
        }

    def unlearn(self, images: Tensor, labels: Tensor, patched: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """One update of the weights by the hypergradient of CE(f(x + patched delta), y); patched (B, 1, 1, 1), 0 or 1.

        The inner loss of the fixed-point map is that of the first batch with its labels, as published.
        """
        self.update.let_go()
        first_images, first_labels, first_weights = self.first
        with self.folded() as network:
            logits = network(self._bounded(torch.addcmul(self.enter(images), patched, self.delta)))
            with CheapSecondOrder():
                first_logits = network(self._bounded(self.enter(first_images) + self.delta))
        outer = weighted_cross_entropy(logits, labels, weights)
        inner = weighted_cross_entropy(first_logits, first_labels, -first_weights)
        result = hypergradient(
            outer, inner, self.delta, self.parameters, self.solver, self.config.step_size, self.config.penalty
        )
        total = result.total
        direct_norm, implicit_norm, grad_norm = total_norms(result.direct, result.implicit, total)
        _, nonfinite = self.update.step(total, norm=grad_norm)
        return {
            "outer_loss": outer.detach() * self.ranks.world_size,
            "direct_norm": direct_norm,
            "implicit_norm": implicit_norm,
            **{f"v{k}_norm": norm for k, norm in enumerate(torch._foreach_norm(result.iterates), 1)},
            "grad_norm": grad_norm,
            "nonfinite": nonfinite,
        }

    def _ascend_next(self) -> dict[str, Tensor]:
        assert self.kept is not None
        images, _, weights = self.kept.take()
        return self.ascend(images, weights)

    def _unlearn_next(self, patched: Tensor) -> dict[str, Tensor]:
        assert self.kept is not None
        images, labels, weights = self.kept.take()
        return self.unlearn(images, labels, patched, weights)

    def state_dict(self) -> dict[str, Any]:
        """The weights, delta, both optimizers, and the norms of several orders."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.update.state_dict(),
            "delta": self.delta.detach(),
            "inner_optimizer": self.inner_update.state_dict(),
            **({} if self.orders is None else {"orders": self.orders.state_dict()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.update.load_state_dict(state["optimizer"])
        with torch.no_grad():
            self.delta.copy_(state["delta"])
        self.inner_update.load_state_dict(state["inner_optimizer"])
        if self.orders is not None:
            self.orders.load_state_dict(state["orders"])

    def _bounded(self, x: Tensor) -> Tensor:
        return x.clamp(0, 1) if self.config.clamp else x

    def _patched(self, round_: int, number: int) -> Tensor:
        """1 for the images of this rank's share that carry delta, (B, 1, 1, 1)."""
        size, own = self.rounds.size(number), self.rounds.own(number)
        generator = draws(self.seed, Stream.PATCHED, round_, number)
        mask = np.zeros(size)
        mask[generator.choice(size, self.config.num_patched(size), replace=False)] = 1
        share = np.zeros((self.rounds.share, 1, 1, 1))
        share[: own.stop - own.start, 0, 0, 0] = mask[own]
        return to_device(torch.from_numpy(share), self.ranks.device, self.ranks.dtype)

    @torch.no_grad()
    def _restart(self) -> None:
        """An inner pass starts from delta = 0 with a fresh inner optimizer."""
        self.delta.zero_()
        self.inner_update.forget()

    @torch.no_grad()
    def _project(self) -> None:
        if self.config.project_radius is not None:
            self.delta.mul_((self.config.project_radius / self.delta.norm()).clamp(max=1))

    def _changed(self) -> list[Tensor]:
        places = [] if self.kept is None else [self.kept.next]
        return [*self.parameters, self.delta, *self.update.state(), *self.inner_update.state(), *places]


def solver_of(config: Config) -> Solver:
    """The configured solver of eta H v = g."""
    if config.solver == "neumann":
        return neumann(config.K, config.step_size)
    return conjugate_gradient(config.K, config.step_size) if config.solver == "cg" else exact(config.step_size)


def _warn_of_unpatched(config: Config, rounds: Rounds) -> None:
    """Warn of batches without a perturbed image: int(0.01 n) is 0 for n < 100, without a word in the published code."""
    sizes = {rounds.size(number) for number in range(rounds.batches)}
    unpatched = sorted(size for size in sizes if not config.num_patched(size))
    if unpatched and rounds.ranks.is_main:
        log.warning(
            "no image of a batch of %s carries the perturbation (patched_fraction %g, rounded down): such a batch only "
            "fine-tunes and unlearns nothing; say min_patched: 1, or choose larger batches",
            " or ".join(map(str, unpatched)),
            config.patched_fraction,
        )
