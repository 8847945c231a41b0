"""A loss that couples all images of a batch, at the price of one micro-batch's activations.

GradCache (Gao, Zhang, Han and Callan 2021, arXiv 2101.06983): all embeddings without a graph, the loss's gradient with
respect to them, then each micro-batch once more, with a graph, for the product of its Jacobian and that gradient.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from dist_defend.batch import Batch
from dist_defend.engine.objective import Objective, at_least_float32
from dist_defend.engine.recompute import statistics_stay


class MicroBatch(NamedTuple):
    """Images, and the gradient (B, ...) of the loss with respect to their embeddings; None asks for the embeddings."""

    batch: Batch
    gradient: Tensor | None


class CoupledObjective(Objective):
    """A loss of the embeddings of all images. With is_cached an update's loss is that of all its micro-batches.

    forward takes a batch, whose loss it returns, or a MicroBatch: "embeddings", or as "loss" a scalar with the same
    gradient with respect to the weights as the whole loss has by way of these images.
    """

    is_cached = False

    @abstractmethod
    def embed(self, batch: Batch) -> Tensor:
        """Embeddings (B, ...)."""

    @abstractmethod
    def whole_loss(self, embeddings: Tensor) -> Tensor:
        """The loss of embeddings (B, ...); over ranks as the objective wants it."""

    def forward(self, batch: Batch | MicroBatch) -> dict[str, Tensor]:
        if isinstance(batch, Batch):
            return {"loss": self.whole_loss(self.embed(batch))}
        embeddings = at_least_float32(self.embed(batch.batch))
        if batch.gradient is None:
            return {"embeddings": embeddings}
        return {"loss": (embeddings * batch.gradient).sum()}


def micro_batches(
    objective: CoupledObjective, forward: Callable[[MicroBatch], dict[str, Tensor]], parts: list[Batch]
) -> tuple[Tensor, list[MicroBatch]]:
    """The loss of all parts together, and for each part what forward must be called with to add up its gradient.

    forward: the objective, or what wraps it. Gradients are times the number of parts, by which the strategies divide.
    The second pass sees the random numbers of the first, which leaves the statistics of batch norm alone.
    """
    devices = [parts[0].images.device] if parts[0].images.is_cuda else []
    with torch.random.fork_rng(devices), torch.no_grad(), statistics_stay(objective):
        embeddings = [forward(MicroBatch(part, None))["embeddings"] for part in parts]
    whole = torch.cat(embeddings).requires_grad_()
    loss = objective.whole_loss(whole)
    (gradient,) = torch.autograd.grad(loss, whole)
    shares = (gradient * len(parts)).split([len(part) for part in embeddings])
    return loss.detach(), [MicroBatch(*pair) for pair in zip(parts, shares, strict=True)]


def is_cached(objective: Objective) -> TypeGuard[CoupledObjective]:
    """Whether an update's loss is that of all its micro-batches together."""
    return isinstance(objective, CoupledObjective) and objective.is_cached
