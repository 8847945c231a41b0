"""FT-SAM (Zhu et al., ICCV 2023): fine-tuning with (adaptive) sharpness-aware minimisation.

    e = rho w^2 g / ||w g||_2,   w <- w - lr grad l(w + e),   l = KL(q || softmax f(x)), q smoothed labels

g = grad l(w). Plain instead of adaptive: e = rho g / ||g||_2. Norms are over all weights together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dist_defend.bounds import not_negative
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.objective import at_least_float32
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.engine.trainer import Stage
from dist_defend.methods.defend.tuning.options import TuningConfig, sgd
from dist_defend.methods.defend.tuning.plan import Tuned, tuning_plan
from dist_defend.methods.defend.tuning.step import TuningStep
from dist_defend.models.batch_statistics import repeated_statistics


@dataclass(frozen=True, kw_only=True)
class Config(TuningConfig):
    """Values that SCLBD/BackdoorBench runs with; rho and smoothing of its GTSRB and Tiny ImageNet files have no effect.

    Keys:
        rho: size of the perturbation e of the weights; its L2 norm unless adaptive
        adaptive: scale the gradient in e by each weight's square; false: plain SAM
        smoothing: share of each label that is spread evenly over the other classes, 0 to 1
    """

    rho: float = 2.0
    adaptive: bool = True
    smoothing: float = 0.1
    optimizer: OptimizerConfig = field(default_factory=sgd)

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(self, "rho")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"key 'smoothing' is {self.smoothing}; it must be at least 0 and below 1")


PRESETS: dict[str, dict[str, Any]] = {
    "official": {},
    "backdoorbench": {  # the cosine counts batches: with ten per epoch it makes five waves and ends at the largest rate
        "optimizer": {
            "name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4,
            "schedule": "cosine_steps", "period": 100,
        },
    },
}  # fmt: skip


def smooth_kl(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """KL(q || softmax(logits)) of rows (B, C), (B,) -> (B,). q: 1 - smoothing on the label, the rest on others."""
    classes = logits.shape[1]
    wanted = torch.full_like(logits, smoothing / (classes - 1)).scatter_(1, labels[:, None], 1 - smoothing)
    return functional.kl_div(logits.log_softmax(1), wanted, reduction="none").sum(1)


class SamStep(TuningStep):
    """Two passes over a batch; the second one, at w + e, leaves running statistics as they are."""

    def __init__(self, config: Config, **options: Any) -> None:
        self.config = config
        super().__init__(optimizer=config.optimizer, epochs=config.epochs, **options)

    def loss(self, images: Tensor, labels: Tensor, weight: Tensor) -> dict[str, Tensor]:
        logits = at_least_float32(self.model(images))
        return {"loss": smooth_kl(logits, labels, self.config.smoothing).sum() * weight}

    def learn(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        scalars, gradients = self.gradients(images, labels)
        with torch.no_grad():
            weights: list[Tensor] = list(self.parameters)
            own = [weight.clone() for weight in weights]
            scale = torch._foreach_abs(own) if self.config.adaptive else None
            slopes = gradients if scale is None else torch._foreach_mul(gradients, scale)
            norm = torch.nn.utils.get_total_norm(slopes)
            moves = slopes if scale is None else torch._foreach_mul(slopes, scale)
            torch._foreach_add_(weights, list(torch._foreach_mul(moves, self.config.rho / (norm + 1e-12))))
        with repeated_statistics(self.model, 0):
            _, worst = self.gradients(images, labels)
        with torch.no_grad():
            torch._foreach_copy_(weights, own)
        return self.follow({**scalars, "slope_norm": norm}, worst)


def build(config: Config, context: Context) -> Plan:
    """One stage."""

    def make(tuned: Tuned) -> tuple[Sequence[Stage], TuningStep]:
        return (), SamStep(config, model=tuned.model, **tuned.options)

    return tuning_plan(config, context, make)
