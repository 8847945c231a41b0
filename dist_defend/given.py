"""What a Python program hands over, as files that a run reads: networks as model folders, data as prepared sets."""

import dataclasses
import json
import logging
import re
import shutil
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from torch import Tensor, nn

from dist_defend.data.in_memory import ReadData, is_in_memory, read_data
from dist_defend.data.loader import DatasetConfig
from dist_defend.data.store import write_dataset
from dist_defend.errors import UserError
from dist_defend.models import in_process
from dist_defend.models.artifact import ModelCard, read_card, save_artifact, weights_digest
from dist_defend.models.classifier import Classifier
from dist_defend.models.encoder import SimCLR

log = logging.getLogger(__name__)

Model: TypeAlias = Classifier | SimCLR
M = TypeVar("M", bound=Classifier | SimCLR)
_ARCHITECTURES = ("arch", "student")  # keys that name one


def remember(model: M, card: ModelCard) -> M:
    """Keep the card of a model with it, for card_of."""
    vars(model)["card"] = (card, weights_digest(model))
    return model


def card_of(model: Model) -> ModelCard:
    """The card that a model came with; where its weights are others by now, without what no longer holds.

    UserError for a network that has none.
    """
    if not isinstance(model, Classifier | SimCLR) or "card" not in vars(model):
        raise UserError(
            f"a {type(model).__name__} is no model of dist_defend: wrap the network first, dist_defend.wrap(net, "
            "num_classes=..., image_size=..., normalization=...)"
        )
    card: ModelCard
    card, digest = vars(model)["card"]
    if weights_digest(model) == digest:
        return card
    changed: dict[str, Any] = {"parent_sha256": digest, "provenance": {"method": "changed in Python"}}
    return dataclasses.replace(card, defended_by=None, counts=None, chosen_by=None, **changed)


class Inputs:
    """Writes models and data of a program below ``place``, each as a folder named by key and content.

    None: nothing can be written, and both are refused.
    """

    def __init__(self, place: Path | None) -> None:
        self.place = place
        self._classes: tuple[str, ...] | None = None  # of the suspect
        self._data: dict[str, ReadData] = {}  # by key

    def section(self, values: Mapping[str, Any], hints: Mapping[str, Any], key: str) -> dict[str, Any]:
        """A section of a configuration as its file has it; hints: the types of its keys.

        Models become the paths of their folders, data those of prepared sets, functions that make networks the names
        of architectures; arrays' numbers and paths become plain ones. UserError for what can be none of these.
        """
        for name in ("model", "teacher"):
            if name in values:
                self._classes = _classes_of(values[name])
        self._data = {where: read_data(data, where) for where, data in _in_memory(values, key)}
        return {name: self._plain(value, hints.get(name), f"{key}.{name}") for name, value in values.items()}

    def _plain(self, value: Any, hint: Any, key: str) -> Any:
        hint = _without_none(hint)
        if isinstance(value, nn.Module):
            return self._model(value, key)
        if key in self._data:
            return self._placed(self._write_data(key), hint)
        if isinstance(value, str | Path):
            return self._placed(str(value), hint)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return json.loads(json.dumps(dataclasses.asdict(value)))
        if isinstance(value, Mapping):
            inner = hints_of(hint)
            return {str(k): self._plain(v, inner.get(str(k), inner.get("*")), f"{key}.{k}") for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._plain(item, None, f"{key}.{number}") for number, item in enumerate(value)]
        if isinstance(value, np.generic) or (isinstance(value, Tensor) and value.ndim == 0):
            return value.item()
        if callable(value):
            return _architecture(value, key)
        return value

    @staticmethod
    def _placed(path: str, hint: Any) -> Any:
        return {"path": path} if hint is DatasetConfig else path

    def _model(self, model: Any, key: str) -> str:
        card = card_of(model)
        if card.arch.startswith(in_process.PREFIX):
            card = dataclasses.replace(card, arch=in_process.make_known(*in_process.copies_of(model.net)))
        return self._settle(key, lambda folder: save_artifact(folder, model, card))

    def _write_data(self, key: str) -> str:
        data = self._data[key]
        group = key.rpartition(".")[0]
        most = max(int(other.labels.max()) for where, other in self._data.items() if where.rpartition(".")[0] == group)
        classes = data.classes or self._classes or tuple(map(str, range(max(most, 0) + 1)))
        name = key.rpartition(".")[2]
        for note in data.notes:
            log.warning("%s: %s", key, note)

        def write(folder: Path) -> str:
            return write_dataset(data.source(classes), folder, name=name, split=name, storage="npy").digest

        return self._settle(key, write)

    def _settle(self, key: str, write: Callable[[Path], str]) -> str:
        """Let ``write`` fill a folder, and name that by the digest which it gives; one of that name is as good."""
        if self.place is None:
            raise UserError(f"key '{key}' is data or a model; give a file here")
        name = key.partition(".")[2].replace(".", "_")
        fresh = self.place / f"{name}.new"
        shutil.rmtree(fresh, ignore_errors=True)
        folder = self.place / f"{name}-{write(fresh)[:8]}"
        if folder.exists():
            shutil.rmtree(fresh)
        else:
            fresh.rename(folder)
        return str(folder)


def _architecture(make: Callable[..., Any], key: str) -> str:
    if key.rpartition(".")[2] not in _ARCHITECTURES:
        raise UserError(f"key '{key}' is a {type(make).__name__}; give a value as a configuration has it")
    name = re.sub(r"\W", "_", getattr(make, "__name__", type(make).__name__))
    return in_process.make_known(in_process.PREFIX + name, make)


def _in_memory(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(key, data) of all data below a value."""
    if is_in_memory(value) and not (isinstance(value, Tensor | np.ndarray) and value.ndim == 0):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _in_memory(inner, f"{key}.{name}")


def _classes_of(model: Any) -> tuple[str, ...] | None:
    """The names of a classifier's classes, their numbers where it has none; None for what is no classifier."""
    try:
        card = read_card(model) if isinstance(model, str | Path) else card_of(model)
    except UserError:
        return None  # and the run says why
    return card.classes or (tuple(map(str, range(card.num_classes))) if card.num_classes else None)


def _without_none(hint: Any) -> Any:
    """T of T | None; other unions are nothing that data could be."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        return rest[0] if len(rest) == 1 else None
    return hint


def hints_of(hint: Any) -> dict[str, Any]:
    """Key -> type of a section; "*": of all keys."""
    if typing.get_origin(hint) is dict:
        return {"*": typing.get_args(hint)[1]}
    return typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
