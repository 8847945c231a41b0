"""One update as one CUDA graph: captured once for each shape of its inputs, then replayed without the host."""

import logging
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from dist_defend.errors import UserError

log = logging.getLogger(__name__)

GraphMode = Literal["auto", "on", "off"]
_WARM_UP_CALLS = 3  # cuDNN's choice of algorithms, lazy state of optimizers
_MOST_SHAPES = 8


def can_capture(device: torch.device) -> bool:
    """Whether updates there can become CUDA graphs; what a graph reads anew, such as a rate, is then a tensor."""
    return device.type == "cuda"


def will_capture(device: torch.device, mode: GraphMode) -> bool:
    """Whether a GraphedUpdate there makes graphs."""
    return can_capture(device) and mode != "off"


class GraphedUpdate:
    """Calls ``update(*inputs) -> {name: scalar}``, from a CUDA graph where there is one.

    update: tensor work only, in place on tensors that stay where they are: no host sync, no branch on a value, no
    optimizer without capturable=True, and random draws from torch's default generator alone, which a replay moves as
    an eager call does. changed() names every tensor that update writes and that outlives it (weights, buffers,
    optimizer state, gradients that are added to). The calls that warm up are undone: what changed() named before them
    and the generators are put back, what it names only after them (state made by a first step) is zeroed, which is how
    torch's optimizers start it.

    mode: "on" is an error where there is no CUDA device, "auto" then calls update directly and says so, "off" always
    calls it directly.
    Inputs are copied into the graph's own; outputs are clones. A new shape of inputs gets a graph of its own, and so
    does another setting of TF32; RuntimeError after so many that it cannot be meant.

    On several ranks update may sum over them. All must then capture at the same call, as the calls that warm up wait
    for each other, and NCCL wants all to replay what they captured together. So where a batch may have a new shape on
    some ranks alone, ``kind`` must tell it from others, on all.
    """

    def __init__(
        self,
        name: str,
        update: Callable[..., dict[str, Tensor]],
        changed: Callable[[], Iterable[Tensor]],
        device: torch.device,
        mode: GraphMode,
    ) -> None:
        if mode == "on" and not can_capture(device):
            raise UserError(
                f"key 'graph' is on, but {name} runs on the {device.type}; CUDA graphs need a GPU: say auto"
            )
        self.name, self.update, self.changed = name, update, changed
        self.is_graphed = will_capture(device, mode)
        if mode == "auto":
            log.info("%s: %s", name, "one CUDA graph per step" if self.is_graphed else "eager, there is no GPU")
        self._graphs: dict[Hashable, _Graph] = {}

    def __call__(self, *inputs: Tensor, kind: Hashable = None) -> dict[str, Tensor]:
        if not self.is_graphed:
            return self.update(*inputs)
        # Where a program has set these, torch refuses to tell allow_tf32, their older name.
        backends: Any = torch.backends
        tf32 = backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision
        key = kind, tf32, tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if key not in self._graphs:
            if len(self._graphs) == _MOST_SHAPES:
                shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
                raise RuntimeError(f"{self.name}: inputs of yet another shape ({shapes}); a graph needs fixed shapes")
            self._graphs[key] = _Graph(self.update, self.changed, inputs)
        return self._graphs[key].replay(inputs)


class _Graph:
    def __init__(
        self,
        update: Callable[..., dict[str, Tensor]],
        changed: Callable[[], Iterable[Tensor]],
        inputs: tuple[Tensor, ...],
    ) -> None:
        self._inputs = tuple(tensor.clone() for tensor in inputs)
        # Detached: a clone's graph would keep the parameter's node, made on this stream, alive in the capture.
        before = [(tensor, tensor.detach().clone()) for tensor in changed()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.random.fork_rng(range(torch.cuda.device_count())):
            for _ in range(_WARM_UP_CALLS):
                update(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        restore(before, changed())
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # loaders' threads go on
            self._outputs = update(*self._inputs)
        # Capturing records and does not run, so nothing has changed since.
        _captured.add(self)

    def replay(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        return {name: value.clone() for name, value in self._outputs.items()}

    def end(self) -> None:
        self._graph.reset()


_captured: "weakref.WeakSet[_Graph]" = weakref.WeakSet()


def end_graphs() -> None:
    """No graph can be replayed any more. A process group over NCCL 2.26 does not end before the graphs that use it."""
    for graph in _captured:
        graph.end()


@torch.no_grad()
def restore(before: list[tuple[Tensor, Tensor]], now: Iterable[Tensor]) -> None:
    """Put tensors back to their copies, and zero those that are there now but were not before."""
    known = {id(tensor) for tensor, _ in before}
    for tensor, copy in before:
        tensor.copy_(copy)
    for tensor in now:
        if id(tensor) not in known:
            tensor.zero_()
