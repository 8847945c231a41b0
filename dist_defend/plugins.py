"""What other installed packages add, by entry points, and objects of the user's own modules, as ``module:name``.

Groups: ``dist_defend.methods``, ``.triggers``, ``.architectures``, ``.normalizations``. Nothing is imported before it
is used. A module is imported by name only if the user's own configuration named it, never because a file of others did.
"""

import importlib
import operator
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, get_args

from dist_defend import __version__
from dist_defend.errors import UserError

Kind = Literal["methods", "triggers", "architectures", "normalizations"]
BUILT_IN = f"dist-defend {__version__}"
VARIABLE = "DIST_DEFEND_IMPORT"  # modules, or module:name, with commas between: what files of others may name
_NAME = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
_OBJECT = re.compile(f"{_NAME}:{_NAME}")
_named_by_user: set[str] = set()


@dataclass(frozen=True)
class PlugIn:
    """An entry point of an installed distribution."""

    kind: Kind
    entry: EntryPoint

    @property
    def source(self) -> str:
        """The distribution's name and version."""
        assert self.entry.dist is not None  # entry_points() has seen to it
        return f"{self.entry.dist.name} {self.entry.dist.version}"

    def load(self) -> Any:
        """What the entry point names. UserError if its package cannot be imported."""
        try:
            return self.entry.load()
        except (Exception, SystemExit) as error:  # another's code
            raise self.refused(f"cannot be imported ({type(error).__name__}: {error})", "repair") from error

    def refused(self, told: str, remedy: str = "change") -> UserError:
        """The error that names the plug-in and its package."""
        return UserError(
            f"plug-in '{self.entry.name}' ({self.kind}, {self.entry.value}) of package {self.source} {told}: {remedy} "
            "or uninstall that package"
        )


@cache
def _claims(kind: Kind) -> dict[str, tuple[PlugIn, ...]]:
    """All plug-ins of a kind by name; more than one of a name is for ``find`` to refuse."""
    found: dict[str, tuple[PlugIn, ...]] = {}
    for entry in entry_points(group=f"dist_defend.{kind}"):
        found[entry.name] = (*found.get(entry.name, ()), PlugIn(kind, entry))
    return found


def claims(kind: Kind, name: str) -> tuple[PlugIn, ...]:
    """All plug-ins of that name, of which ``find`` allows one. No plug-in is imported."""
    return _claims(kind).get(name, ())


def names(kind: Kind) -> list[str]:
    """Of all plug-ins of a kind. No plug-in is imported."""
    return sorted(_claims(kind))


def sources(kind: Kind, built_in: Collection[str]) -> dict[str, str]:
    """Every name of a kind, ours first -> the distributions that have it; more than one cannot be used."""
    found = {name: BUILT_IN for name in built_in}
    for name in names(kind):
        owners = [claim.source for claim in claims(kind, name)]
        found[name] = " and ".join([found[name], *owners] if name in found else owners)
    return found


def find(kind: Kind, name: str, built_in: Collection[str]) -> PlugIn | None:
    """The plug-in of that name, None if there is none. UserError if two distributions, ours too, have the name."""
    found = claims(kind, name)
    if len(found) + (name in built_in) > 1:
        owners = sources(kind, built_in)[name]
        raise UserError(f"'{name}' is in {kind} of {owners}: uninstall one, or rename its entry point")
    return found[0] if found else None


def is_object(text: str) -> bool:
    """Whether it is written as ``module:name``."""
    return _OBJECT.fullmatch(text) is not None


def allow(content: Any) -> None:
    """Let ``load_object`` import every ``module:name`` in a value that the user wrote: a text, or a configuration."""
    if isinstance(content, str):
        if is_object(content):
            _named_by_user.add(content)
        return
    for item in content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ():
        allow(item)


def load_object(text: str) -> Any:
    """The object ``module:name``. UserError if nobody but a file asks for the module, or if it cannot be imported.

    Allowed is what ``allow`` was told, what VARIABLE names, and what an installed plug-in's entry point names.
    """
    module, _, name = text.partition(":")
    named = {word.strip() for word in os.environ.get(VARIABLE, "").split(",")}
    installed = {claim.entry.value for kind in get_args(Kind) for found in _claims(kind).values() for claim in found}
    if text not in (_named_by_user | installed) and not {text, module} & named:
        raise UserError(
            f"'{text}' names code, which is not imported because a model's file says so: if you trust it, set "
            f"{VARIABLE}={module}"
        )
    try:
        return operator.attrgetter(name)(importlib.import_module(module))
    except (Exception, SystemExit) as error:  # the user's code
        raise UserError(
            f"'{text}' cannot be imported ({type(error).__name__}: {error}): install its package, or set PYTHONPATH to "
            "the folder that holds it"
        ) from error
