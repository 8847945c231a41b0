"""The mappings of names to tensors in a checkpoint, under any key and at any depth; and the user's choice of them."""

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_defend.errors import UserError
from dist_defend.models.foreign_file import State, Unordered, pickles_more
from dist_defend.models.restricted_pickle import Buildable, Placeholder, shown

_DEEPEST = 12
_MOST_MAPPINGS, _MOST_TENSORS = 1000, 20_000  # in a file, and in one of its mappings
OPTIMIZERS = re.compile(r".*optim.*|exp_avg.*|.*_buffer|.*scheduler.*|state_sum")
_LEAVES = (Tensor, str, bytes, int, float, type(None))


@dataclass(frozen=True)
class Weights:
    """A mapping of names to tensors. path: the keys that lead to it. object: a placeholder among the tensors."""

    path: tuple[str, ...]
    state: State
    is_ordered: bool
    object: str | None
    ignored: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its dotted path; empty for the file itself."""
        return ".".join(self.path)


@dataclass(frozen=True)
class Choice:
    """What the user chose: a mapping (its dotted path or last name), a prefix, and patterns of tensors to leave out."""

    key: str | None = None
    prefix: str | None = None
    ignore: tuple[str, ...] = ()


ANYWHERE = Choice()


def find_weights(content: Any, path: str | Path, choice: Choice = ANYWHERE) -> list[Weights]:
    """The mappings of the file that may hold a network, sorted by their paths.

    UserError where there is none, the chosen one is not there or not the only one of its name, a name is no proper one,
    and a pattern matches nothing.
    """
    found = sorted(_walk(content), key=lambda weights: weights.path)
    if not found:
        objects = list_objects(content)
        if objects:
            raise pickles_more(path, objects[0])
        raise UserError(f"{path} holds no state dict of named tensors: save model.state_dict()")
    if choice.key is not None:
        named = [w for w in found if choice.key in (w.name, *w.path[-1:])]
        exact = [w for w in named if w.name == choice.key]
        if len(exact or named) != 1:
            what = f"names {len(named)} mappings" if named else "is not a mapping of tensors"
            raise UserError(f"--key {choice.key} {what} in {path}: choose from {_names(found)}")
        found = exact or named
    else:
        found = [w for w in found if not any(map(OPTIMIZERS.fullmatch, w.path))] or found
    largest = max(len(weights.state) for weights in found)
    if len(found) > _MOST_MAPPINGS or largest > _MOST_TENSORS:
        raise UserError(
            f"{path} holds {len(found)} mappings with up to {largest} tensors, more than any network that is known: "
            "choose one with --key, or save model.state_dict()"
        )
    for weights in found:
        for key in weights.state:
            if not key.isprintable() or len(key) > 300:
                raise UserError(f"{path} has a tensor with no proper name ('{shown(key)}'): save model.state_dict()")
    if choice.prefix is not None and not any(key.startswith(choice.prefix) for w in found for key in w.state):
        raise UserError(f"--prefix {choice.prefix} begins no tensor of {path}: {_names(found)} have others")
    for pattern in choice.ignore:
        if not any(fnmatchcase(key, pattern) for weights in found for key in weights.state):
            raise UserError(f"--ignore {pattern} matches no tensor of {path}: leave it out, or quote it for the shell")
    return [_without(weights, choice.ignore) for weights in found]


def list_objects(content: Any) -> list[str]:
    """Names of the placeholders that the content holds, each once, sorted."""
    objects = (v.refused for _, v in _nodes(content, into_objects=True) if isinstance(v, Buildable))
    return sorted({name for name in objects if name is not None})


def _nodes(content: Any, into_objects: bool = False) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All containers and objects of plain data with the shortest keys that lead to them, each once, none too deep."""
    if isinstance(content, _LEAVES):
        return
    seen: set[int] = {id(content)}
    waiting: deque[tuple[tuple[str, ...], Any]] = deque([((), content)])
    while waiting:
        path, value = waiting.popleft()
        yield path, value
        if isinstance(value, Placeholder) and into_objects:
            value = value.state
        if len(path) >= _DEEPEST or not isinstance(value, dict | list | tuple):
            continue
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        inside = [
            (shown(key), child) for key, child in pairs if not isinstance(child, _LEAVES) and id(child) not in seen
        ]
        for key, child in sorted(inside, key=lambda pair: pair[0]):
            if id(child) not in seen:  # not twice in this one either
                seen.add(id(child))
                waiting.append(((*path, key), child))


def _walk(content: Any) -> Iterator[Weights]:
    for path, value in _nodes(content):
        if not isinstance(value, dict):
            continue
        state = {key: tensor for key, tensor in value.items() if isinstance(key, str) and isinstance(tensor, Tensor)}
        if any(key.split(".")[-1].startswith("weight") for key in state):
            objects = sorted(v.refused for v in value.values() if isinstance(v, Buildable) and v.refused is not None)
            yield Weights(path, state, not isinstance(value, Unordered), objects[0] if objects else None)


def _without(weights: Weights, patterns: Sequence[str]) -> Weights:
    ignored = tuple(key for key in weights.state if any(fnmatchcase(key, pattern) for pattern in patterns))
    state = {key: value for key, value in weights.state.items() if key not in set(ignored)}
    return Weights(weights.path, state, weights.is_ordered, weights.object, ignored)


def _names(found: Sequence[Weights]) -> str:
    told = ", ".join(shown(weights.name) or "(the file itself)" for weights in found[:8])
    return told + (", ..." if len(found) > 8 else "")
