"""Batch norm, a sum and ReLU as one operator each way, where a pass is differentiated once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dist_defend.ops import fused

SMALL = 1 << 18  # values; on a CPU the call costs more than the pass over fewer of them
_open = [0]  # how many `differentiated_once` are open


@contextmanager
def differentiated_once() -> Iterator[None]:
    """Forward passes inside are fused; differentiating one of them twice is an error."""
    _open[0] += 1
    try:
        yield
    finally:
        _open[0] -= 1


def norm_relu(norm: nn.Module, x: Tensor, more: Tensor | None = None) -> Tensor:
    """relu(norm(x) + more), x and more (B, C, H, W); bitwise what the layers give one by one on a CPU."""
    if not (_open[0] and _is_plain(norm)) or (x.is_cpu and x.numel() < SMALL):
        y = norm(x)
        return F.relu(y if more is None else y + more)
    count: Any = norm.num_batches_tracked
    if count is not None:
        count.add_(1)
    return _norm_relu(x, more, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.momentum, norm.eps)


def _is_plain(norm: Any) -> bool:
    """Whether it normalises by the batch's own statistics, as torch's BatchNorm2d does, and has no hooks."""
    if not isinstance(norm, nn.BatchNorm2d) or type(norm).forward is not nn.BatchNorm2d.forward:
        return False
    hooks = norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks, norm._backward_pre_hooks
    is_learning = norm.training and norm.affine and norm.track_running_stats and norm.momentum is not None
    return is_learning and not any(hooks)


class _NormRelu(Function):
    @staticmethod
    def forward(context: Any, x: Tensor, more: Tensor | None, weight: Tensor, bias: Tensor, *statistics: Any) -> Tensor:
        y: Tensor
        y, centre, rate = fused.norm_relu(x, more, weight, bias, *statistics)
        context.save_for_backward(y, x, weight, centre, rate)
        return y

    @staticmethod
    @once_differentiable
    def backward(context: Any, grad: Tensor) -> Any:
        needs_x, needs_more, *needs = context.needs_input_grad[:4]
        for_sum, *rest = fused.norm_relu_backward(grad, *context.saved_tensors, [needs_x, *needs])
        wanted = [gradient if need else None for gradient, need in zip(rest, (needs_x, *needs), strict=True)]
        return wanted[0], for_sum if needs_more else None, *wanted[1:], *[None] * 4


_norm_relu: Callable[..., Tensor] = _NormRelu.apply  # with a type, which `apply` has none of
