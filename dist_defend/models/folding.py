"""Frozen batch norms folded into the convolutions before them: less to compute, half of the activations to keep."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dist_defend.models.pairing import feeding


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
    with torch.no_grad():
        expected, fed = feeding(model, example)
        folded = 0
        for norm, conv in fed.items():
            layers = model.get_submodule(conv), model.get_submodule(norm)
            if _is_fixed(*layers):
                model.set_submodule(conv, FoldedConv2d(*layers))  # type: ignore[arg-type]
                model.set_submodule(norm, nn.Identity())
                folded += 1
        torch.testing.assert_close(model(example), expected, rtol=1e-3, atol=1e-3)  # a wrong fold is far off
    return folded


def _is_fixed(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether the norm is frozen and nothing of the convolution but its weight is trained."""
    has_fixed_bias = type(conv) is nn.Conv2d and (conv.bias is None or not conv.bias.requires_grad)
    is_frozen = type(norm) is nn.BatchNorm2d and not norm.training and norm.affine and norm.track_running_stats
    return has_fixed_bias and is_frozen and not norm.weight.requires_grad
