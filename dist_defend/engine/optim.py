"""Optimizers and learning-rate schedules; the schedule is a pure function of the step, so a resume cannot reset it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam's weight decay is the coupled L2 term (torch.optim.Adam), as in all the published scripts."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9  # sgd
    amsgrad: bool = False  # adam, adamw
    schedule: Literal["constant", "cosine", "multistep"] = "constant"
    milestones: tuple[int, ...] = ()  # multistep: epochs after which the rate falls
    gamma: float = 0.1  # multistep: to this share
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"key 'lr' is {self.lr}; it must be positive")
        for key in ("weight_decay", "momentum", "warmup_epochs"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"key '{key}' is {getattr(self, key)}; it must not be negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"key 'betas' is {list(self.betas)}; both must be in [0, 1)")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"key 'gamma' is {self.gamma}; it must be in (0, 1]")
        if bool(self.milestones) != (self.schedule == "multistep"):
            raise ValueError(
                f"key 'milestones' is {list(self.milestones)}; the schedule multistep, and no other, has some"
            )


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Over the parameters that require a gradient; fused kernels (one pass over the state) on CPU and GPU alike."""
    trained = [p for p in parameters if p.requires_grad]
    if config.name == "sgd":
        return torch.optim.SGD(
            trained, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
        )
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(
        trained,
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        amsgrad=config.amsgrad,
        fused=True,
    )


def lr_factor(config: OptimizerConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Factor on the base rate for the 0-based optimizer step: linear warm-up, then the schedule.

    A milestone m counts whole epochs: the updates of epoch m (0-based) are the first at the lower rate.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "multistep":
        return config.gamma ** sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))
