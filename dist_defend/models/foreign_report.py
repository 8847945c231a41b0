"""What an import recognised, what the file says besides its tensors, and the checks that both kinds of model share."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_defend.errors import UserError
from dist_defend.models.artifact import load_strict
from dist_defend.models.candidates import CLASSES, COUNTER, Candidate
from dist_defend.models.classifier import Classifier
from dist_defend.models.constants import Constants
from dist_defend.models.encoder import SimCLR
from dist_defend.models.finder import Fit, told_shape
from dist_defend.models.foreign_file import State
from dist_defend.models.mappings import Weights
from dist_defend.models.restricted_pickle import shown

_MOST_FACTS, _MOST_TEXT = 40, 60
_MOST_SHARED = 2**23  # values of a network that lie in memory which another of its tensors has
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@dataclass(frozen=True)
class ImportReport:
    """What was recognised. guessed: constants that neither the file nor the user told. resize: pixels in the model.

    dropped: tensors that the model does not use. others: where further networks lie that could be had with --key or
    --prefix. objects: names of objects beside the weights, none of which was made. facts: what the file says besides
    (JSON). renamed: (file's name, ours) of tensors matched by order. filled: counters that old files lack, now 0.
    """

    layout: str
    arch: str
    normalization: str
    image_size: int
    num_tensors: int
    num_parameters: int
    dropped: tuple[str, ...]
    guessed: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()
    filled: tuple[str, ...] = ()
    has_projector: bool = False
    num_classes: int = 0
    resize: int | None = None


def reported(
    fit: Fit,
    model: SimCLR | Classifier,
    tensors: State,
    constants: Constants,
    by_position: bool,
    used: Collection[str] = (),
    **told: Any,
) -> ImportReport:
    """The report on a model that was made of a fit's tensors, and of ``used`` beside it; told: its other fields."""
    dropped = (key for key in (*fit.beside, *fit.weights.ignored) if key not in used)
    return ImportReport(
        arch=fit.candidate.arch,
        normalization=model.normalization,
        image_size=model.image_size,
        num_tensors=len(tensors),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        dropped=tuple(key.removeprefix(fit.prefix) for key in dropped),
        guessed=constants.guessed,
        resize=constants.resize,
        renamed=tuple(pair for pair in fit.candidate.ours.items() if pair[0] != pair[1]) if by_position else (),
        **told,
    )


def plain_facts(content: Any) -> dict[str, Any]:
    """Numbers and short texts beside the weights, sorted by name: epoch, best_acc and their like."""
    facts: dict[str, Any] = {}
    items = content.items() if isinstance(content, dict) else ()
    for key, value in sorted((pair for pair in items if isinstance(pair[0], str)), key=lambda pair: pair[0]):
        if isinstance(value, Tensor) and value.numel() == 1 and "." not in key:
            value = value.item()
        is_short = isinstance(value, str) and len(value) <= _MOST_TEXT and value.isprintable()
        is_number = isinstance(value, float) or (type(value) is int and value.bit_length() < 64)
        is_fact = is_short or is_number
        if is_fact and key.isprintable() and len(key) <= _MOST_TEXT and len(facts) < _MOST_FACTS:
            facts[key] = plain(value)
    return facts


def plain(value: Any) -> Any:
    """A number or a text as JSON takes it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has none
    is_told = isinstance(value, str) or (isinstance(value, int) and value.bit_length() >= 64)
    return shown(value) if is_told else value


def fill(net: nn.Module, tensors: State, path: str | Path) -> tuple[str, ...]:
    """Load a file's tensors; counters of batches that are not there become 0, and their names are returned.

    UserErrors as check_values' and load_strict's.
    """
    own = net.state_dict()
    filled = tuple(key for key in own if key.endswith(COUNTER) and key not in tensors)
    state = {**tensors, **{key: torch.tensor(0) for key in filled}}
    check_values(state, own, path)
    load_strict(net, state, path)
    return filled


def check_memory(state: State, path: str | Path) -> None:
    """UserError for tensors that lie in each other's memory, so that a network of them is far larger than the file."""
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() // v.itemsize for v in state.values()}
    num_values = sum(value.numel() for value in state.values())
    if num_values > sum(storages.values()) + _MOST_SHARED:
        raise UserError(
            f"{path} holds {num_values} values in the memory of {sum(storages.values())}, as no trained network does: "
            "save model.state_dict()"
        )


def check_values(state: State, own: Mapping[str, Tensor], path: str | Path) -> None:
    """UserError for types of numbers that do not fit, and for values that are not finite in the model's own type."""
    for key in own:
        kinds = _FLOATS if own[key].is_floating_point() else _WHOLE
        if key in state and state[key].dtype not in kinds:
            raise UserError(f"{path}: {key} is of type {state[key].dtype}, not {own[key].dtype}: ask for another file")
    broken = [key for key in own if key in state and not state[key].to(own[key].dtype).isfinite().all()]
    if broken:
        told = ", ".join(broken[:8]) + (", ..." if len(broken) > 8 else "")
        raise UserError(
            f"{path}: {len(broken)} tensors hold NaN or infinite values ({told}), so nothing that it computes means "
            "anything: take an earlier checkpoint"
        )


def match_by_position(
    found: Sequence[Weights],
    candidates: Callable[[State], Iterable[Candidate]],
    prefix: str | None,
    path: str | Path,
    whole: bool,
) -> Fit:
    """The architecture whose tensors' shapes are the file's, in order; other names do not matter.

    whole: the file must have no more tensors (a classifier); else what follows the network's is left out. UserError for
    a file whose order is not the model's, several mappings of one length, and shapes that differ.
    """
    most = max(len(weights.state) for weights in found)
    largest = [weights for weights in found if len(weights.state) == most]
    if len(largest) > 1:
        names = ", ".join(shown(weights.name) for weights in largest[:8])
        raise UserError(f"{path} holds several mappings of {most} tensors ({names}): choose one with --key")
    weights = largest[0]
    if not weights.is_ordered:
        raise UserError(
            f"{path} is safetensors, which keeps no order, so that --by-position means nothing: leave it out"
        )
    theirs = {key: value for key, value in weights.state.items() if key.startswith(prefix or "")}
    has_counters = any(key.endswith(COUNTER) for key in theirs)
    everything = {key: value for weights in found for key, value in weights.state.items()}
    own = filter(_is_own, candidates(everything))
    pairings = [_pair(theirs, candidate, has_counters, whole) for candidate in own]
    if not pairings:
        raise UserError(f"{path} fits no network that is known: name one with --arch")
    best = min(pairings, key=lambda pairing: (pairing.problem is not None, -pairing.share))
    if best.problem is not None:
        raise UserError(f"{path} {best.problem}")
    beside = tuple(sorted(theirs.keys() - best.candidate.ours.keys()))
    return Fit(weights, "", best.candidate, best.num_classes, missing=(), misshapen=(), unexpected=(), beside=beside)


@dataclass(frozen=True)
class _Pairing:
    candidate: Candidate
    num_classes: int
    share: float  # of the positions that agree
    problem: str | None


def _is_own(candidate: Candidate) -> bool:
    return all(theirs == ours for theirs, ours in candidate.ours.items())


def _pair(theirs: State, candidate: Candidate, has_counters: bool, whole: bool) -> _Pairing:
    own = [key for key in candidate.ours if has_counters or not key.endswith(COUNTER)]
    num_classes = 0
    agreeing, first = 0, None
    for key, name in zip(theirs, own, strict=False):
        found, expected = tuple(theirs[key].shape), candidate.shapes.get(name, ())
        if CLASSES in expected and len(found) == len(expected):
            num_classes = num_classes or found[expected.index(CLASSES)]
            expected = tuple(num_classes if size == CLASSES else size for size in expected)
        if found == expected:
            agreeing += 1
        elif first is None:
            pair = f"{shown(key)} and {name} are {told_shape(theirs[key])} and {expected}"
            first = f"does not fit by order: {pair}: name another --arch"
    if len(theirs) != len(own) if whole else len(theirs) < len(own):
        first = f"has {len(theirs)} tensors and the network {len(own)}, so none can be matched by order"
    pairs = dict(zip(theirs, own, strict=False))
    shapes = {key: candidate.shapes[name] for key, name in pairs.items() if name in candidate.shapes}
    matched = Candidate(candidate.arch, candidate.image_size, shapes, pairs)
    return _Pairing(matched, num_classes, agreeing / max(len(own), len(theirs)), first)
