"""Frozen batch norms folded into the convolutions before them: less to compute, half of the activations to keep."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class FoldedConv2d(nn.Module):
    """norm(conv(x)) with a frozen batch norm, as one convolution: (w s) * x + t, with w as the convolution's own."""

    scale: Tensor
    shift: Tensor

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
        before = 0 if conv.bias is None else conv.bias.detach()
        self.weight = conv.weight
        self.register_buffer("scale", scale.view(-1, 1, 1, 1), persistent=False)
        self.register_buffer("shift", norm.bias.detach() + (before - norm.running_mean) * scale, persistent=False)
        self._convolve: Callable[..., Tensor] = conv._conv_forward

    def forward(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.weight * self.scale, self.shift)


def fold_frozen_norms(model: nn.Module, example: Tensor) -> int:
    """Fold in place every frozen batch norm that a bias-free convolution, or one with a fixed bias, feeds.

    Which feeds which is seen in one forward pass of ``example``. Outputs and the gradients of the weights stay the
    same; the keys of what was folded leave the state dict, except the convolutions' weights. Returns how many were.
    """
    made: dict[int, tuple[str, Tensor]] = {}  # id of a convolution's output -> its name; keeps the output alive
    fed: dict[str, str] = {}  # norm -> convolution
    calls: dict[str, int] = {}

    def after_convolution(name: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            made[id(output)] = name, output
            calls[name] = calls.get(name, 0) + 1

        return note

    def before_norm(name: str) -> Any:
        def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if id(inputs[0]) in made:
                fed[name] = made[id(inputs[0])][0]

        return note

    hooks = []
    for name, module in model.named_modules():
        if type(module) is nn.Conv2d and (module.bias is None or not module.bias.requires_grad):
            hooks.append(module.register_forward_hook(after_convolution(name)))
        elif type(module) is nn.BatchNorm2d and _is_frozen(module):
            hooks.append(module.register_forward_pre_hook(before_norm(name)))
    with torch.no_grad():
        expected = model(example)
        for hook in hooks:
            hook.remove()
        pairs = {norm: conv for norm, conv in fed.items() if calls[conv] == 1}
        for norm, conv in pairs.items():
            folded = FoldedConv2d(model.get_submodule(conv), model.get_submodule(norm))  # type: ignore[arg-type]
            model.set_submodule(conv, folded)
            model.set_submodule(norm, nn.Identity())
        torch.testing.assert_close(model(example), expected, rtol=1e-3, atol=1e-3)  # a wrong fold is far off
    return len(pairs)


def _is_frozen(norm: nn.BatchNorm2d) -> bool:
    return not norm.training and norm.affine and norm.track_running_stats and not norm.weight.requires_grad
