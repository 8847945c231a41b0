"""The operators of ops/fused.py as Triton kernels: one pass each, over memory in its own order. Only imported on a GPU.

A tensor (B, C, ...) is walked as it lies, channels first or last; the others are brought into the order of the one that
is saved. Numbers that are not tensors are constants of a kernel: as arguments they would be float32.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_jit: Callable[[Callable[..., None]], Any] = triton.jit


@_jit
def _elu_slope(grad, more, y, out, n, alpha: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = i < n
    at = tl.load(y + i, mask=inside)
    total = tl.load(grad + i, mask=inside) + tl.load(more + i, mask=inside)
    tl.store(out + i, total * tl.where(at > 0, 1.0, at + alpha), mask=inside)


@_jit
def _elu_curve(v, grad, y, for_grad, for_y, n, alpha: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = i < n
    at, along = tl.load(y + i, mask=inside), tl.load(v + i, mask=inside)
    tl.store(for_grad + i, along * tl.where(at > 0, 1.0, at + alpha), mask=inside)
    tl.store(for_y + i, tl.where(at < 0, along * tl.load(grad + i, mask=inside), 0.0), mask=inside)


@_jit
def _norm_curve(  # type: ignore[no-untyped-def]
    v, grad, x, weight, centre, rate, grad_x, grad_1, v_x, v_1, both, for_x, for_weight, n,
    channels: tl.constexpr, inner: tl.constexpr, count: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = i < n
    place = i // inner
    c = place % channels
    r = tl.load(rate + c, mask=inside, other=1.0)
    gx, g1 = tl.load(grad_x + c, mask=inside) / count, tl.load(grad_1 + c, mask=inside) / count
    vx, v1 = tl.load(v_x + c, mask=inside) / count, tl.load(v_1 + c, mask=inside) / count
    mean = tl.load(both + c, mask=inside) / (count * r) - g1 * v1 - gx * vx
    normal = (tl.load(x + i, mask=inside) - tl.load(centre + c, mask=inside)) * r
    rest = tl.load(grad + i, mask=inside) * vx + tl.load(v + i, mask=inside) * gx - g1 * vx - gx * v1
    slope = rest + (mean - 2 * gx * vx) * normal
    tl.store(for_x + i, -tl.load(weight + c, mask=inside) * r * r * slope, mask=inside)
    tl.store(for_weight + c, count * r * mean, mask=inside & (place < channels) & (i % inner == 0))


@_jit
def _affine_relu(  # type: ignore[no-untyped-def]
    x, more, weight, bias, centre, rate, y, n,
    channels: tl.constexpr, inner: tl.constexpr, has_more: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = i < n
    c = (i // inner) % channels
    normal = (tl.load(x + i, mask=inside) - tl.load(centre + c, mask=inside)) * tl.load(rate + c, mask=inside)
    at = normal * tl.load(weight + c, mask=inside) + tl.load(bias + c, mask=inside)
    if has_more:
        at += tl.load(more + i, mask=inside)
    tl.store(y + i, tl.where(at <= 0, 0.0, at), mask=inside)  # what is not a number stays so


def elu_slope(grad: Tensor, more: Tensor, y: Tensor, alpha: float) -> Tensor:
    """As fused.elu_slope."""
    y, grad, more = _alike(y, grad, more)
    out = torch.empty_like(y)
    _launch(_elu_slope, y, grad, more, y, out, y.numel(), alpha)
    return out


def elu_curve(v: Tensor, grad: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """As fused.elu_curve."""
    y, v, grad = _alike(y, v, grad)
    for_grad, for_y = torch.empty_like(y), torch.empty_like(y)
    _launch(_elu_curve, y, v, grad, y, for_grad, for_y, y.numel(), alpha)
    return for_grad, for_y


def norm_curve(v: Tensor, grad: Tensor, x: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
    """As fused.norm_curve."""
    x, v, grad = _alike(x, v, grad)
    for_x, for_weight = torch.empty_like(x), torch.empty_like(vectors[0])
    size = x.shape[1]
    _launch(_norm_curve, x, v, grad, x, *vectors, for_x, for_weight, x.numel(), size, _inner(x), x.numel() // size)
    return for_x, for_weight


def affine_relu(x: Tensor, more: Tensor | None, *vectors: Tensor) -> Tensor:
    """relu((x - centre) rate weight + bias + more); vectors: weight, bias, centre, rate, (C,)."""
    x, more = _alike(x, x if more is None else more)
    y = torch.empty_like(x)
    _launch(_affine_relu, x, x, more, *vectors, y, x.numel(), x.shape[1], _inner(x), more is not x)
    return y


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
    """As fused.norm_relu; the statistics are those of torch's SyncBatchNorm on one rank."""
    (x,) = _alike(x)
    centre, rate = torch.batch_norm_stats(x, eps)
    counts = rate.new_full((1,), x.numel() // x.shape[1])
    gathered = (x, centre[None], rate[None], mean, variance, momentum, eps, counts)
    centre, rate = torch.batch_norm_gather_stats_with_counts(*gathered)
    return affine_relu(x, more, weight, bias, centre, rate), centre, rate


def _alike(x: Tensor, *others: Tensor) -> list[Tensor]:
    """All dense, and in the order in memory of the first."""
    is_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_last else torch.contiguous_format
    return [tensor.contiguous(memory_format=layout) for tensor in (x, *others)]


def _inner(x: Tensor) -> int:
    """Elements that follow each other in memory in one channel."""
    return 1 if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else x[0, 0].numel()


def _launch(kernel: Any, x: Tensor, *given: Any) -> None:
    if x.numel():
        vectors: Sequence[Any] = [g.contiguous() if isinstance(g, Tensor) and g.ndim == 1 else g for g in given]
        kernel[(triton.cdiv(x.numel(), _BLOCK),)](*vectors, block=_BLOCK)
