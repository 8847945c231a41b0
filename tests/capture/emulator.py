"""CUDA graphs emulated on a CPU: within emulated_gpu(), engine/graphed.py captures and replays there, unchanged.

A capture records the operators that torch dispatches and does not run the update: what it wrote, and the random
generator, are put back. A replay runs the recorded operators with the recorded numbers on the recorded storages, and no
Python of the update: a rate that was read as a float, a branch or a tensor made by the host are frozen, as in a graph.

Errors, where a GPU would fail or be wrong:
  CaptureViolation  an operator that waits for the device, has a shape that depends on values, or takes data of the
                    host; a look at a value; a draw from a generator that the graph does not know; a capture that other
                    threads can break
  StaleStream       a parameter's AccumulateGrad node lives since before the capture, and so belongs to another stream
  StaleMemory       at a replay, memory from before the capture that has been freed; graphs hold bare addresses
  UnnamedWrite      a write to memory that outlives the update, which ``changed`` does not name

Random operators of the default generator are recorded, and a replay draws on: torch registers the default generator of
a device with every graph. The CPU's generator stands for the device's.
Collectives are recorded as operators, and a replay takes part in them again, over gloo. Ranks must capture together.
Not emulated: kernels' own numerics, streams, the order in which a pool reuses memory, copies between host and device.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dist_defend.engine import graphed, update


class CaptureViolation(RuntimeError):
    """A graph cannot hold this."""


class StaleStream(RuntimeError):
    """The capture would wait for an event of another stream."""


class StaleMemory(RuntimeError):
    """A replay would read or write whatever lies there now."""


class UnnamedWrite(RuntimeError):
    """Warming up would change what nobody puts back."""


_OF_HOST = {"aten::lift_fresh", "aten::lift_fresh_copy", "aten::_linalg_check_errors"}
_LOOKS = {"cpu", "item", "numpy", "tolist"}
_OVERWRITES = {"aten::copy_", "aten::_foreach_copy_", "aten::fill_", "aten::zero_", "aten::_foreach_zero_"}
_HIDES_WRITES = {"aten::native_batch_norm"}  # to running statistics, in training: its schema does not say so


class _Address:
    """Where a tensor lies, which keeps nothing alive."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.dtype, self.shape, self.strides = tensor.dtype, tensor.size(), tensor.stride()
        self.offset = tensor.storage_offset()

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise StaleMemory(f"a tensor {tuple(self.shape)} {self.dtype} from before the capture has been freed")
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.strides)


class _Operator(NamedTuple):
    run: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[Tensor | None]  # the results; None for one that lies in an argument's memory


class EmulatedGraph:
    """Stands for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.tape: list[_Operator] = []
        self.random: list[str] = []  # names of operators that draw
        self.collectives: list[torch.Size] = []  # shapes of what is summed or gathered over ranks
        self.generators: list[torch.Generator] = []
        self.has_ended = False

    def reset(self) -> None:
        self.has_ended = True

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    @property
    def kernels(self) -> int:
        """How many operators a replay runs."""
        return len(self.tape)

    @torch.no_grad()
    def replay(self) -> None:
        if self.has_ended:
            raise RuntimeError("replay without a capture before it")

        def load(value: Any) -> Any:
            return value.tensor() if isinstance(value, _Address) else value

        with torch._C._AutoDispatchBelowAutograd():
            for operator in self.tape:
                result = operator.run(*tree_map(load, operator.args), **tree_map(load, operator.kwargs))
                if _is_collective(operator.run):
                    torch.distributed.Work.unbox(result[-1]).wait()
                for new, own in zip(_tensors(result), operator.made, strict=True):
                    if own is not None:
                        own.copy_(new)


class _Recorder(TorchDispatchMode):
    """Runs operators, refuses what no graph can hold, and writes the others down."""

    def __init__(self, graph: EmulatedGraph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = graph
        self.pool: dict[int, torch.UntypedStorage] = {}  # made in the capture; the graph keeps it
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage, torch.Size]] = {}
        self.is_overwritten: dict[int, bool] = {}  # of memory from before: whether its first use overwrites all of it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        _check_operator(func, args)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.graph.random.append(str(func))
            for generator in (v for v in tree_leaves((args, given)) if isinstance(v, torch.Generator)):
                if all(generator is not known for known in self.graph.generators):
                    raise CaptureViolation(f"{func} draws from a generator that the graph does not know")
        inputs, written = _tensors((args, given)), _written(func, args, given)
        overwritten = {id(t) for t in written if func._schema.name in _OVERWRITES and _fills_storage(t)}
        for tensor in sorted(inputs, key=lambda t: id(t) in overwritten):  # what is read, first
            if _key(tensor) not in self.pool:
                self.is_overwritten.setdefault(_key(tensor), id(tensor) in overwritten)
        for tensor in written:
            storage = tensor.untyped_storage()
            if _key(tensor) not in self.pool and _key(tensor) not in self.before:
                self.before[_key(tensor)] = storage, storage.clone(), tensor.size()
        if _is_collective(func):
            self.graph.collectives += [tensor.size() for tensor in written]
        known = {_key(tensor) for tensor in inputs}
        saved_args, saved_kwargs = tree_map(self._saved, (args, given))
        result = func(*args, **given)
        made = [None if _key(t) in known else t.detach() for t in _tensors(result)]
        self.pool |= {_key(t): t.untyped_storage() for t in made if t is not None}
        if not _is_view(func):  # views are no kernels: they are there already
            self.graph.tape.append(_Operator(func, saved_args, saved_kwargs, made))
        return result

    def _saved(self, value: Any) -> Any:
        """Detached, or the tape would keep the autograd graph."""
        if not isinstance(value, Tensor):
            return value
        return value.detach() if _key(value) in self.pool else _Address(value)

    def put_back(self) -> None:
        for storage, copy, _ in self.before.values():
            storage.copy_(copy)

    def check_writes(self, named: Iterable[Tensor]) -> None:
        """UnnamedWrite unless each is named, or to memory that every call overwrites before it reads it."""
        known = {_key(tensor) for tensor in named}
        for key, (_, _, shape) in self.before.items():
            if key not in known and not self.is_overwritten[key]:
                raise UnnamedWrite(f"changed() does not name a tensor {tuple(shape)} that the update writes to")


class _NoLooks(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _LOOKS:
            raise CaptureViolation(f"{func.__name__}: a look at a value waits for the device")
        return func(*args, **(kwargs or {}))


_changed: list[Callable[[], Iterable[Tensor]]] = []  # of the graph that is being made


class _Capture:
    """Stands for torch.cuda.graph."""

    def __init__(self, graph: EmulatedGraph, capture_error_mode: str = "global") -> None:
        if capture_error_mode == "global" and threading.active_count() > 1:
            raise CaptureViolation("an allocation of any other thread, as of a loader, ends a global capture")
        self.graph, self.recorder, self.stack = graph, _Recorder(graph), ExitStack()

    def __enter__(self) -> None:
        alive = [leaf for leaf in _changed[-1]() if accumulator_is_alive(leaf)]
        if alive:
            raise StaleStream(f"{len(alive)} AccumulateGrad nodes are older than the capture: {tuple(alive[0].shape)}")
        self.stack.enter_context(torch.random.fork_rng([]))
        self.stack.enter_context(_NoLooks())
        self.stack.enter_context(self.recorder)

    def __exit__(self, kind: Any, *error: Any) -> None:
        self.stack.close()
        self.recorder.put_back()
        if kind is None:
            self.recorder.check_writes(_changed[-1]())


class _Graph(graphed._Graph):
    """Tells the capture what the update says that it changes."""

    def __init__(self, update: Any, changed: Callable[[], Iterable[Tensor]], inputs: tuple[Tensor, ...]) -> None:
        _changed.append(changed)
        try:
            super().__init__(update, changed, inputs)
        finally:
            _changed.pop()


class _Stream:
    def wait_stream(self, other: Any) -> None:
        """There is one stream."""


@contextmanager
def emulated_gpu() -> Iterator[list[EmulatedGraph]]:
    """Within, a CPU can capture, and what depends on that is as on a GPU; the graphs, in the order of their capture."""
    graphs: list[EmulatedGraph] = []

    def make() -> EmulatedGraph:
        graphs.append(EmulatedGraph())
        return graphs[-1]

    stands_for = {
        "CUDAGraph": make,
        "graph": _Capture,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": lambda stream: nullcontext(),
    }
    with ExitStack() as stack:
        for name, value in stands_for.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for module in (graphed, update):
            stack.enter_context(mock.patch.object(module, "can_capture", lambda device: True))
        stack.enter_context(mock.patch.object(graphed, "_Graph", _Graph))
        yield graphs


def accumulator_is_alive(leaf: Tensor) -> bool:
    """Whether something holds the node that would add to the leaf's gradient."""
    if not (leaf.requires_grad and leaf.is_leaf):
        return False

    def notes() -> Any:
        """What stays with the node; a new node has none."""
        return torch.autograd.graph.get_gradient_edge(leaf).node.metadata

    notes()["seen"] = True
    return "seen" in notes()


def _check_operator(func: Any, args: tuple[Any, ...]) -> None:
    """CaptureViolation for one that waits for the device or takes data of the host."""
    depends = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
    if func._schema.name in ("aten::index", "aten::index_put_", "aten::index_put"):
        depends = {i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)}
    if depends or func._schema.name in _OF_HOST:
        raise CaptureViolation(f"{func}: waits for the device, depends on values, or takes data of the host")


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operator writes to."""
    if _is_collective(func):  # their schemas do not say so; the first argument is where results go
        return _tensors(args[0])
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    found = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if func._schema.name in _HIDES_WRITES and given["training"]:
        found += ["running_mean", "running_var"]
    return _tensors([given.get(name) for name in found])


def _is_collective(func: Any) -> bool:
    return str(func.namespace) == "c10d"


def _is_view(func: Any) -> bool:
    """Whether it only makes another name for the memory of an argument."""
    aliases = [a.alias_info for a in func._schema.arguments if a.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _fills_storage(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
