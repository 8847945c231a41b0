"""The methods: modules of the folders here, or of plug-ins, found by name. Each has ``Config`` and ``build``.

``build(options, context) -> Plan`` makes the stages that the trainer runs. The folders are named as those of configs/.
"""

import ast
import dataclasses
import importlib
import pkgutil
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from dist_defend import plugins
from dist_defend.methods import attack, defend, measure, pretrain

FOLDERS = (pretrain, attack, defend, measure)
SHARED = ("abd", "defender", "pruning", "tuning")  # parts shared by methods, not methods themselves


@cache
def _places() -> dict[str, ModuleSpec]:
    """The module specs of the built-in methods in all folders, by method name."""
    places: dict[str, ModuleSpec] = {}
    for folder in FOLDERS:
        for found in pkgutil.iter_modules(folder.__path__):
            if found.name not in SHARED:
                assert found.name not in places, f"two methods are named {found.name}"
                spec = find_spec(f"{folder.__name__}.{found.name}")
                assert spec is not None
                places[found.name] = spec
    return places


def method_names() -> list[str]:
    """Names of all methods, built-in ones and those of plug-ins, sorted."""
    return sorted({*_places(), *plugins.names("methods")})


def folder_of(name: str) -> str | None:
    """``pretrain``, ``attack``, ``defend`` or ``measure``; None for a plug-in's method."""
    return _places()[name].name.split(".")[-2] if name in _places() else None


def method_sources() -> dict[str, str]:
    """The installed distribution and version that each method comes from, by method name."""
    return plugins.sources("methods", _places())


def headline(name: str) -> str:
    """First line of a method's docstring, read without an import; of a plug-in, its entry point (module:attribute)."""
    origin = _places()[name].origin if name in _places() else None
    if origin is None:
        return ", ".join(claim.entry.value for claim in plugins.claims("methods", name))
    doc = ast.get_docstring(ast.parse(Path(origin).read_text(encoding="utf-8"))) or ""
    return doc.partition("\n")[0]


def find_method(name: str) -> ModuleType:
    """The module of a method. KeyError for a name that is not one of method_names(), UserError for a broken plug-in."""
    plug_in = plugins.find("methods", name, _places())
    if plug_in is None:
        return importlib.import_module(_places()[name].name)
    module: ModuleType = plug_in.load()
    if not dataclasses.is_dataclass(getattr(module, "Config", None)) or not callable(getattr(module, "build", None)):
        raise plug_in.refused("is no method: it needs a dataclass Config and a function build(config, context)")
    return module
