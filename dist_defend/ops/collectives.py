"""Sums and gathers over ranks that can be differentiated, twice if need be, and the batch norm built on them.

Without a process group every function here is what it is on one rank.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad)  # differentiable again


_sum_over_ranks: Callable[[Tensor], Tensor] = _AllReduceSum.apply


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum of x (any shape, equal on all ranks) over ranks; the gradient is summed over ranks too."""
    return x if world_size() == 1 else _sum_over_ranks(x)


def all_gather_rows(x: Tensor, rows: Sequence[int] | None = None) -> Tensor:
    """Rows of every rank, in rank order: (b_r, ...) on rank r -> (sum b_r, ...) on all.

    The gradient is summed over ranks and then sliced, so that the rank mean of the gradients of per-rank mean losses is
    the gradient on one rank. `rows` names each rank's b_r where known, else they are exchanged first. A sum of
    zero-padded blocks: one differentiable collective serves everything.
    """
    if world_size() == 1:
        return x
    if rows is None:
        counts = x.new_zeros(world_size(), dtype=torch.int64)
        counts[rank()] = len(x)
        rows = all_reduce_sum(counts).tolist()
    before, after = sum(rows[: rank()]), sum(rows[rank() + 1 :])
    return all_reduce_sum(F.pad(x, [0, 0] * (x.ndim - 1) + [before, after]))


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over (B, C, ...) whose training statistics are those of the global batch.

    Unlike torch.nn.SyncBatchNorm it runs on CPU ranks and can be differentiated twice. Local batches may differ in size
    but not be empty. Each rank's count, mean and variance are gathered (one collective each way) and merged (Chan,
    Golub and LeVeque 1983), which cancels nothing. On one rank, and in eval mode, it is plain batch norm. `drop` and
    `act` hold what timm's BatchNormAct2d applies after the norm.
    """

    def __init__(self, num_features: int, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"expected (B, {self.num_features}, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        uses_batch = self.training or self.running_mean is None
        y: Tensor = self._normalise_globally(input) if uses_batch and world_size() > 1 else super().forward(input)
        y = self.act(self.drop(y))
        return y

    def _normalise_globally(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        x = input if input.dtype is torch.float64 else input.float()
        channel = [1, -1] + [1] * (x.ndim - 2)
        var, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
        count = x.new_full((1,), x.numel() // x.shape[1])
        table = all_gather_rows(torch.cat([count, mean, var])[None], rows=[1] * world_size())
        counts, means, variances = table.split([1, self.num_features, self.num_features], dim=1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        var = (counts * (variances + (means - mean) ** 2)).sum(0) / total
        if self.training and self.running_mean is not None:
            self._update_running(mean.detach(), var.detach() * (total / (total - 1)))
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return torch.addcmul(shift.view(channel), x, scale.view(channel)).to(input.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, unbiased_var: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        weight: Tensor | float
        if self.momentum is None:
            assert self.num_batches_tracked is not None
            weight = 1.0 / self.num_batches_tracked
        else:
            weight = self.momentum
        self.running_mean += weight * (mean - self.running_mean)
        self.running_var += weight * (unbiased_var - self.running_var)


def convert_sync_batchnorm(module: nn.Module, second_order: bool = False) -> nn.Module:
    """Make every batch norm inside `module` a synchronised one, in place; parameters, buffers, keys and modes are kept.

    Returns the module (a new one if it is itself a batch norm). On a GPU torch's faster SyncBatchNorm is taken, unless
    `second_order` asks for one that can be differentiated twice.
    """
    on_gpu = any(p.is_cuda for p in module.parameters())
    if on_gpu and not second_order and not any(hasattr(m, "act") for m in module.modules() if _is_batchnorm(m)):
        made: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return made
    if _is_batchnorm(module):
        return _synchronised(module)
    for name, child in module.named_children():
        setattr(module, name, convert_sync_batchnorm(child, second_order=True))
    return module


def _is_batchnorm(module: nn.Module) -> TypeGuard[nn.modules.batchnorm._BatchNorm]:
    synchronised = isinstance(module, SyncBatchNorm | nn.SyncBatchNorm)
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and not synchronised


def _synchronised(norm: nn.modules.batchnorm._BatchNorm) -> SyncBatchNorm:
    sync = SyncBatchNorm(norm.num_features, eps=norm.eps, momentum=norm.momentum)
    sync.affine, sync.track_running_stats, sync.training = norm.affine, norm.track_running_stats, norm.training
    sync._parameters = norm._parameters  # the same tensors, so that optimizers and requires_grad stay right
    sync._buffers = norm._buffers
    sync.drop = getattr(norm, "drop", sync.drop)
    sync.act = getattr(norm, "act", sync.act)
    return sync
