"""Bytes and operations of one update, measured while it runs on tensors with or without content."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dist_defend.batch import Batch
from dist_defend.engine.grad_cache import MicroBatch, is_cached, micro_batches
from dist_defend.engine.objective import Objective

_STATES = {"sgd": 1, "lars": 1, "adam": 2, "adamw": 2}  # tensors per parameter
SHARDED = {
    "ddp": (), "fsdp2": ("parameters", "gradients", "optimizer"), "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"), "zero3": ("parameters", "gradients", "optimizer"),
}  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by use; flops of its update (two per multiply-add, all passes and micro-batches).

    frozen: networks that are not trained. filling: what is needed while caches are filled, before the first update.
    """

    parameters: int
    frozen: int
    gradients: int
    optimizer: int
    activations: int
    caches: int
    filling: int
    flops: int

    @property
    def total(self) -> int:
        updating = self.gradients + self.optimizer + self.activations
        return self.parameters + self.frozen + self.caches + max(updating, self.filling)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still alive, and the most there were."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in inputs:
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def forget() -> None:
            self._known.discard(key)
            self.now -= size

        weakref.finalize(storage, forget)


@contextmanager
def _fresh_heap() -> Iterator[None]:
    """Cyclic garbage is collected as soon as in a process without other objects: they would put it off."""
    gc.collect()
    gc.freeze()
    gc.collect()  # now there are no old objects to weigh the new ones against
    try:
        yield
    finally:
        gc.unfreeze()


def measure(
    objective: Objective, batch: Batch, optimizer: str, world_size: int, strategy: str, accumulation: int = 1
) -> Memory:
    """A rank's update by so many micro-batches like this one, on fake tensors or real ones.

    What a first pass without gradients leaves behind are caches. Frozen networks are not counted.
    """
    parameters = [p for p in objective.parameters() if p.requires_grad]
    held = {
        "parameters": sum(p.nbytes for p in objective.parameters()),
        "gradients": sum(p.nbytes for p in parameters),
        "optimizer": _STATES[optimizer] * sum(p.nbytes for p in parameters),
    }
    live, counter = LiveBytes(), FlopCounterMode(display=False)
    with _fresh_heap(), live:
        with torch.no_grad():
            objective(batch)
        objective.after_backward()
        gc.collect()
        caches = live.now
        filling, live.peak = live.peak - caches, caches
        loss = objective(_with_gradient(objective, batch, accumulation)[0])["loss"]
        before_backward = live.peak
        loss.backward()
    made = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    # A lone micro-batch makes gradients as it frees activations; else they are there throughout: of the micro-batches
    # before it, or in the buckets that ranks reduce.
    is_alone = world_size == 1 and accumulation == 1
    activations = live.peak - made if is_alone else max(before_backward, live.peak - made)
    shared = {key: value // (world_size if key in SHARDED[strategy] else 1) for key, value in held.items()}
    with counter:  # apart: it keeps what recomputed blocks let go
        part, once = _with_gradient(objective, batch, accumulation)
        objective(part)["loss"].backward()
    flops = accumulation * (counter.get_total_flops() - once) + once
    used = {"activations": activations - caches, "caches": caches, "filling": filling}
    return Memory(**shared, **used, frozen=0, flops=flops)


def _with_gradient(objective: Objective, batch: Batch, accumulation: int) -> tuple[Batch | MicroBatch, int]:
    """What the objective is given to differentiate, and the flops of what is done once for all micro-batches."""
    if not is_cached(objective):
        return batch, 0
    with torch.no_grad():
        terms = objective(MicroBatch(batch, None))
    with FlopCounterMode(display=False) as once:
        _, parts = micro_batches(objective, lambda part: terms, [batch] * accumulation)
    return parts[0], once.get_total_flops()
