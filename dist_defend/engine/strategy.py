"""How an objective, its optimizer and the ranks are tied together: replicated, or sharded."""

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_defend.engine.dist import Ranks
from dist_defend.engine.optim import OptimizerConfig, build_optimizer, load_optimizer


class Objective(nn.Module):
    """A loss over a batch, as a module: it is wrapped whole, however often it calls its encoder.

    forward(batch) -> scalars with the key "loss". Only what is trained may be registered as a submodule.
    """

    def after_backward(self) -> None:
        """Called between the backward pass and the update, outside of autograd."""


def at_least_float32(tensor: Tensor) -> Tensor:
    """Losses are taken in float32 or float64, whatever autocast made of the features."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class NonFiniteError(RuntimeError):
    """Loss or gradient is not finite; the update was not done, or is not kept."""


class Strategy(Protocol):
    """What GradientStep asks of DDP, FSDP2 and ZeRO. States hold whole tensors: one format for all of them."""

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """What the objective returns."""
        ...

    def forward_backward(self, batch: Any, is_last: bool) -> dict[str, Tensor]:
        """The objective's scalars for one micro-batch; gradients are added up, and reduced by the last one."""
        ...

    def update(self, lr: float) -> dict[str, Tensor]:
        """Clip, update, forget the gradients -> grad_norm. Raises NonFiniteError."""
        ...

    def plain(self) -> AbstractContextManager[None]:
        """Within, on every rank, the objective holds all of its parameters and may be called in parts."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """objective, optimizer (torch's layout; None before the first update), by all ranks together."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict, of any strategy."""
        ...


class Replicated:
    """All of it on every rank, wrapped by Accelerate: DDP, or nothing on one rank."""

    def __init__(
        self,
        objective: Objective,
        config: OptimizerConfig,
        ranks: Ranks,
        accumulation: int,
        max_grad_norm: float | None,
    ) -> None:
        self.objective, self.accelerator = objective, ranks.accelerator
        self.accumulation, self.max_grad_norm = accumulation, max_grad_norm
        self.module, self.optimizer = self.accelerator.prepare(
            objective, build_optimizer(objective.parameters(), config)
        )
        if isinstance(self.module, DistributedDataParallel):
            self.module.broadcast_buffers = False  # all ranks update them alike (torch 2.13 deprecates the argument)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.is_scaled = self.accelerator.mixed_precision == "fp16"

    def forward(self, batch: Any) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = self.module(batch)
        return terms

    def forward_backward(self, batch: Any, is_last: bool) -> dict[str, Tensor]:
        with nullcontext() if is_last else self.accelerator.no_sync(self.module):
            terms = self.forward(batch)
            self.accelerator.backward(terms["loss"] / self.accumulation)
        return terms

    def update(self, lr: float) -> dict[str, Tensor]:
        """On a GPU an update that is not finite is skipped by the device flag ``found_inf``, without a wait."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
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
        return scalars

    def plain(self) -> AbstractContextManager[None]:
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"objective": self.objective.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.is_scaled:
            state["scaler"] = self.accelerator.scaler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state["objective"])
        if state["optimizer"] is not None:
            load_optimizer(self.optimizer, state["optimizer"])
            for parameter, own in self.optimizer.state.items():
                for key, value in own.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        # Fused updates walk both in memory order, and a state of a sharded run has another one.
                        own[key] = torch.empty_like(parameter).copy_(value)
        if self.is_scaled:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def make_strategy(
    objective: Objective, config: OptimizerConfig, ranks: Ranks, accumulation: int, max_grad_norm: float | None
) -> Strategy:
    """What the launch asked for (ranks.sharding)."""
    name = ranks.sharding.strategy
    arguments = (objective, config, ranks, accumulation, max_grad_norm)
    strategy: Strategy
    if name == "ddp":
        strategy = Replicated(*arguments)
    elif name == "fsdp2":
        strategy = importlib.import_module("dist_defend.engine.fsdp2").FullySharded(*arguments)
    else:
        strategy = importlib.import_module("dist_defend.engine.zero").Zero(*arguments)
    return strategy
