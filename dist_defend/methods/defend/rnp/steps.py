"""The two updates of RNP (Li et al. 2023, algorithm 1): SGD steps, whose tensor part a CUDA graph can capture."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.batch import Batch
from dist_defend.engine.dist import Ranks
from dist_defend.engine.graphed import GraphedUpdate, GraphMode
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.engine.step import Position
from dist_defend.engine.update import Update, check_finite
from dist_defend.models.batch_statistics import counted_together
from dist_defend.models.masked_norm import masked_together
from dist_defend.ops.fused_norm import differentiated_once
from dist_defend.ops.hypergrad import all_reduce_together

_MOMENTUM = 0.9  # of both phases, as published


class CrossEntropyStep:
    """SGD on ``scale`` times the mean cross-entropy over the global batch, in train mode.

    The ranks' shares may differ in size but not be empty. ``correct`` of ``seen`` counts an epoch's predictions before
    each update, over all ranks, until read_accuracy(). model: on the ranks' device, batch norm synchronised;
    parameters: the trained ones, the others need no gradient. num_batches: of an epoch; the last batch may have another
    size, on several ranks also on some of them alone.
    """

    max_grad_norm: float | None = None

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        ranks: Ranks,
        *,
        scale: float,
        lr: float,
        weight_decay: float,
        graph: GraphMode = "off",
        num_batches: int = 0,
    ) -> None:
        self.model, self.parameters = model.train(), list(parameters)
        self.num_batches = num_batches
        self.scale, self.world_size = scale, ranks.world_size
        model.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        self.counts = torch.zeros(2, dtype=torch.float64, device=ranks.device)
        self.correct, self.seen = self.counts.unbind()
        self.graphed = GraphedUpdate(f"rnp's {type(self).__name__}", self.learn, self.changed, ranks.device, graph)
        sgd = OptimizerConfig("sgd", lr, weight_decay, momentum=_MOMENTUM)
        self.update = Update(self.parameters, sgd, self.graphed.is_graphed)

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        """Raises NonFiniteError on a CPU, with the parameters as they were."""
        is_last = at.batch + 1 == self.num_batches
        return check_finite(self.graphed(batch.images, batch.labels, kind=is_last), "the gradient")

    def learn(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """images (B, 3, H, W), labels (B,) -> scalars. Nothing here waits for the device or depends on values."""
        self.update.let_go()
        with counted_together(self.model), differentiated_once():
            logits = self._logits(images)
        correct = (logits.detach().argmax(1) == labels).sum()
        counts = torch.stack([correct, correct.new_full((), len(labels))])
        if self.world_size > 1:
            torch.distributed.all_reduce(counts)
        self.counts += counts
        total = functional.cross_entropy(logits, labels, reduction="sum")
        # The mean over ranks of scale CE is that over the global batch; the ranks' gradients are summed.
        slope = total.new_full((), self.scale) / counts[1]
        gradients = torch.autograd.grad(total, self.parameters, slope)
        _, nonfinite = self.update.step(all_reduce_together(list(gradients)), self.max_grad_norm)
        self._after_update()
        cross_entropy = total.detach() * self.world_size / counts[1]
        return {
            "loss": self.scale * cross_entropy,
            "cross_entropy": cross_entropy,
            "accuracy": counts[0] / counts[1],
            "nonfinite": nonfinite,
        }

    def _logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits

    def changed(self) -> Iterator[Tensor]:
        """Every tensor that learn() writes to."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        yield from self.update.state()
        yield self.counts

    def _after_update(self) -> None:
        """Hook after each update, empty here."""

    def read_accuracy(self) -> float:
        """Running training accuracy since the last call: correct / seen. Waits for the device."""
        accuracy = (self.correct / self.seen).item()
        self.correct.zero_()
        self.seen.zero_()
        return accuracy

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.update.state_dict(),
            "counts": [self.correct, self.seen],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """In place: a captured graph keeps its addresses."""
        self.model.load_state_dict(state["model"])
        self.update.load_state_dict(state["optimizer"])
        for own, saved in zip((self.correct, self.seen), state["counts"], strict=True):
            own.copy_(saved)


class UnlearnStep(CrossEntropyStep):
    """Gradient ascent on clean images (algorithm 1, unlearning): SGD on -CE over all weights.

    schedule: epochs from which on the rate is a tenth of what it was. max_grad_norm: clips the gradient; None: no
    clipping, as in effect in the published code, which clips gradients that are still empty.
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks,
        *,
        lr: float = 0.01,
        weight_decay: float = 5e-4,
        schedule: Sequence[int] = (10, 20),
        max_grad_norm: float | None = None,
        graph: GraphMode = "off",
        num_batches: int = 0,
    ) -> None:
        options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "graph": graph, "num_batches": num_batches}
        super().__init__(model, list(model.parameters()), ranks, scale=-1.0, **options)
        self.lr, self.schedule = lr, tuple(schedule)
        self.max_grad_norm = max_grad_norm

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        self.update.set_rate(self.lr * 0.1 ** sum(at.epoch >= milestone for milestone in self.schedule))
        return super().__call__(batch, at)


class RecoverStep(CrossEntropyStep):
    """Masks that bring clean accuracy back (algorithm 1, recovering): SGD on alpha CE over masks in [0, 1].

    The weights need no gradient: the masks' gradients do not depend on theirs. Momentum is not clamped, so a mask can
    stay at a bound for a while.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, nn.Parameter],
        ranks: Ranks,
        *,
        alpha: float = 0.2,
        lr: float = 0.2,
        graph: GraphMode = "off",
        num_batches: int = 0,
    ) -> None:
        options: dict[str, Any] = {"lr": lr, "weight_decay": 0.0, "graph": graph, "num_batches": num_batches}
        super().__init__(model, list(masks.values()), ranks, scale=alpha, **options)

    def _logits(self, images: Tensor) -> Tensor:
        with masked_together(self.model):
            return super()._logits(images)

    @torch.no_grad()
    def _after_update(self) -> None:
        masks: list[Tensor] = list(self.parameters)
        torch._foreach_clamp_min_(masks, 0)
        torch._foreach_clamp_max_(masks, 1)
