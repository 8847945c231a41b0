"""Activation checkpointing: a block's activations are not kept but computed again when the backward pass needs them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute_activations(blocks: list[nn.Module]) -> None:
    """Make each block keep its inputs only, in place (Chen et al. 2016, arXiv 1604.06174).

    The second forward pass leaves the statistics of batch norm where the first one put them.
    """
    for block in blocks:
        contexts = partial(_contexts, block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), statistics_stay(block)


@contextmanager
def statistics_stay(block: nn.Module) -> Iterator[None]:
    """Within, batch norm normalises by the batch but leaves its statistics alone.

    By momentum 0: autograd may have saved these tensors, so they must not be written back.
    """
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]  # type: ignore[union-attr]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)  # type: ignore[union-attr]
