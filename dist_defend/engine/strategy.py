"""How an objective, its optimizer and the ranks are tied together: replicated, or sharded."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dist_defend.engine.dist import Ranks
from dist_defend.engine.objective import NonFiniteError, Objective, Strategy
from dist_defend.engine.optim import UpdateConfig, build_optimizer, load_optimizer
from dist_defend.engine.update import owned


class Replicated(Strategy):
    """All of it on every rank, wrapped by Accelerate: DDP, or nothing on one rank."""

    def __post_init__(self) -> None:
        self.accelerator = self.ranks.accelerator
        optimizer = build_optimizer(self.objective.parameters(), self.options.optimizer)
        self.module, self.optimizer = self.accelerator.prepare(self.objective, optimizer)
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
            self.accelerator.backward(terms["loss"] / self.options.accumulation)
        return terms

    def update(self, lr: float) -> dict[str, Tensor]:
        """On a GPU an update that is not finite is skipped by the device flag ``found_inf``, without a wait."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        scalars = {}
        if self.is_scaled:  # the scaler unscales, and skips updates that overflow, by itself
            if self.options.max_grad_norm is not None:
                scalars["grad_norm"] = self.accelerator.clip_grad_norm_(self.parameters, self.options.max_grad_norm)
        else:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            nonfinite = (~torch.isfinite(norm)).float()
            if norm.device.type == "cpu":
                if nonfinite:
                    raise NonFiniteError("the gradient is not finite")
            else:
                self.optimizer.optimizer.found_inf = nonfinite
            if self.options.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.options.max_grad_norm, norm)
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
            for parameter, own in self.optimizer.state.items():  # a sharded run's has another memory layout
                own.update({key: owned(value, parameter) for key, value in own.items()})
        if self.is_scaled:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def make_strategy(objective: Objective, options: UpdateConfig, ranks: Ranks) -> Strategy:
    """What the launch asked for (ranks.sharding)."""
    name = ranks.sharding.strategy
    if name == "ddp":
        return Replicated(objective, options, ranks)
    if name == "fsdp2":
        from dist_defend.engine.fsdp2 import FullySharded  # half a second that most runs do without

        return FullySharded(objective, options, ranks)
    from dist_defend.engine.zero import Zero

    return Zero(objective, options, ranks)
