"""What is trained, and what ties it to the ranks: the two base classes of first-order training."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dist_defend.engine.dist import Ranks
from dist_defend.engine.optim import UpdateConfig


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


@dataclass(eq=False)
class Strategy(ABC):
    """What GradientStep asks of DDP, FSDP2 and ZeRO. States hold whole tensors: one format for all of them."""

    objective: Objective
    options: UpdateConfig
    ranks: Ranks

    @abstractmethod
    def __post_init__(self) -> None:
        """What a strategy does with these at once."""

    @abstractmethod
    def forward(self, batch: Any) -> dict[str, Tensor]:
        """What the objective returns."""

    @abstractmethod
    def forward_backward(self, batch: Any, is_last: bool) -> dict[str, Tensor]:
        """The objective's scalars for one micro-batch; gradients are added up, and reduced by the last one."""

    @abstractmethod
    def update(self, lr: float) -> dict[str, Tensor]:
        """Clip, update, forget the gradients -> grad_norm. Raises NonFiniteError."""

    @abstractmethod
    def plain(self) -> AbstractContextManager[None]:
        """Within, on every rank, the objective holds all of its parameters and may be called in parts."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """objective, optimizer (torch's layout; None before the first update), by all ranks together."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict, of any strategy."""
