"""Each method is a module of one of the folders here, found by its name: it has ``Config`` and ``build``.

``build(options, context) -> Plan`` makes the stages that the trainer runs. The folders are named as those of configs/.
"""

import importlib
import pkgutil
from functools import cache
from types import ModuleType

from dist_defend.methods import attack, defend, measure, pretrain

FOLDERS = (pretrain, attack, defend, measure)
SHARED = ("abd", "pruning")  # packages that methods are made from; not methods themselves


@cache
def _places() -> dict[str, str]:
    """A method's name -> its module's, over all folders."""
    places: dict[str, str] = {}
    for folder in FOLDERS:
        for found in pkgutil.iter_modules(folder.__path__):
            if found.name not in SHARED:
                assert found.name not in places, f"two methods are named {found.name}"
                places[found.name] = f"{folder.__name__}.{found.name}"
    return places


def method_names() -> list[str]:
    """All methods; the module's name is the registry."""
    return sorted(_places())


def find_method(name: str) -> ModuleType:
    """The module of a method. KeyError for a name that is not one of method_names()."""
    return importlib.import_module(_places()[name])
