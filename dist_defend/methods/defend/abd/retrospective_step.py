"""Distillation on given images with self-retrospection: OOD's and CMI's last epochs."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dist_defend.batch import Batch
from dist_defend.data.order import rank_slice
from dist_defend.engine.graphed import GraphedUpdate, GraphMode
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.engine.step import Position
from dist_defend.engine.update import Update, check_finite
from dist_defend.methods.defend.abd.options import RetrospectionConfig
from dist_defend.methods.defend.abd.pair import Pair
from dist_defend.methods.defend.abd.retrospection import SelfRetrospection
from dist_defend.ops.hypergrad import all_reduce_together, check_twice_differentiable
from dist_defend.ops.transfer import to_device

Share = Callable[[Tensor, Tensor], Tensor]  # student's and teacher's logits -> this rank's share of a global mean


class RetrospectiveStep:
    """The student's gradient is that of the distillation loss plus the hypergradient of self-retrospection.

    A fresh optimizer like ``optimizer``, from restart_lr (where given) down a cosine over all steps of the stage. The
    student is in train mode; delta is added to normalised images. All tensor work is one update that a CUDA graph can
    capture. batch_size: images of a global batch, the same on every rank.
    """

    def __init__(
        self,
        pair: Pair,
        config: RetrospectionConfig,
        optimizer: OptimizerConfig,
        loss: Share,
        divergence: Share,
        *,
        batch_size: int,
        steps_per_epoch: int,
        epochs: int,
        graph: GraphMode,
    ) -> None:
        self.pair, self.config, self.loss = pair, config, loss
        self.ranks = pair.context.ranks
        self.steps_per_epoch, self.total_steps = steps_per_epoch, steps_per_epoch * epochs
        device, dtype = self.ranks.device, self.ranks.dtype
        pair.student.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        check_twice_differentiable(pair.student.net, pair.image_size, f"the student {pair.student.arch}")
        rate = config.restart_lr or optimizer.lr
        self.schedule = replace(optimizer, lr=rate, schedule="cosine", milestones=(), warmup_epochs=0.0)
        self.parameters = list(pair.student.parameters())
        self.retrospection = SelfRetrospection(
            config, pair.student.net, pair.teacher.net, divergence, seed=pair.context.seed, batch_size=batch_size
        )
        self.own = rank_slice(batch_size, self.ranks.rank, self.ranks.world_size)
        self.graphed = GraphedUpdate("retrospection", self.imitate, self._changed, device, graph)
        self.update = Update(self.parameters, self.schedule, self.graphed.is_graphed)
        self._latest: tuple[Tensor, Tensor] | None = None  # the images, and where delta starts

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        """Raises NonFiniteError on a CPU, with the weights as they were."""
        device, dtype, number = self.ranks.device, self.ranks.dtype, at.done(self.steps_per_epoch)
        self.update.follow(number, self.total_steps, self.total_steps)
        drawn = self.retrospection.start(self.pair.image_size, number), self.retrospection.patched(self.own, number)
        start, patched = (to_device(value, device, dtype) for value in drawn)
        self.pair.student.train()
        self._latest = batch.images, start
        return check_finite(self.graphed(batch.images, start, patched), "the hypergradient")

    def imitate(self, images: Tensor, start: Tensor, patched: Tensor) -> dict[str, Tensor]:
        """images (b, 3, H, W), delta to start from (1, 3, H, W), patched (b, 1, 1, 1): 1 or 0. One update."""
        student, teacher = self.pair.student, self.pair.teacher
        x = student.normalize(images)
        with torch.no_grad():
            wanted = teacher.net(x)
        logits = student.net(x)
        reference = wanted if self.config.perturbs == "teacher" else logits.detach()
        delta = self.retrospection.synthesise(x, reference, start)
        loss = self.loss(logits, wanted)
        direct = torch.autograd.grad(loss, self.parameters, retain_graph=not self.config.detach_reference)
        result, scalars = self.retrospection.hypergradient(x, logits, delta, patched)
        total = [a + b for a, b in zip(all_reduce_together(list(direct)), result.total, strict=True)]
        norm, nonfinite = self.update.step(total)
        self.retrospection.after_update(x, delta, patched)
        told = {"loss": loss.detach() * self.ranks.world_size, "grad_norm": norm, "nonfinite": nonfinite}
        return {**told, **scalars}

    def perturbation(self) -> Tensor | None:
        """delta (1, 3, H, W) for the latest batch and the student as it is now, which is put in eval mode.

        None before the first step, also in a run that resumes after its last step. A collective call.
        """
        if self._latest is None:
            return None
        images, start = self._latest
        student = self.pair.student.eval()
        with torch.no_grad():
            x = student.normalize(images)
            reference = (self.pair.teacher if self.config.perturbs == "teacher" else student).net(x)
        return self.retrospection.synthesise(x, reference, start)

    def state_dict(self) -> dict[str, Any]:
        return {"student": self.pair.student.state_dict(), "optimizer": self.update.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pair.student.load_state_dict(state["student"])
        self.update.load_state_dict(state["optimizer"])

    def _changed(self) -> Iterator[Tensor]:
        yield from self.parameters
        yield from self.pair.student.buffers()
        yield from self.update.state()
