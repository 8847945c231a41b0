"""What a step costs a GPU and whether it waits there, counted without one: ledger.json may only fall.

    python -m tests.capture.ledger            # the table, with what changed
    python -m tests.capture.ledger KEY ...    # these in full: operators by name, copies by place
    python -m tests.capture.ledger --write    # lower ledger.json, refusing to raise, and rewrite the docs' table

Steps run on device ``meta``, on tensors without data: nothing is computed, and whoever looks at a value gets an error.
Counted are operators that a device runs (views and allocations are free), their FLOP (of convolutions and matrix
products, two per multiply-add), the bytes that they read and write if each goes through main memory, and copies from
the host. Such a copy is blocking, async from pinned memory, or async from pageable memory, where the host waits as well
unless it is small. What depends on CUDA in the package is as on a GPU; a graph's update is run directly, with the
graph's copies.
"""

import argparse
import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dist_defend.data.lane import Delivery, Lane
from dist_defend.engine import graphed, update

DEVICE = torch.device("meta")
FILE = Path(__file__).with_name("ledger.json")
PAGE = Path(__file__).parents[2] / "docs/benchmarks/ledger.md"
SMALL = 1 << 16  # bytes that a copy from pageable memory may have without a wait: CUDA takes them along


class Look(RuntimeError):
    """The host would wait for a value of the device."""


@dataclass(frozen=True)
class Cost:
    """Of one call."""

    operators: int
    flop: int
    bytes: int


@dataclass
class Copies:
    """From the host, by place in the package: how many wait, wait although they are said not to, and do not wait."""

    blocking: Counter[str] = field(default_factory=Counter)
    pageable: Counter[str] = field(default_factory=Counter)
    free: Counter[str] = field(default_factory=Counter)


_TABLES = {"aten::index", "aten::index_select", "aten::gather", "aten::embedding", "aten::index_put_"}
_ALLOCATIONS = {f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")}
_pinned: set[int] = set()  # storages that were made by pin_memory()
_of_threads: "list[Ledger]" = []  # of loaders' threads, since the last count


class _MadeOfData(TorchFunctionMode):
    """Notes tensors that are made on the device of the host's data, which is a copy that torch waits for."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("__getitem__", "__setitem__") and args[0].device.type != "cpu":
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            self._note(sum(isinstance(part, list | np.ndarray) for part in parts))
        if name in ("tensor", "as_tensor", "new_tensor") and made.device.type != "cpu":
            data = args[-1] if args else next(iter((kwargs or {}).values()))
            self._note(not isinstance(data, Tensor))  # of a tensor it is a copy like others
        return made

    def _note(self, count: int) -> None:
        if count:
            self.found[_place()] += count


class Ledger(TorchDispatchMode):
    """Counts what is dispatched within. ``rows``: name, FLOP and bytes of each operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows: list[tuple[str, int, int]] = []
        self.copies = Copies()
        self.made_of_data = _MadeOfData(self.copies.blocking)

    def __enter__(self) -> "Ledger":
        self.made_of_data.__enter__()  # type: ignore[no-untyped-call]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self.made_of_data.__exit__(*error)  # type: ignore[no-untyped-call]

    def add(self, other: "Ledger") -> None:
        """What another one has counted."""
        self.rows += other.rows
        for kind, places in vars(other.copies).items():
            getattr(self.copies, kind).update(places)

    @property
    def cost(self) -> Cost:
        return Cost(len(self.rows), sum(row[1] for row in self.rows), sum(row[2] for row in self.rows))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, name = kwargs or {}, str(func._schema.name)
        inputs = _tensors((args, given))
        if any(tensor.device.type != "cpu" for tensor in inputs):
            _check_look(func, name, args, given)
        made = func(*args, **given)
        known = set(map(id, inputs))
        outputs = [tensor for tensor in _tensors(made) if id(tensor) not in known]
        if name in ("aten::_to_copy", "aten::copy_") and self._is_transfer(name, args, given, made):
            return made
        is_free = name in _ALLOCATIONS or _is_view(func)
        if is_free or all(tensor.device.type == "cpu" for tensor in (*inputs, *outputs)):
            return made
        self._note_host_operands(name, inputs)
        counter = flop_registry.get(func._overloadpacket)
        flop = int(counter(*args, **given, out_val=made)) if counter else 0
        self.rows.append((name.removeprefix("aten::"), flop, _traffic(name, inputs, outputs)))
        return made

    def _is_transfer(self, name: str, args: Any, kwargs: Any, made: Any) -> bool:
        """Note a copy from the host, if this is one."""
        source, target = (args[1], args[0]) if name == "aten::copy_" else (args[0], made)
        if source.device.type == target.device.type:
            return False
        is_async = kwargs.get("non_blocking", False) or (name == "aten::copy_" and len(args) > 2 and args[2])
        is_free = is_pinned(source) or source.nbytes <= SMALL
        copies = self.copies
        kind = copies.blocking if not is_async else copies.free if is_free else copies.pageable
        kind[_place()] += 1
        return True

    def _note_host_operands(self, name: str, inputs: list[Tensor]) -> None:
        """An index on the host is copied, and waited for; a number on the host is a kernel's argument."""
        if any(tensor.device.type == "cpu" and tensor.dim() > 0 for tensor in inputs):
            self.copies.blocking[f"{_place()} ({name.removeprefix('aten::')} of host data)"] += 1


def _check_look(func: Any, name: str, args: Any, kwargs: Any) -> None:
    """Look for an operator that tells the host of a value, or has a shape that depends on values."""
    depends = bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))
    if name in ("aten::index", "aten::index_put_", "aten::index_put"):
        depends = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    is_to_host = name == "aten::_to_copy" and torch.device(kwargs.get("device") or DEVICE).type == "cpu"
    is_to_host |= name == "aten::copy_" and args[0].device.type == "cpu" and args[1].device.type != "cpu"
    if depends or is_to_host:
        raise Look(f"{func}: a look at a value, at {_place()}")


def _traffic(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes read and written. Of a table as much as is taken from it."""
    made = sum(map(_extent, outputs))
    taken = sum(map(_extent, inputs))
    if name in _TABLES:
        taken = sum(min(_extent(tensor), made) if n == 0 else _extent(tensor) for n, tensor in enumerate(inputs))
    return taken + made


def _extent(tensor: Tensor) -> int:
    """Bytes that a tensor spans on the device, those that an expansion repeats once."""
    if tensor.device.type == "cpu":
        return 0
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


def _is_view(func: Any) -> bool:
    """Whether it only makes another name for the memory of an argument."""
    aliases = [a.alias_info for a in func._schema.arguments if a.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _place() -> str:
    """The innermost two lines of the package on the stack."""
    frames = [f for f in traceback.extract_stack() if "/dist_defend/" in f.filename and "/tests/" not in f.filename]
    return " < ".join(f"{f.filename.rpartition('/dist_defend/')[2]}:{f.lineno}" for f in reversed(frames[-2:]))


def is_pinned(tensor: Tensor) -> bool:
    """Whether pin_memory() made it, within pretended_gpu."""
    return int(tensor.untyped_storage()._cdata) in _pinned


class Replayed:
    """Stands for a graph of engine/graphed.py: what its replay runs, with its copies in and out."""

    def __init__(self, run: Callable[..., dict[str, Tensor]], changed: Any, inputs: tuple[Tensor, ...]) -> None:
        self.run, self.inputs = run, tuple(tensor.to(DEVICE, copy=True) for tensor in inputs)

    def replay(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        return {name: value.clone() for name, value in self.run(*self.inputs).items()}


class Stream:
    """Stands for torch.cuda.Stream: there is one, and nothing to wait for."""

    def __init__(self, device: object = None) -> None:
        """Of a device."""

    def record_event(self) -> str:
        return "event"

    def wait_event(self, event: object) -> None:
        """The host does not wait here."""


class Accelerator:
    """What Ranks and Replicated read of Accelerate's on one rank."""

    num_processes, process_index, is_main_process, mixed_precision = 1, 0, True, "no"
    device = DEVICE

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()

    def no_sync(self, module: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def prepare(self, module: Any, optimizer: Any) -> tuple[Any, Any]:
        names = ("param_groups", "state", "step", "zero_grad", "state_dict")
        return module, SimpleNamespace(optimizer=optimizer, **{name: getattr(optimizer, name) for name in names})


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Within, meta tensors have fused optimizers, and what depends on CUDA is as on a GPU."""
    optimizers = sys.modules[torch.optim.Optimizer.__module__]
    supported, autocast = optimizers._get_fused_kernels_supported_devices, torch.autocast

    def pinned(tensor: Tensor) -> Tensor:
        if is_pinned(tensor):
            return tensor
        copy = tensor.clone()
        _pinned.add(int(copy.untyped_storage()._cdata))
        return copy

    plain_deliver = Lane.deliver

    def deliver(lane: Lane, rows: np.ndarray, make: Callable[[], tuple[Tensor, ...]]) -> Delivery:
        """Modes are a thread's own: count there too."""
        ledger = Ledger()
        with ledger:
            delivery = plain_deliver(lane, rows, make)
        _of_threads.append(ledger)
        return delivery

    def cast(kind: str, **options: Any) -> Any:
        return nullcontext() if kind == "meta" else autocast(kind, **options)

    kernels = torch.library.Library("aten", "IMPL", "Meta")  # until _destroy()
    for name in ("_fused_sgd_", "_fused_adam_", "_fused_adamw_"):
        for overload in ("", ".tensor_lr"):
            kernels.impl(name + overload, lambda *args, **kwargs: None)
    is_device = lambda device: device.type == DEVICE.type  # noqa: E731
    try:
        with ExitStack() as stack:
            for where, what, value in (
                (torch, "autocast", cast),
                (optimizers, "_get_fused_kernels_supported_devices", lambda: [*supported(), "meta"]),
                (graphed, "can_capture", is_device),
                (update, "can_capture", is_device),
                (graphed, "_Graph", Replayed),
                (Tensor, "pin_memory", pinned),
                (Tensor, "record_stream", lambda tensor, stream: None),
                (Lane, "deliver", deliver),
                (torch.cuda, "Stream", Stream),
                (torch.cuda, "current_stream", Stream),
                (torch.cuda, "stream", lambda stream: nullcontext()),
            ):
                stack.enter_context(mock.patch.object(where, what, value))
            yield
    finally:
        kernels._destroy()
        _pinned.clear()


def counted(call: Callable[[], object]) -> Ledger:
    """The ledger of a call, after one that makes what lives on, such as the state of optimizers."""
    call()
    _of_threads.clear()
    ledger = Ledger()
    with ledger:
        call()
    for other in _of_threads:
        ledger.add(other)
    return ledger


Entry: TypeAlias = dict[str, Any]  # the names of Cost, and under "first" those of the first count


def stored() -> dict[str, Entry]:
    """What ledger.json holds."""
    content: dict[str, Entry] = json.loads(FILE.read_text())
    return content


def table(entries: dict[str, Entry]) -> str:
    """What docs/benchmarks/ledger.md shows of them."""
    lines = ["| call | operators (first) | GFLOP (first) | GB (first) |", "|---|---|---|---|"]
    for key, entry in sorted(entries.items()):
        both = [
            f"{entry[name] / unit:,.{digits}f} ({entry['first'][name] / unit:,.{digits}f})"
            for name, unit, digits in (("operators", 1, 0), ("flop", 1e9, 2), ("bytes", 1e9, 3))
        ]
        lines.append(f"| {key} | {' | '.join(both)} |")
    return "\n".join(lines) + "\n"


def changes(key: str, cost: Cost, before: Entry | None) -> list[str]:
    """One line for each number that is not the stored one."""
    now = asdict(cost)
    if before is None:
        return [f"{key}: is not in ledger.json"]
    return [f"{key}: {name} {before[name]:,} -> {now[name]:,}" for name in now if now[name] != before[name]]


def main() -> int:
    """The command."""
    from tests.capture.ledger_cases import CASES

    parser = argparse.ArgumentParser(prog="python -m tests.capture.ledger", description=__doc__.partition("\n")[0])
    parser.add_argument("keys", nargs="*", metavar="KEY", help="any part of a key")
    parser.add_argument("--write", action="store_true", help="lower ledger.json")
    args = parser.parse_args()
    before, now = stored() if FILE.exists() else {}, dict[str, Entry]()
    risen: list[str] = []
    with pretended_gpu():
        for key, make in CASES.items():
            if args.keys and not any(part in key for part in args.keys):
                continue
            ledger = counted(make())
            cost, old = ledger.cost, before.get(key)
            now[key] = asdict(cost)
            print(f"{key:45} {cost.operators:6,} operators {cost.flop / 1e9:9.2f} GFLOP {cost.bytes / 1e9:8.3f} GB")
            for line in changes(key, cost, old):
                print(f"    {line}")
            risen += [key] if old and any(value > old[name] for name, value in asdict(cost).items()) else []
            now[key]["first"] = old["first"] if old else asdict(cost)
            if args.keys:
                _print_details(ledger)
    if not args.write:
        return 0
    if risen:
        print(f"ledger.json is as it was: {', '.join(risen)} rose. Where that is meant, edit the file, and say why")
        return 1
    kept = {key: values for key, values in before.items() if args.keys and key not in now}
    write({**kept, **now})
    return 0


def write(entries: dict[str, Entry]) -> None:
    """To ledger.json, and to the page's table."""
    FILE.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n")
    head, _, rest = PAGE.read_text().partition("| call |")
    tail = rest.partition("\n\n")[2]
    PAGE.write_text(head + table(entries) + (f"\n{tail}" if tail else ""))


def _print_details(ledger: Ledger) -> None:
    for kind, places in vars(ledger.copies).items():
        for place, count in places.items():
            print(f"    {count:4} x {kind} copy at {place}")
    groups: dict[str, list[int]] = {}
    for name, flop, size in ledger.rows:
        group = groups.setdefault(name, [0, 0, 0])
        for n, value in enumerate((1, flop, size)):
            group[n] += value
    for name, (count, flop, size) in sorted(groups.items(), key=lambda item: -item[1][2]):
        print(f"    {count:5} x {name:40} {flop / 1e9:9.2f} GFLOP {size / 1e9:8.3f} GB")


if __name__ == "__main__":
    sys.exit(main())
