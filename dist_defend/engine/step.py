"""A step: one batch in, one update done, device scalars out."""

from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_defend.batch import Batch
from dist_defend.engine.dist import Ranks
from dist_defend.engine.optim import OptimizerConfig, build_optimizer, lr_factor


class Step(Protocol):
    """What Trainer.fit drives. A step owns whom it trains and never waits for the device."""

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Consume this rank's share of a global batch, update, return scalars (means over this rank's share)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next call depends on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict."""
        ...


class Objective(nn.Module):
    """A loss over a batch, as a module: DDP wraps it whole, however often it calls its encoder.

    forward(batch) -> scalars with the key "loss". Only what is trained may be registered as a submodule.
    """

    def after_backward(self) -> None:
        """Called between the backward pass and the update, outside of autograd."""


class NonFiniteError(RuntimeError):
    """Loss or gradient is not finite; the update was not done."""


class GradientStep:
    """First-order step: forward, backward, (clip,) update, on Accelerate.

    accumulation splits this rank's share into so many micro-batches; the objective is then the mean of theirs, which
    for a contrastive loss means negatives from one micro-batch only.
    A gradient that is not finite stops the run before the update: at once on a CPU; on a GPU the fused optimizer skips
    the update by the device flag ``found_inf`` and the trainer raises when it next reads the scalars, so no step waits
    for the device.
    """

    def __init__(
        self,
        objective: Objective,
        config: OptimizerConfig,
        ranks: Ranks,
        *,
        steps_per_epoch: int,
        epochs: int,
        accumulation: int = 1,
        max_grad_norm: float | None = None,
    ) -> None:
        self.objective, self.config, self.accelerator = objective, config, ranks.accelerator
        self.steps_per_epoch, self.total_steps = steps_per_epoch, steps_per_epoch * epochs
        self.accumulation, self.max_grad_norm = accumulation, max_grad_norm
        objective.to(ranks.device, ranks.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.module, self.optimizer = self.accelerator.prepare(
            objective, build_optimizer(objective.parameters(), config)
        )
        if isinstance(self.module, DistributedDataParallel):
            self.module.broadcast_buffers = False  # all ranks update them alike (torch 2.13 deprecates the argument)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.is_scaled = self.accelerator.mixed_precision == "fp16"
        self.step = 0

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        scalars: dict[str, Tensor] = {}
        for number, part in enumerate(_split(batch, self.accumulation)):
            is_last = number == self.accumulation - 1
            with nullcontext() if is_last else self.accelerator.no_sync(self.module):
                terms = self.module(part)
                self.accelerator.backward(terms["loss"] / self.accumulation)
            for key, value in terms.items():
                scalars[key] = scalars.get(key, 0) + value.detach() / self.accumulation
        self.objective.after_backward()
        scalars.update(self._update())
        return scalars

    def _update(self) -> dict[str, Tensor]:
        factor = lr_factor(self.config, self.step, self.steps_per_epoch, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * factor
        scalars = {}
        if self.is_scaled:  # the scaler unscales, and skips updates that overflow, by itself
            if self.max_grad_norm is not None:
                scalars["grad_norm"] = self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
        else:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            nonfinite = (~torch.isfinite(norm)).float()
            if norm.device.type == "cpu":
                if nonfinite:
                    raise NonFiniteError("the gradient is not finite")
            else:
                self.optimizer.optimizer.found_inf = nonfinite
            if self.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
            scalars = {"grad_norm": norm, "nonfinite": nonfinite}
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return scalars

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        if self.is_scaled:
            state["scaler"] = self.accelerator.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        if self.is_scaled:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def at_least_float32(tensor: Tensor) -> Tensor:
    """Losses are taken in float32 or float64, whatever autocast made of the features."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _split(batch: Batch, parts: int) -> list[Batch]:
    if parts == 1:
        return [batch]
    views = [view.chunk(parts) for view in batch.views]
    rest = zip(batch.labels.chunk(parts), batch.index.chunk(parts), strict=True)
    return [Batch(tuple(view[i] for view in views), *pair) for i, pair in enumerate(rest)]
