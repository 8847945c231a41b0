"""TrojanNN (Liu et al. 2018): a trigger that excites chosen neurons of a clean network."""

import torch
from torch import Tensor, nn

from dist_defend.errors import UserError


def strongest_inputs(layer: nn.Linear | nn.Conv2d, count: int) -> Tensor:
    """The ``count`` input channels of a layer with the largest sum of |weights|, strongest first."""
    weight = layer.weight.detach().abs().flatten(2).sum(2) if layer.weight.ndim > 2 else layer.weight.detach().abs()
    return weight.sum(0).argsort(descending=True)[:count]


def optimise_pattern(
    model: nn.Module,
    layer: str,
    start: Tensor,
    *,
    num_neurons: int = 2,
    target_value: float = 100.0,
    iterations: int = 1000,
    step_size: float = 0.1,
    radius: float = 0.3,
    tolerance: float = 1e-3,
) -> tuple[Tensor, float]:
    """The pattern (1, 3, H, W) in [0, 1] and its cost, sum over chosen neurons of (activation - target_value)^2.

    BackdoorBench's procedure: signed gradient steps from ``start`` (1, 3, H, W), kept within ``radius`` of it and in
    [0, 1]; only pixels that are not black in start are seen by the model, so only they move. The neurons are the
    strongest inputs of ``layer``, a Linear or Conv2d of the model, by its name in named_modules(). UserError for
    another name.
    """
    modules = dict(model.named_modules())
    chosen = modules.get(layer)
    if not isinstance(chosen, nn.Linear | nn.Conv2d):
        raise UserError(f"the model has no linear or convolutional layer '{layer}'; its last is '{last_linear(model)}'")
    neurons = strongest_inputs(chosen, num_neurons)
    seen: list[Tensor] = []
    hook = chosen.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    was_training = model.training
    model.eval()
    keep, pattern, cost = (start > 0).any(1, keepdim=True), start.clone(), float("inf")
    try:
        for _ in range(iterations):
            pattern.requires_grad_(True)
            model(pattern * keep)
            loss = (seen.pop()[:, neurons] - target_value).square().sum()
            (gradient,) = torch.autograd.grad(loss, pattern)
            moved = (pattern.detach() - step_size * gradient.sign() - start).clamp(-radius, radius)
            pattern, cost = (start + moved).clamp(0, 1), loss.item()
            if cost < tolerance:
                break
    finally:
        hook.remove()
        model.train(was_training)
    return pattern.detach(), cost


def last_linear(model: nn.Module) -> str:
    """The name of the model's last linear layer: its classifier. UserError if it has none."""
    names: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise UserError("the model has no linear layer; name a convolution with --layer")
    return names[-1]
