"""What a device can do at most, measured, and what an update asks of it."""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dist_defend.bench.runner import seconds

_REPEATS, _CALLS = 5, 4
_SIDE = {"cuda": 8192, "cpu": 512}  # of the matrices that are multiplied
_BYTES = {"cuda": 1 << 30, "cpu": 1 << 25}  # of what is copied: more than caches hold


class Peaks(NamedTuple):
    """Of a device: FLOP per second of a float32 matrix product, TF32 allowed; bytes per second, read and written."""

    flop: float
    bytes: float


class Work(NamedTuple):
    """Of an update: FLOP of its products, bytes that its operators read and write, operators that are no views."""

    flop: float
    bytes: float
    operators: int

    def shares(self, peaks: Peaks, duration: float) -> dict[str, float]:
        """Of both peaks, for an update that takes so many seconds; as keys of a row."""
        return {
            "matrix_share": self.flop / duration / peaks.flop,
            "copy_share": self.bytes / duration / peaks.bytes,
        }


def measure(device: torch.device) -> Peaks:
    """Medians, after a call to warm up."""
    side, size = _SIDE[device.type], _BYTES[device.type]
    left, right = (torch.randn(side, side, device=device) for _ in range(2))
    product, source = torch.empty_like(left), torch.zeros(size, dtype=torch.uint8, device=device)
    target, matmul = torch.empty_like(source), torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        of_product = _median(lambda: torch.mm(left, right, out=product))
    finally:
        matmul.allow_tf32 = before
    return Peaks(2 * side**3 / of_product, 2 * size / _median(lambda: target.copy_(source)))


def count(update: Callable[[], object]) -> Work:
    """Run an eager update and count."""
    with FlopCounterMode(display=False) as flop, _Traffic() as traffic:
        update()
    return Work(flop.get_total_flops(), traffic.bytes, traffic.operators)


def _median(run: Callable[[], object]) -> float:
    def several() -> None:
        for _ in range(_CALLS):
            run()

    several()
    return statistics.median(seconds(several) / _CALLS for _ in range(_REPEATS))


class _Traffic(TorchDispatchMode):
    """Counts operators, and the bytes of what goes into them and comes out, as if none were fused."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes, self.operators = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aliases = [a.alias_info for a in func._schema.arguments if a.alias_info is not None]
        if aliases and not any(alias.is_write for alias in aliases):
            return result  # a view
        self.operators += 1
        found = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)]
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in found)
        return result
