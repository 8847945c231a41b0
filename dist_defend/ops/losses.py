"""Losses on embeddings and between classifiers."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from dist_defend.ops.collectives import all_gather_rows, rank, world_size

_NLL = (None, 0, -100)  # no weights of classes, no reduction, no label to ignore
LOGITS_AT_ONCE = 1 << 24  # similarities held at a time, 64 MiB of float32


def nt_xent(z1: Tensor, z2: Tensor, temperature: float, chunk_rows: int | None = None) -> Tensor:
    """NT-Xent (Chen et al. 2020, SimCLR, eq. 1): z1, z2 (B, D) unit rows, row i of both from one image -> scalar.

    The positive stays in the denominator, which leaves out only the row itself; log-sum-exp keeps it finite at any
    temperature. Over W ranks (equal B on each) a rank's value is the mean over its own 2 B rows against all 2 B W
    columns, and the rank mean of the gradients is the gradient of one rank that holds everything. No rank holds the
    matrix: of its own 2 B rows it computes chunk_rows at a time (default: LOGITS_AT_ONCE similarities), and
    again in the backward pass.
    """
    batch, device = len(z1), z1.device
    with torch.autocast(device.type, enabled=False):
        pair = torch.stack([z1, z2], dim=1)  # (B, 2, D)
        if pair.dtype is not torch.float64:
            pair = pair.float()
        everyone = all_gather_rows(pair, rows=[batch] * world_size())
        rows, columns = torch.cat(pair.unbind(1)), torch.cat(everyone.unbind(1))  # all first views, then all second
        own = rank() * batch + torch.arange(batch, device=device)
        first, second = own, own + len(everyone)
        itself, positive = torch.cat([first, second]), torch.cat([second, first])

        def total(rows: Tensor, itself: Tensor, positive: Tensor) -> Tensor:
            logits = (rows @ columns.T / temperature).scatter(1, itself[:, None], float("-inf"))
            return F.cross_entropy(logits, positive, reduction="sum")

        size = chunk_rows or max(1, LOGITS_AT_ONCE // len(columns))
        if size >= len(rows):
            return total(rows, itself, positive) / len(rows)
        parts = zip(rows.split(size), itself.split(size), positive.split(size), strict=True)
        sums = [checkpoint(total, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.stack(sums).sum() / len(rows)


class _CrossEntropy(Function):
    """logits (B, C), labels (B,), weights (B,) -> scalar."""

    @staticmethod
    def forward(context: Any, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        logarithms = F.log_softmax(logits, 1)
        losses, total = torch.ops.aten.nll_loss_forward(logarithms, labels, *_NLL)
        context.save_for_backward(logits, logarithms, labels, weights, total)
        return torch.dot(losses, weights)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> Any:
        logits, logarithms, labels, weights, total = context.saved_tensors
        p = logarithms.exp() if torch.is_grad_enabled() else None  # for a second derivative
        gradient = _cross_entropy_gradient(logits, logarithms, p, labels, weights * grad.detach(), total)
        return gradient, None, None


class _CrossEntropyGradient(Function):
    """With p = softmax(logits): weights (p - onehot), whose slope along v is weights p (v - <p, v>)."""

    @staticmethod
    def forward(
        context: Any,
        logits: Tensor,
        logarithms: Tensor,
        p: Tensor | None,
        labels: Tensor,
        weights: Tensor,
        total: Tensor,
    ) -> Any:
        context.save_for_backward(p, weights[:, None])
        slope = torch.ops.aten.nll_loss_backward(weights, logarithms, labels, *_NLL, total)
        return torch.ops.aten._log_softmax_backward_data(slope, logarithms, 1, logits.dtype)

    @staticmethod
    def backward(context: Any, v: Tensor) -> Any:
        p, weights = context.saved_tensors
        return torch.ops.aten._softmax_backward_data(v, p, 1, p.dtype) * weights, *[None] * 5


# With types, which torch's `apply` has none of.
_cross_entropy: Callable[..., Tensor] = _CrossEntropy.apply
_cross_entropy_gradient: Callable[..., Tensor] = _CrossEntropyGradient.apply


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Sum over images of weight times cross-entropy: logits (B, C), labels (B,), weights (B,) -> scalar.

    A product with its Hessian in the logits takes two passes over memory; torch's takes a dozen.
    """
    return _cross_entropy(logits, labels, weights)


def negative_cosine(a: Tensor, b: Tensor) -> Tensor:
    """-mean cosine of the rows of a and b, (B, D) each, normalised here; b may be (1, D). In [-1, 1], a scalar."""
    return -F.cosine_similarity(a, b, dim=-1).mean()


def sliced_wasserstein(a: Tensor, b: Tensor, directions: Tensor) -> Tensor:
    """Sliced 2-Wasserstein distance between the rows of a and b, (B, D) each, on unit columns (D, P) -> scalar.

    Root of the mean over directions of the mean squared difference of sorted projections (Bonneel et al. 2015).
    """
    first, second = ((rows @ directions).sort(dim=0).values for rows in (a, b))
    return (first - second).square().mean().sqrt()


def divergence_rows(logits: Tensor, target: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)) of each row, (B, C) each -> (B,). Differentiable in both."""
    log_target = F.log_softmax(target, dim=1)
    return (log_target.exp() * (log_target - F.log_softmax(logits, dim=1))).sum(1)


Convention = Literal["mean", "batchmean"]


def distillation(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    convention: Convention = "mean",
    batch_size: int | None = None,
) -> Tensor:
    """KL(teacher || student) of predictions at the temperature T, logits (B, C) each -> scalar.

    "mean": over images and classes, without T^2 (Micaelli and Storkey 2019, as published). "batchmean": over images,
    times T^2 (Hinton et al. 2015). batch_size: what to divide by instead of B; the global batch makes this rank's
    share of a sum over ranks.
    """
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    total = divergence_rows(student, teacher).sum() / (batch_size or len(student))
    return total / student.shape[1] if convention == "mean" else total * temperature**2
