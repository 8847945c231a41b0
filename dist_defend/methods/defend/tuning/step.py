"""The update of a tuning defence: all weights, by a loss of clean images; a CUDA graph can capture its tensor part."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.batch import Batch
from dist_defend.engine.dist import Ranks
from dist_defend.engine.graphed import GraphedUpdate, GraphMode
from dist_defend.engine.objective import at_least_float32
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.engine.step import Position
from dist_defend.engine.update import Update, check_finite
from dist_defend.methods.defend.tuning.selection import EpochChoice
from dist_defend.ops.collectives import all_reduce_sum
from dist_defend.ops.hypergrad import all_reduce_together


class TuningStep:
    """Fine-tuning: the mean cross-entropy over the global batch, in train mode. Subclasses change loss() or learn().

    The ranks' shares may differ in size but not be empty. model: on the ranks' device, batch norm synchronised.
    """

    in_train_mode = True
    choice: EpochChoice | None = None  # where another epoch than the last may be delivered

    def __init__(
        self,
        model: nn.Module,
        optimizer: OptimizerConfig,
        ranks: Ranks,
        *,
        steps_per_epoch: int,
        epochs: int,
        graph: GraphMode = "off",
    ) -> None:
        self.model, self.world_size = model.requires_grad_(True), ranks.world_size
        self.steps_per_epoch, self.total_steps = steps_per_epoch, steps_per_epoch * epochs
        self.parameters = list(model.parameters())
        self.graphed = GraphedUpdate(type(self).__name__, self.learn, self.changed, ranks.device, graph)
        self.update = Update(self.parameters, optimizer, self.graphed.is_graphed)

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        """Raises NonFiniteError on a CPU, with the parameters as they were."""
        self.model.train(self.in_train_mode)
        self.update.follow(at.done(self.steps_per_epoch), self.steps_per_epoch, self.total_steps)
        is_last = at.batch + 1 == self.steps_per_epoch
        return check_finite(self.graphed(batch.images, batch.labels, kind=is_last), "the gradient")

    def loss(self, images: Tensor, labels: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Scalars, of which ``loss`` is minimised.

        weight: number of ranks / images of all ranks; a sum over this rank's images times weight has the global mean as
        its mean over ranks.
        """
        logits = at_least_float32(self.model(images))
        cross_entropy = functional.cross_entropy(logits, labels, reduction="sum") * weight
        return {"loss": cross_entropy}

    def learn(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """images (B, 3, H, W), labels (B,) -> scalars. Nothing here waits for the device or depends on values."""
        scalars, gradients = self.gradients(images, labels)
        return self.follow(scalars, gradients)

    def gradients(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The scalars of loss() and the gradients over all ranks' images, in the parameters' order."""
        count = all_reduce_sum(torch.ones_like(labels, dtype=images.dtype).sum())
        scalars = self.loss(images, labels, self.world_size / count)
        share = scalars["loss"] / self.world_size
        found = torch.autograd.grad(share, self.parameters, allow_unused=True, materialize_grads=True)
        return scalars, all_reduce_together(list(found))

    def follow(self, scalars: dict[str, Tensor], gradients: list[Tensor]) -> dict[str, Tensor]:
        """Update the weights by these gradients -> the scalars, detached, with the gradients' norm."""
        norm, nonfinite = self.update.step(gradients)
        told = {name: value.detach() for name, value in scalars.items()}
        return {**told, "grad_norm": norm, "nonfinite": nonfinite}

    def changed(self) -> Iterator[Tensor]:
        """Every tensor that learn() writes to."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        yield from self.update.state()

    def is_over(self) -> bool:
        """Whether training ends now; asked after each epoch."""
        return False

    def metrics(self) -> dict[str, Any]:
        """The step's metrics for result.json."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        chosen = {} if self.choice is None else {"choice": self.choice.state_dict()}
        return {"model": self.model.state_dict(), "optimizer": self.update.state_dict(), **chosen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """In place: a captured graph keeps its addresses."""
        self.model.load_state_dict(state["model"])
        self.update.load_state_dict(state["optimizer"])
        if self.choice is not None:
            self.choice.load_state_dict(state["choice"])
