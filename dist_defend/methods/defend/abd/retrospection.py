"""Self-retrospection (Hong et al. 2023, section 4.2): unlearn the perturbation that changes predictions most.

    min over theta of max over delta of KL(S_theta(x) || S_theta(x + delta))

No labels are used. delta is found on the teacher by default; the student's gradient is the implicit hypergradient of
ops/hypergrad.py, as in I-BAU. Images are normalised already, so delta is in normalised units.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dist_defend.methods.defend.abd.options import RetrospectionConfig
from dist_defend.models.batch_statistics import repeated_statistics
from dist_defend.ops.collectives import all_reduce_sum, world_size
from dist_defend.ops.fused_norm import differentiated_once
from dist_defend.ops.hypergrad import Hypergradient, hypergradient, neumann, total_norms
from dist_defend.ops.second_order import CheapSecondOrder
from dist_defend.ops.streams import Stream, draws

Divergence = Callable[[Tensor, Tensor], Tensor]  # logits, reference logits -> this rank's share of the loss
_SMALL = 1e-3  # standard deviation of delta's random start
_BETAS, _EPS = (0.9, 0.999), 1e-8  # Adam's


class SelfRetrospection:
    """delta and the student's hypergradient. student: in train mode, with synchronised batch norm over several ranks.

    divergence(logits, reference): KL with the distillation method's reduction, this rank's share of the mean over
    the global batch.
    """

    def __init__(
        self,
        config: RetrospectionConfig,
        student: nn.Module,
        teacher: nn.Module,
        divergence: Divergence,
        *,
        seed: int,
        batch_size: int,
    ) -> None:
        self.config, self.student, self.teacher, self.divergence = config, student, teacher, divergence
        self.seed, self.batch_size = seed, batch_size
        self.parameters: Sequence[nn.Parameter] = list(student.parameters())

    def start(self, image_size: int, number: int) -> Tensor:
        """The first delta for batch ``number``, (1, 3, H, W) float64 on the CPU.

        From exactly 0, where every gradient vanishes, Adam's first step follows the signs of rounding errors, so a
        small draw from (seed, number) is the default.
        """
        shape = (1, 3, image_size, image_size)
        if self.config.delta_init == "zero":
            return torch.zeros(shape, dtype=torch.float64)
        generator = draws(self.seed, Stream.RETROSPECTION, 0, number)
        return torch.from_numpy(_SMALL * generator.standard_normal(shape))

    def patched(self, own: slice, *place: int) -> Tensor:
        """Mask (b, 1, 1, 1) of this rank's slice: 1 for images that carry delta in the outer loss, else 0.

        Drawn from (seed, place) over the global batch; float64 on the CPU.
        """
        generator = draws(self.seed, Stream.RETROSPECTION, 1, *place)
        mask = np.zeros((self.batch_size, 1, 1, 1))
        mask[generator.choice(self.batch_size, self.config.num_patched(self.batch_size), replace=False)] = 1
        return torch.from_numpy(mask[own])

    def synthesise(self, images: Tensor, reference: Tensor, start: Tensor) -> Tensor:
        """delta (1, 3, H, W) that changes the predictions of the network ``perturbs``: Adam from ``start``.

        reference: that network's logits for images (b, 3, H, W), without a graph.
        """
        model = self.teacher if self.config.perturbs == "teacher" else self.student
        delta, (first, second) = start, torch.zeros(2, *start.shape, dtype=start.dtype, device=start.device).unbind()
        for number in range(1, self.config.inner_rounds + 1):
            delta = delta.detach().requires_grad_()
            with self._statistics():
                loss = -self.divergence(model(images + delta), reference)
            (slope,) = torch.autograd.grad(loss, delta)
            delta = delta.detach()
            slope = all_reduce_sum(slope) + 2 * self.config.synthesis_penalty * delta
            first = torch.lerp(slope, first, _BETAS[0])
            second = torch.lerp(slope.square(), second, _BETAS[1])
            unbiased, spread = first / (1 - _BETAS[0] ** number), (second / (1 - _BETAS[1] ** number)).sqrt()
            delta = delta - self.config.inner_lr * unbiased / (spread + _EPS)
        return delta

    def hypergradient(
        self, images: Tensor, logits: Tensor, delta: Tensor, patched: Tensor
    ) -> tuple[Hypergradient, dict[str, Tensor]]:
        """The hypergradient of the student's parameters, summed over ranks, and scalars to log.

        images (b, 3, H, W), logits: the student's for them (b, C); delta (1, 3, H, W), patched (b, 1, 1, 1).
        Unless detach_reference, logits must still have their graph, which is used up.
        """
        config, delta = self.config, delta.detach().requires_grad_()
        with self._statistics():
            reference = logits.detach() if config.detach_reference else logits
            with differentiated_once():
                patched_logits = self.student(torch.addcmul(images, patched, delta))
            outer = self.divergence(patched_logits, reference)
            self._pass_again(images)
            with CheapSecondOrder():
                perturbed = self.student(images + delta)
            self._pass_again(images)
            inner = -self.divergence(perturbed, logits.detach())
        solver = neumann(config.K, config.step_size)
        result = hypergradient(outer, inner, delta, self.parameters, solver, config.step_size, config.penalty)
        direct_norm, implicit_norm = total_norms(result.direct, result.implicit)
        scalars = {
            "outer_loss": outer.detach() * world_size(),
            "delta_norm": delta.detach().norm(),
            "direct_norm": direct_norm,
            "implicit_norm": implicit_norm,
        }
        return result, scalars

    @torch.no_grad()
    def after_update(self, images: Tensor, delta: Tensor, patched: Tensor) -> None:
        """The passes of the published code's logging, which move running statistics; with statistics: published."""
        if self.config.statistics == "published":
            self._pass_again(images)
            self.student(images + patched * delta)

    @torch.no_grad()
    def _pass_again(self, images: Tensor) -> None:
        """The published code's extra pass of the clean images for each loss; only with statistics: published."""
        if self.config.statistics == "published":
            self.student(images)

    def _statistics(self) -> Any:
        return nullcontext() if self.config.statistics == "published" else repeated_statistics(self.student, 0)
