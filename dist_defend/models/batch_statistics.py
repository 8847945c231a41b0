"""Running statistics of batch norms: how far a pass moves them, estimates, and adapting them to changed weights."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def repeated_statistics(model: nn.Module, times: int) -> Iterator[None]:
    """Each pass inside moves running means and variances as that many equal passes would; 0 leaves them as they are.

    n updates r <- (1 - m) r + m s by the same s are one with 1 - (1 - m)^n in place of the momentum m.
    """
    found = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    norms = [(norm, norm.momentum, norm.num_batches_tracked) for norm in found if norm.momentum is not None]
    for norm, momentum, _ in norms:
        norm.momentum = 1 - (1 - momentum) ** times
        if not times:
            norm.num_batches_tracked = None  # nothing is counted
    try:
        yield
    finally:
        for norm, momentum, count in norms:
            norm.momentum, norm.num_batches_tracked = momentum, count


class _Passes:
    """Stands in for num_batches_tracked of a norm, and counts passes."""

    def __init__(self) -> None:
        self.number = 0

    def add_(self, number: int) -> None:
        self.number += number


@contextmanager
def counted_together(model: nn.Module) -> Iterator[None]:
    """Passes inside are counted, and added to num_batches_tracked of all norms by one kernel at the end."""
    found = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    norms = [norm for norm in found if norm.momentum is not None and norm.num_batches_tracked is not None]
    counts: list[Any] = [norm.num_batches_tracked for norm in norms]
    passes = [_Passes() for _ in norms]
    for norm, own in zip(norms, passes, strict=True):
        norm._buffers["num_batches_tracked"] = cast(Any, own)
    try:
        yield
    finally:
        for norm, count in zip(norms, counts, strict=True):
            norm._buffers["num_batches_tracked"] = count
    moved = [(count, own.number) for count, own in zip(counts, passes, strict=True) if own.number]
    if moved:
        torch._foreach_add_([count for count, _ in moved], [number for _, number in moved])


@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Running means and variances of all batch norms from these images (B, 3, H, W): the mean over the batches.

    The rest of the model stays in eval mode: no dropout, no update.
    """
    norms = [module for module in model.eval().modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
        norm.train()
    for images in batches:
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


class StatisticsShift:
    """Adapts the running statistics of a changed copy of a model to the change, by images that need no labels.

    Mean s + (m' - m), variance v (w' + eps) / (w + eps): s and v are the model's own, m and w what these images give
    before the change, m' and w' after it (estimate_statistics). Without a change nothing moves, and errors from
    taking a few images for all the training data cancel.
    """

    def __init__(self, model: nn.Module, batches: Callable[[], Iterable[Tensor]]) -> None:
        """batches: the same images (B, 3, H, W) at each call."""
        self.batches = batches
        self.own, before = _norms(copy.deepcopy(model)), copy.deepcopy(model)
        estimate_statistics(before, batches())
        self.before = _norms(before)

    @torch.no_grad()
    def __call__(self, changed: nn.Module) -> None:
        """In place. changed: the model's layers with other weights."""
        estimate_statistics(changed, self.batches())
        for name, norm in _norms(changed).items():
            own, before = self.own[name], self.before[name]
            norm.running_mean.copy_(own.running_mean + (norm.running_mean - before.running_mean))
            norm.running_var.copy_(own.running_var * ((norm.running_var + norm.eps) / (before.running_var + norm.eps)))


def _norms(model: nn.Module) -> dict[str, Any]:
    """The batch norms that keep running statistics."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return {name: norm for name, norm in found.items() if norm.track_running_stats}
