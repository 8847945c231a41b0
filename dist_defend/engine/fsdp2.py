"""FSDP2: parameters, gradients and optimizer state sharded over the ranks, by torch's fully_shard."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dist_defend.engine.objective import NonFiniteError, Strategy
from dist_defend.engine.optim import build_optimizer, load_optimizer
from dist_defend.engine.whole import Whole
from dist_defend.models.blocks import repeated_blocks


class FullySharded(Strategy):
    """Each repeated block is a unit that is gathered when it runs, the rest of the objective is another.

    Sharding waits for the first update, so that what comes before it (an estimate on the fresh network, a resume) sees
    plain weights. Accelerate's own FSDP2 falls back to DDP on CPUs without a word; this is the same on all devices.
    """

    def __post_init__(self) -> None:
        self._whole: Whole | None = None  # until the first update

    def _shard(self) -> None:
        self._whole = Whole(self.objective)
        mesh = init_device_mesh(self.ranks.device.type, (self.ranks.world_size,))
        reshard = self.ranks.sharding.reshard_after_forward
        for block in repeated_blocks(self.objective):
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(self.objective, mesh=mesh)
        self.optimizer = build_optimizer(self.objective.parameters(), self.options.optimizer, fused=False)
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]

    def forward(self, batch: Any) -> dict[str, Tensor]:
        if self._whole is None:
            self._shard()
        with self.ranks.accelerator.autocast():
            terms: dict[str, Tensor] = self.objective(batch)
        return terms

    def forward_backward(self, batch: Any, is_last: bool) -> dict[str, Tensor]:
        if self._whole is None:
            self._shard()
        assert isinstance(self.objective, FSDPModule)
        self.objective.set_requires_gradient_sync(is_last)
        terms = self.forward(batch)
        (terms["loss"] / self.options.accumulation).backward()
        return terms

    def update(self, lr: float) -> dict[str, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not torch.isfinite(norm):
            raise NonFiniteError("the gradient is not finite")
        if self.options.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.options.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"grad_norm": norm}

    def plain(self) -> AbstractContextManager[None]:
        if self._whole is None:
            return nullcontext()
        for module in self.objective.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return self._whole.with_parameters({name: _full(p.detach()) for name, p in self.objective.named_parameters()})

    def state_dict(self) -> dict[str, Any]:
        with self.plain():
            objective = dict(self.objective.state_dict())
        if self._whole is None:
            return {"objective": objective, "optimizer": None}
        saved = self.optimizer.state_dict()
        states = {n: {k: _full(v) for k, v in state.items()} for n, state in saved["state"].items()}
        return {"objective": objective, "optimizer": {**saved, "state": states}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.objective.load_state_dict(state["objective"])
        if state["optimizer"] is None:
            return
        self._shard()
        own = self.optimizer.state_dict()
        states = {
            number: {key: _like(value, self.parameters[number]) for key, value in one.items()}
            for number, one in state["optimizer"]["state"].items()
        }
        load_optimizer(self.optimizer, {**own, "state": states})


def _full(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(value: Any, parameter: Tensor) -> Any:
    """An element-wise state sharded as its parameter is; anything else as it is."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape or not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.device).contiguous(), parameter.device_mesh, parameter.placements)
