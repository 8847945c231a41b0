"""``dist-defend plan``: memory of each rank and work of each update, worked out before anything is started.

One rank's update is run on tensors without content (torch's FakeTensorMode), in a world of N ranks that do not exist
(its fake process group). What is alive at the peak is measured there, not estimated; times are not known.
"""

import argparse
import dataclasses
import gc
import importlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dist_defend.batch import Batch
from dist_defend.engine.recompute import recompute_activations
from dist_defend.engine.sharding import STRATEGIES
from dist_defend.engine.step import Objective
from dist_defend.errors import UserError
from dist_defend.models.blocks import repeated_blocks

_STATES = {"sgd": 1, "lars": 1, "adam": 2, "adamw": 2}  # tensors per parameter
_SHARDED = {
    "ddp": (), "fsdp2": ("parameters", "gradients", "optimizer"), "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"), "zero3": ("parameters", "gradients", "optimizer"),
}  # fmt: skip
_SIMULATED = (
    "simulated: {ranks} ranks by a fake process group, tensors without content; nothing was allocated or sent. "
    "Not counted: the allocator's waste, communication buffers, the CUDA context, the data loader."
)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by use; flops of its update (two per multiply-add, all passes)."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    caches: int
    flops: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.caches


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
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
def pretended_ranks(count: int) -> Iterator[None]:
    """A default process group of so many ranks, of which this is rank 0 and whose collectives do nothing."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


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
    objective: Objective, batch: Batch, optimizer: str, world_size: int, strategy: str, caches: int = 0
) -> Memory:
    """One forward and backward pass of a rank's micro-batch, on fake tensors or real ones; caches: bytes, as told."""
    parameters = [p for p in objective.parameters() if p.requires_grad]
    held = {
        "parameters": sum(p.nbytes for p in objective.parameters()),
        "gradients": sum(p.nbytes for p in parameters),
        "optimizer": _STATES[optimizer] * sum(p.nbytes for p in parameters),
    }
    live, counter = LiveBytes(), FlopCounterMode(display=False)
    with _fresh_heap(), counter, live:
        loss = objective(batch)["loss"]
        before_backward = live.peak
        loss.backward()
    made = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    # One rank makes gradients as it frees activations; several keep them throughout, in the buckets that are reduced.
    activations = live.peak - made if world_size == 1 else max(before_backward, live.peak - made)
    shared = {key: value // (world_size if key in _SHARDED[strategy] else 1) for key, value in held.items()}
    return Memory(**shared, activations=activations, caches=caches, flops=counter.get_total_flops())


def _leave_meta(module: nn.Module) -> None:
    """Parameters and buffers on the CPU instead of the meta device, in place; within FakeTensorMode without content."""
    for inner in module.modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                inner._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
        for name, buffer in inner._buffers.items():
            if buffer is not None:
                inner._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def add_arguments(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``plan`` to the command line."""
    parser = subparsers.add_parser("plan", help="memory and work of each rank, before anything is started")
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change single keys")
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Print the plan; 0. UserError for a method that has none, or a batch that the ranks cannot share."""
    from dist_defend.config import load_experiment

    experiment = load_experiment(args.config, args.overrides)
    module = importlib.import_module(f"dist_defend.methods.{experiment.method}")
    if not hasattr(module, "planned"):
        raise UserError(f"{args.config}: method {experiment.method} has no plan yet; simclr has one")
    update = experiment.options.update
    parts = args.world_size * update.accumulation
    if args.world_size < 1 or update.batch_size % parts:
        raise UserError(f"key 'batch_size' is {update.batch_size}, not divisible by {parts} = ranks x micro-batches")
    share = update.batch_size // parts
    with pretended_ranks(args.world_size):
        with torch.device("meta"):
            objective, size = module.planned(experiment.options)
        if update.recompute:
            recompute_activations(repeated_blocks(objective))
        is_half = experiment.precision in ("bf16", "fp16")
        with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            _leave_meta(objective)
            index = torch.arange(share)
            batch = Batch(tuple(torch.rand(2, share, 3, size, size)), index, index)
            memory = measure(objective, batch, update.optimizer.name, args.world_size, args.strategy)
    print(render(memory, args.world_size, args.strategy, update.accumulation, share))
    return 0


def render(memory: Memory, world_size: int, strategy: str, accumulation: int, share: int) -> str:
    """The table that the command prints."""
    rows = [(key, value) for key, value in dataclasses.asdict(memory).items() if key != "flops"]
    lines = [f"{world_size} rank(s), {strategy}, {accumulation} micro-batch(es) of {share} images on each"]
    for key, value in [*rows, ("sum", memory.total)]:
        is_shared = key in _SHARDED[strategy] and world_size > 1
        lines.append(f"  {key:<12}{value / 2**20:12.1f} MiB{'  shared by the ranks' if is_shared else ''}")
    if "parameters" in _SHARDED[strategy]:
        lines.append("  and the largest block, gathered whole while it runs")
    lines.append(f"  work per update: {memory.flops * accumulation / 1e12:.4g} TFLOP on each rank")
    lines.append(_SIMULATED.format(ranks=world_size))
    return "\n".join(lines)
