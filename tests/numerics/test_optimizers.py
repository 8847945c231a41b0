"""The updates of SGD, Adam, AdamW and AMSGrad written out; LARS is in tests/unit/test_engine_options.py."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from dist_defend.engine.optim import OptimizerConfig, build_optimizer

GRADIENTS = (3.0, 0.01, -0.02, 0.015)  # one large, then small ones: AMSGrad remembers the large one
EPSILON = 1e-8


def by_hand(config: OptimizerConfig, weight: float) -> list[float]:
    """The weight after each update, as the papers have it (decay of Adam: L2 in the gradient)."""
    weights, m, v, largest, velocity = [], 0.0, 0.0, 0.0, None
    first, second = config.betas
    for number, gradient in enumerate(GRADIENTS, 1):
        if config.name == "sgd":
            g = gradient + config.weight_decay * weight
            velocity = g if velocity is None else config.momentum * velocity + g
            weight -= config.lr * velocity
        else:
            g = gradient
            if config.name == "adamw":
                weight *= 1 - config.lr * config.weight_decay
            else:
                g += config.weight_decay * weight
            m, v = first * m + (1 - first) * g, second * v + (1 - second) * g * g
            largest = max(largest, v)
            used = largest if config.amsgrad else v
            scale = math.sqrt(used / (1 - second**number)) + EPSILON
            weight -= config.lr * m / (1 - first**number) / scale
        weights.append(weight)
    return weights


@pytest.mark.parametrize(
    "options",
    [
        {"name": "sgd", "momentum": 0.0},
        {"name": "sgd", "momentum": 0.8, "weight_decay": 0.3},
        {"name": "adam"},
        {"name": "adam", "betas": (0.5, 0.7), "weight_decay": 0.3},
        {"name": "adam", "betas": (0.5, 0.7), "amsgrad": True},
        {"name": "adamw", "betas": (0.5, 0.7), "weight_decay": 0.3},
        {"name": "adamw", "betas": (0.5, 0.7), "weight_decay": 0.3, "amsgrad": True},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
@pytest.mark.parametrize("fused", [True, False])
def test_updates_are_the_papers(options: dict[str, Any], fused: bool) -> None:
    config = OptimizerConfig(lr=0.1, **options)
    weight, frozen = nn.Parameter(torch.tensor([2.0], dtype=torch.float64)), nn.Parameter(torch.ones(1), False)
    optimizer = build_optimizer([weight, frozen], config, fused=fused)
    found = []
    for gradient in GRADIENTS:
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        found.append(weight.item())
    assert found == pytest.approx(by_hand(config, 2.0), rel=1e-12)
    assert [p for group in optimizer.param_groups for p in group["params"]] == [weight]


def test_amsgrad_and_adam_differ_after_a_large_gradient() -> None:
    """So that the cases above tell them apart."""
    plain, ams = (by_hand(OptimizerConfig(lr=0.1, betas=(0.5, 0.7), amsgrad=flag), 2.0) for flag in (False, True))
    assert plain[0] == ams[0] and abs(plain[-1] - ams[-1]) > 1e-3
