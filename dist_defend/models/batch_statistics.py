"""Running statistics of batch norms: how far a pass moves them, and estimating them anew."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def repeated_statistics(model: nn.Module, times: int) -> Iterator[None]:
    """Each pass inside moves running means and variances as that many equal passes would; 0 leaves them as they are.

    n updates r <- (1 - m) r + m s by the same s are one with 1 - (1 - m)^n in place of the momentum m.
    """
    found = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    norms = [(norm, norm.momentum) for norm in found if norm.momentum is not None]
    for norm, momentum in norms:
        norm.momentum = 1 - (1 - momentum) ** times
    try:
        yield
    finally:
        for norm, momentum in norms:
            norm.momentum = momentum


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
