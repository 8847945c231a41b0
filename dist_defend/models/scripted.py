"""TorchScript archives as data: the tensors among a module's attributes. The program beside them is not looked at."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dist_defend.models.pickled_data import ALLOWED, as_list
from dist_defend.models.restricted_pickle import Buildable, Refused

_MOST_NAME = 300  # characters of a tensor's name, which bounds the depth too
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
        lists = {f"torch.jit._pickle.{name}": as_list for name in _LISTS}
        super().__init__({**ALLOWED, **lists, "torch.jit._pickle.restore_type_tag": lambda value, tag: value})

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or str(name).startswith(_COMPILED)

    def get(self, name: str, default: Any = None) -> Any:
        return ScriptedModule if name.startswith(_COMPILED) else super().get(name, default)


def module_state(module: Any) -> dict[str, Tensor]:
    """The tensors of a module and of those below it, by their state dict's names. Refused for anything else."""
    if not isinstance(module, ScriptedModule):
        raise Refused("a TorchScript archive of no module")
    found: dict[str, Tensor] = {}
    seen = {id(module)}  # a cycle ends here, and so does another name of the same module
    below = [("", iter(module.attributes.items()))]
    while below:
        prefix, attributes = below[-1]
        for key, value in attributes:
            if not isinstance(value, Tensor | ScriptedModule) or id(value) in seen:
                continue
            name = f"{prefix}{key}"
            if len(name) > _MOST_NAME:
                raise Refused(f"a TorchScript attribute of more than {_MOST_NAME} characters")
            if isinstance(value, Tensor):
                found[name] = value
            else:
                seen.add(id(value))
                below.append((f"{name}.", iter(value.attributes.items())))
                break
        else:
            below.pop()
    return found
