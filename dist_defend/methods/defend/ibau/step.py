"""One step of a round: gradient ascent on the perturbation, or an update of the weights by the hypergradient."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.batch import Batch
from dist_defend.engine.graphed import GraphedUpdate
from dist_defend.engine.objective import NonFiniteError
from dist_defend.engine.optim import build_optimizer, load_optimizer
from dist_defend.engine.step import Position
from dist_defend.methods.defend.ibau.options import Config
from dist_defend.methods.defend.ibau.rounds import Rounds
from dist_defend.models.classifier import Classifier
from dist_defend.ops.collectives import all_reduce_sum
from dist_defend.ops.hypergrad import (
    Solver,
    check_twice_differentiable,
    conjugate_gradient,
    exact,
    hypergradient,
    neumann,
)
from dist_defend.ops.second_order import CheapSecondOrder
from dist_defend.ops.streams import Stream, draws


class UnlearningStep:
    """min over theta of max over delta of the cross-entropy of f_theta(x + delta) (Zeng et al. 2022, section 4).

    A round has T inner calls, then T outer ones, over the batches of ``rounds``. The model is in eval mode for good, so
    batch norm's statistics stay, images do not influence each other, and nothing is random but the choice of patched
    images: those are drawn from (seed, round, batch) over the global batch.
    """

    def __init__(self, model: Classifier, config: Config, rounds: Rounds, seed: int) -> None:
        self.model, self.config, self.rounds, self.seed = model, config, rounds, seed
        self.ranks = ranks = rounds.ranks
        model.to(ranks.device, ranks.dtype, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        is_normalized = config.space == "normalized"
        self.network: nn.Module = model.net if is_normalized else model
        self.enter: nn.Module = model.normalize if is_normalized else nn.Identity()
        check_twice_differentiable(self.network, rounds.image_size, f"{config.model} ({model.arch})")
        self.parameters = list(model.parameters())
        self.delta = torch.zeros(1, 3, *2 * (rounds.image_size,), device=ranks.device, dtype=ranks.dtype)
        self.delta.requires_grad_()
        self.delta.grad, self.gradients = torch.zeros_like(self.delta), [torch.zeros_like(p) for p in self.parameters]
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient  # written, never added to, and laid out as the fused optimizers need it
        self.optimizer = build_optimizer(self.parameters, config.optimizer)
        self.inner_optimizer = build_optimizer([self.delta], config.inner)  # type: ignore[list-item]
        self.first = rounds.first()
        self.solver = solver_of(config)
        self.inner = GraphedUpdate("I-BAU inner step", self.ascend, self._changed, ranks.device, config.graph)
        self.outer = GraphedUpdate("I-BAU outer step", self.unlearn, self._changed, ranks.device, config.graph)
        for optimizer in (self.optimizer, self.inner_optimizer):
            optimizer.param_groups[0]["capturable"] = self.outer.is_graphed
            optimizer._warned_capturable_if_run_uncaptured = True  # as to warm up

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        """Raises NonFiniteError on a CPU, with the weights as they were."""
        number = at.batch % self.rounds.batches
        images, labels, weights = self.rounds.padded(batch, number)
        if at.batch == 0:
            self._restart()
        if at.batch < self.rounds.batches:
            scalars = self.inner(images, weights)
            if number == self.rounds.batches - 1:
                self._project()
        else:
            scalars = self.outer(images, labels, self._patched(at.epoch, number), weights)
            if self.ranks.device.type == "cpu" and scalars["nonfinite"]:
                raise NonFiniteError("the hypergradient is not finite")
        return scalars

    def ascend(self, images: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """delta <- delta - lr grad(penalty |delta|^2 - CE(f(x + delta), argmax f(x))); images (B, 3, H, W)."""
        x = self.enter(images)
        with torch.no_grad():
            pseudo_labels = self.network(x).argmax(1)
        loss = -self._cross_entropy(self.network(self._bounded(x + self.delta)), pseudo_labels, weights)
        (slope,) = torch.autograd.grad(loss, self.delta)
        penalty = self.config.penalty * self.delta.detach().square().sum()  # through the norm, its slope at 0 is nan
        assert self.delta.grad is not None
        self.delta.grad.copy_(all_reduce_sum(slope) + 2 * self.config.penalty * self.delta.detach())
        self.inner_optimizer.step()
        return {
            "inner_loss": loss.detach() * self.ranks.world_size + penalty,
            "delta_norm": self.delta.detach().norm(),
        }

    def unlearn(self, images: Tensor, labels: Tensor, patched: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """One update of the weights by the hypergradient of CE(f(x + patched delta), y); patched (B, 1, 1, 1), 0 or 1.

        The inner loss of the fixed-point map is that of the first batch with its labels, as published.
        """
        x = self._bounded(self.enter(images) + patched * self.delta)
        outer = self._cross_entropy(self.network(x), labels, weights)
        first_images, first_labels, first_weights = self.first
        with CheapSecondOrder():
            logits = self.network(self._bounded(self.enter(first_images) + self.delta))
        inner = -self._cross_entropy(logits, first_labels, first_weights)
        result = hypergradient(
            outer, inner, self.delta, self.parameters, self.solver, self.config.step_size, self.config.penalty
        )
        norm = torch.nn.utils.get_total_norm(result.total)
        torch._foreach_copy_(self.gradients, result.total)
        nonfinite = (~torch.isfinite(norm)).float()
        self.optimizer.found_inf = nonfinite  # type: ignore[attr-defined]  # the fused kernels then leave all as it is
        self.optimizer.step()
        return {
            "outer_loss": outer.detach() * self.ranks.world_size,
            "direct_norm": torch.nn.utils.get_total_norm(result.direct),
            "implicit_norm": torch.nn.utils.get_total_norm(result.implicit),
            **{f"v{k}_norm": v.norm() for k, v in enumerate(result.iterates, 1)},
            "grad_norm": norm,
            "nonfinite": nonfinite,
        }

    def state_dict(self) -> dict[str, Any]:
        """The weights, delta and both optimizers."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "delta": self.delta.detach(),
            "inner_optimizer": self.inner_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        with torch.no_grad():
            self.delta.copy_(state["delta"])
        load_optimizer(self.inner_optimizer, state["inner_optimizer"])

    def _cross_entropy(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """This rank's share of the mean over the global batch."""
        return (functional.cross_entropy(logits, labels, reduction="none") * weights).sum()

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
        return torch.from_numpy(share).to(self.ranks.dtype).to(self.ranks.device, non_blocking=True)

    @torch.no_grad()
    def _restart(self) -> None:
        """A round starts from delta = 0 with a fresh inner optimizer."""
        self.delta.zero_()
        for tensor in _state_of(self.inner_optimizer):
            tensor.zero_()

    @torch.no_grad()
    def _project(self) -> None:
        if self.config.project_radius is not None:
            self.delta.mul_((self.config.project_radius / self.delta.norm()).clamp(max=1))

    def _changed(self) -> list[Tensor]:
        return [*self.parameters, self.delta, *_state_of(self.optimizer), *_state_of(self.inner_optimizer)]


def solver_of(config: Config) -> Solver:
    """The configured solver of eta H v = g."""
    if config.solver == "neumann":
        return neumann(config.K, config.step_size)
    return conjugate_gradient(config.K, config.step_size) if config.solver == "cg" else exact(config.step_size)


def _state_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
