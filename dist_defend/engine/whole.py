"""A sharded module made whole for a while, to be evaluated or saved like any other."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class Whole:
    """Remembers a module's own hooks before something shards it, and puts full parameters in place on demand."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._own = {inner: {name: OrderedDict(inner.__dict__[name]) for name in _HOOKS} for inner in module.modules()}

    @contextmanager
    def with_parameters(self, full: dict[str, Tensor]) -> Iterator[None]:
        """Within, the module holds plain parameters ``full`` (by name) and none of the hooks that gather shards."""
        sharded: list[tuple[nn.Module, dict[str, Any]]] = []
        for path, inner in self.module.named_modules():
            prefix = f"{path}." if path else ""
            sharded.append((inner, {name: inner.__dict__[name] for name in (*_HOOKS, "_parameters")}))
            parameters = {
                name: None if p is None else nn.Parameter(full[prefix + name], p.requires_grad)
                for name, p in inner.__dict__["_parameters"].items()
            }
            inner.__dict__.update(self._own[inner], _parameters=parameters)
        try:
            yield
        finally:
            for inner, state in sharded:
                inner.__dict__.update(state)
