"""TorchScript archives as data: the tensors among a module's attributes. The program beside them is not looked at."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from dist_defend.models.pickled_data import ALLOWED
from dist_defend.models.restricted_pickle import Buildable, Refused

_COMPILED = "__torch__."  # begins the name of every class that TorchScript has compiled
_LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")


class ScriptedModule(Buildable):
    """An object of a compiled class: its attributes by name."""

    def __init__(self) -> None:
        self.attributes: dict[Any, Any] = {}

    def build(self, state: Any) -> None:
        """Take the attributes."""
        if not isinstance(state, dict):
            raise Refused("a TorchScript object that is no module")
        self.attributes = state


class ScriptTable(dict[str, Callable[..., Any] | None]):
    """What a TorchScript pickle may make: what any may, and modules of compiled classes."""

    def __init__(self) -> None:
        lists = {f"torch.jit._pickle.{name}": list for name in _LISTS}
        super().__init__({**ALLOWED, **lists, "torch.jit._pickle.restore_type_tag": lambda value, tag: value})

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or str(name).startswith(_COMPILED)

    def get(self, name: str, default: Any = None) -> Any:
        return ScriptedModule if name.startswith(_COMPILED) else super().get(name, default)


def module_state(module: Any) -> dict[str, Tensor]:
    """The tensors of a module and of those below it, by their state dict's names. Refused for anything else."""
    if not isinstance(module, ScriptedModule):
        raise Refused("a TorchScript archive of no module")
    return dict(_tensors(module, "", set()))


def _tensors(module: ScriptedModule, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if id(module) in seen:  # in a cycle, or another name of the same one
        return
    seen.add(id(module))
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, ScriptedModule):
            yield from _tensors(value, f"{prefix}{name}.", seen)
