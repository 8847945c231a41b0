"""Operators that torch lacks: second derivatives of ELU and of batch norm; batch norm, a sum and ReLU together.

Each is ``dist_defend::name``, written twice: in torch's own operators, for every device, and as one Triton kernel
(ops/kernels.py), which a CUDA device runs where Triton is installed. Like torch's batch norm, norm_relu has another
kernel for the statistics; norm_relu_backward is one kernel and torch's two. None has a derivative itself: the autograd
functions of ops/second_order.py and ops/fused_norm.py call them.
"""

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_KERNELS = "dist_defend.ops.kernels"
_library = torch.library.Library("dist_defend", "DEF")


_has_kernels = torch.version.cuda is not None and find_spec("triton") is not None


def _operator(schema: str, has_kernel: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """Registers the formula below it; calls go through torch's dispatcher, except on a CPU."""
    name = schema.partition("(")[0]

    def register(formula: Callable[..., Any]) -> Any:
        _library.define(schema)
        _library.impl(name, formula, "CompositeExplicitAutograd")
        if has_kernel and _has_kernels:
            _library.impl(name, lambda *given: getattr(importlib.import_module(_KERNELS), name)(*given), "CUDA")
        operator = getattr(torch.ops.dist_defend, name).default

        def call(*given: Any) -> Any:
            return formula(*given) if given[0].is_cpu else operator(*given)  # the dispatcher costs more than small sums

        return call

    return register


def channels(values: Tensor, x: Tensor) -> Tensor:
    """(C,) as it multiplies x (B, C, ...)."""
    return values.view((1, -1) + (1,) * (x.ndim - 2))


@_operator("elu_slope(Tensor grad, Tensor more, Tensor y, float alpha) -> Tensor")
def elu_slope(grad: Tensor, more: Tensor, y: Tensor, alpha: float) -> Tensor:
    """(grad + more) f', f' of y = ELU(x): y + alpha for y <= 0, else 1."""
    slope: Tensor = torch.ops.aten.elu_backward(grad + more, alpha, 1.0, 1.0, True, y)
    return slope


@_operator("elu_curve(Tensor v, Tensor grad, Tensor y, float alpha) -> (Tensor, Tensor)")
def elu_curve(v: Tensor, grad: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Of <v, grad f'(y)>, as elu_slope has it: the gradients for grad and for y, that is v f' and v grad (y < 0)."""
    return torch.ops.aten.elu_backward(v, alpha, 1.0, 1.0, True, y), (v * grad).mul_(y < 0)


@_operator(
    "norm_curve(Tensor v, Tensor grad, Tensor x, Tensor weight, Tensor centre, Tensor rate, "
    "Tensor grad_x, Tensor grad_1, Tensor v_x, Tensor v_1, Tensor both) -> (Tensor, Tensor)"
)
def norm_curve(
    v: Tensor,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    centre: Tensor,
    rate: Tensor,
    grad_x: Tensor,
    grad_1: Tensor,
    v_x: Tensor,
    v_1: Tensor,
    both: Tensor,
) -> tuple[Tensor, Tensor]:
    """Of <v, batch norm's gradient for x>: the gradients for x and for the weight.

    v, grad, x (B, C, ...), the rest (C,). With x^ the normalised x: grad_x sums grad x^, grad_1 sums grad, so v_x and
    v_1; both sums rate grad v.
    """
    count = x.numel() // x.shape[1]
    grad_x, grad_1, v_x, v_1 = (total / count for total in (grad_x, grad_1, v_x, v_1))
    both = both / (count * rate) - grad_1 * v_1 - grad_x * v_x
    of_x = (both - 2 * grad_x * v_x) * rate
    rest = -(grad_1 * v_x + grad_x * v_1) - of_x * centre
    scale = -weight * rate.square()
    rest, of_grad, of_v, of_x = (channels(scale * part, x) for part in (rest, v_x, grad_x, of_x))
    for_x = torch.addcmul(rest, grad, of_grad).addcmul_(v, of_v).addcmul_(x, of_x)
    return for_x, count * rate * both


@_operator(
    "norm_relu(Tensor x, Tensor? more, Tensor weight, Tensor bias, Tensor(a!) mean, Tensor(b!) variance, "
    "float momentum, float eps) -> (Tensor, Tensor, Tensor)"
)
def norm_relu(
    x: Tensor,
    more: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """ReLU of batch norm by the batch's statistics plus ``more``; their centre and rate; moves mean and variance."""
    options = (weight, bias, mean, variance, True, momentum, eps)
    y, centre, rate = torch.ops.aten.native_batch_norm(x, *options)
    if more is not None:
        y.add_(more)
    return y.relu_(), centre, rate


@_operator(
    "norm_relu_backward(Tensor grad, Tensor y, Tensor x, Tensor weight, Tensor centre, Tensor rate, bool[3] mask) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    has_kernel=False,
)
def norm_relu_backward(
    grad: Tensor, y: Tensor, x: Tensor, weight: Tensor, centre: Tensor, rate: Tensor, mask: list[bool]
) -> tuple[Tensor, ...]:
    """Gradients for the sum, and, where the mask says so, for x, weight and bias."""
    for_sum = torch.ops.aten.threshold_backward(grad, y, 0)
    options = (x, weight, None, None, centre, rate, True, 0.0, mask)
    return for_sum, *torch.ops.aten.native_batch_norm_backward(for_sum, *options)
