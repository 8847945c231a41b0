"""How far a pass in train mode moves the running statistics of batch norms."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
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
