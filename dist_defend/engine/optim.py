"""Optimizers and learning-rate schedules; the schedule is a pure function of the step, so a resume cannot reset it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dist_defend.bounds import at_least_one, not_negative, positive


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and the schedule of its learning rate.

    Keys:
        name: adam, adamw, sgd, or lars (layer-wise adaptive rates, for large batches)
        lr: learning rate, the largest of the schedule
        weight_decay: of adam the coupled L2 term (torch.optim.Adam), as in all the published scripts
        betas: of adam and adamw: decay of the means of gradients and of their squares
        momentum: of sgd and lars
        nesterov: of sgd: the step looks ahead along the momentum
        trust: of lars: the most that an update moves a tensor, relative to its norm, at rate 1
        amsgrad: of adam and adamw
        schedule: constant; cosine, down to 0 at the last step; multistep, down at milestones; cosine_epochs and
            cosine_steps, down to 0 after ``period`` of them and up again, as torch's CosineAnnealingLR goes
        period: of cosine_epochs and cosine_steps: T_max
        milestones: of multistep: epochs after which the rate falls
        gamma: of multistep: share of the rate that is left after each milestone
        warmup_epochs: epochs in which the rate rises from 0 to lr, before the schedule; may be a fraction
    """

    name: Literal["adam", "adamw", "sgd", "lars"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    nesterov: bool = False
    trust: float = 1e-3
    amsgrad: bool = False
    schedule: Literal["constant", "cosine", "multistep", "cosine_epochs", "cosine_steps"] = "constant"
    period: int = 100
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        positive(self, "lr", "trust", "period")
        not_negative(self, "weight_decay", "momentum", "warmup_epochs")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"key 'betas' is {list(self.betas)}; both must be in [0, 1)")
        if self.nesterov and (self.name != "sgd" or self.momentum == 0):
            raise ValueError("key 'nesterov' is true, which needs sgd with a momentum: leave it out")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"key 'gamma' is {self.gamma}; it must be in (0, 1]")
        if bool(self.milestones) != (self.schedule == "multistep"):
            raise ValueError(
                f"key 'milestones' is {list(self.milestones)}; the schedule multistep, and no other, has some"
            )


@dataclass(frozen=True)
class UpdateConfig:
    """How a first-order stage updates.

    Keys:
        batch_size: images of an update over all ranks: the same on any number of ranks
        epochs: passes over the data
        accumulation: micro-batches per update on each rank
        max_grad_norm: L2 norm to which a larger gradient is scaled down; null: no limit
        recompute: activations of repeated blocks are computed again in the backward pass, instead of kept
        compile: repeated blocks are compiled by torch.compile
        optimizer: optimizer, rate and schedule
    """

    batch_size: int = 256
    epochs: int = 100
    accumulation: int = 1
    max_grad_norm: float | None = None
    recompute: bool = False
    compile: bool = False
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        at_least_one(self, "batch_size", "epochs", "accumulation")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"key 'max_grad_norm' is {self.max_grad_norm}; it must be positive, or null for none")


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, fused: bool = True
) -> torch.optim.Optimizer:
    """Over the parameters that require a gradient; fused kernels (one pass over the state) on CPU and GPU alike.

    fused: False for parameters that are DTensors, which have no fused SGD.
    """
    trained = [p for p in parameters if p.requires_grad]
    if config.name == "lars":
        return Lars(trained, config.lr, config.momentum, config.weight_decay, config.trust)
    if config.name == "sgd":
        options: dict[str, Any] = {"weight_decay": config.weight_decay, "nesterov": config.nesterov}
        return torch.optim.SGD(trained, lr=config.lr, momentum=config.momentum, fused=fused, **options)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(
        trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, amsgrad=config.amsgrad, fused=fused
    )


def is_optimizer_state(values: dict[Any, Any]) -> bool:
    """Whether these are what an optimizer's ``state_dict`` makes."""
    return "param_groups" in values


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Give an optimizer the state that its ``state_dict`` made; its options stay the configured ones.

    torch checks the number of parameters only, and a fused update walks whatever it finds: ValueError for a state of
    another shape or kind.
    """
    groups = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in state["param_groups"]] != [group["params"] for group in groups]:
        raise ValueError("the optimizer's groups have other parameters")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    is_adam = "betas" in groups[0]
    wanted = {"step", "exp_avg", "exp_avg_sq"} if is_adam else {"momentum_buffer"}
    for number, values in state["state"].items():
        if type(number) is not int or not 0 <= number < len(parameters):
            raise ValueError(f"the optimizer has no parameter {number!r}")
        group = next(g for g, plain in zip(optimizer.param_groups, groups, strict=True) if number in plain["params"])
        names = wanted | ({"max_exp_avg_sq"} if group.get("amsgrad") else set())
        if values and values.keys() != names:
            raise ValueError(f"the optimizer keeps {sorted(names)}, not {sorted(map(str, values))}")
        for name, value in values.items():
            _check_value(name, value, parameters[number])
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def _check_value(name: str, value: Any, parameter: Tensor) -> None:
    if name == "step":
        is_count = isinstance(value, Tensor) and value.numel() == 1 and bool(torch.isfinite(value) & (value >= 0))
        if not is_count:
            raise ValueError("the optimizer's 'step' is no number of updates")
    elif value is not None or name != "momentum_buffer":
        is_like = isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()
        if not is_like:
            raise ValueError(f"the optimizer's '{name}' is not like its parameter {tuple(parameter.shape)}")


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rates for large batches (You, Gitman and Ginsburg 2017, arXiv 1708.03888, algorithm 1).

    v <- momentum v + lr trust |w| / (|g| + decay |w|) (g + decay w); w <- w - v, per tensor. Vectors and scalars
    (biases, affine parameters of norms) follow plain momentum without decay, as in SimCLR's and BYOL's recipes.
    """

    found_inf: Tensor | None = None  # not zero: leave everything as it is (what fused optimizers do)

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float, weight_decay: float, trust: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                update = weight.grad * group["lr"]
                if weight.ndim > 1:
                    decay = group["weight_decay"]
                    norm, of_gradient = (torch.linalg.vector_norm(x) for x in (weight, weight.grad))
                    rate = group["trust"] * norm / (of_gradient + decay * norm)
                    is_usable = (norm > 0) & (of_gradient > 0)
                    update = (update + group["lr"] * decay * weight) * torch.where(is_usable, rate, 1.0)
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                velocity = group["momentum"] * state["momentum_buffer"] + update
                if self.found_inf is not None:
                    velocity = torch.where(self.found_inf > 0, state["momentum_buffer"], velocity)
                    weight.sub_(torch.where(self.found_inf > 0, 0.0, velocity))
                else:
                    weight.sub_(velocity)
                state["momentum_buffer"].copy_(velocity)


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
    passed = (step - warmup) / max(1, total_steps - warmup)
    if config.schedule.startswith("cosine_"):
        passed = (step // steps_per_epoch if config.schedule == "cosine_epochs" else step) / config.period
    return 0.5 * (1 + math.cos(math.pi * passed))
