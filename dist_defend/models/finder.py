"""Finds the network in the mappings of a checkpoint (models.mappings): every prefix, every known architecture.

A network fits where each of its tensors is there by name and shape, and nothing else lies inside of its modules. What
lies beside them (heads, momentum copies, profilers' counters) is left out and told. Nothing depends on a dict's order.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dist_defend.errors import UserError
from dist_defend.models.candidates import CLASSES, COUNTER, Candidate
from dist_defend.models.foreign_file import State, pickles_more
from dist_defend.models.mappings import ANYWHERE, OPTIMIZERS, Choice, Weights
from dist_defend.models.restricted_pickle import shown

_MOST_PREFIXES, _MOST_TOLD, _MOST_PLACE = 64, 3, 160
_MOST_LOOKED_AT = 1_500_000  # names, over all places where a network could begin: some seconds
_LEAST_SHARE = 0.2  # of a network's names, below which it is not looked at
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_COUNTERS = frozenset({"total_ops", "total_params"})  # of the profiler thop
_BESIDE = re.compile(  # modules that stand beside a backbone and are no part of it
    r"fc\d*|g|mlp|linear|last_linear|logits?|.*head.*|.*classifier.*|.*proj.*|.*predict.*|.*prototype.*|decoder.*|"
    r"mask_token|queue.*|.*momentum.*|.*(?:^|_)ema(?:_|$).*|teacher.*|student.*|aux.*|AuxLogits|.*loss.*|center|"
    r"n_averaged|logit_scale|num_updates|decay"
)
_SELF_SUPERVISED = re.compile(
    r".*proj(?:ect|_head|$).*|.*predict(?:or|ion).*|.*prototype.*|.*momentum.*|queue.*|.*encoder_[qk]|decoder_.*|"
    r"mask_token|(?:online|target|query|key|base)_(?:encoder|net(?:work)?|backbone)|dino.*|ibot.*"
)
_COPIES = re.compile(  # of a network that is trained beside, second to it
    r".*(?:^|_)ema(?:_|$).*|.*momentum.*|.*(?:^|_)target(?:_|$).*|.*_k|key(?:_.*)?|.*averaged?(?:_|$).*|.*(?:^|_)swa(?:_|$).*|"
    r"shadow.*|.*teacher.*"
)


@dataclass(frozen=True)
class Fit:
    """An architecture at a prefix. num_classes: what the shapes of its last layer say; 0 for an encoder's.

    missing, misshapen, unexpected: how it does not fit. beside: tensors of the mapping that are no part of it.
    """

    weights: Weights
    prefix: str
    candidate: Candidate
    num_classes: int
    missing: tuple[str, ...]
    misshapen: tuple[str, ...]
    unexpected: tuple[str, ...]
    beside: tuple[str, ...]

    @property
    def is_exact(self) -> bool:
        """Whether the network fits."""
        return not (self.missing or self.misshapen or self.unexpected)

    @property
    def num_agreeing(self) -> int:
        """Tensors that agree by name and shape."""
        return len(self.candidate.shapes) - len(self.missing) - len(self.misshapen)

    @property
    def closeness(self) -> float:
        """1 for an exact fit, 0 for nothing in common."""
        named = self.num_agreeing + 0.5 * len(self.misshapen)
        return named / (len(self.candidate.shapes) + len(self.unexpected))

    @property
    def place(self) -> str:
        """Where it lies, in words."""
        parts = [f"in '{name}'" for name in self.weights.path] + ([f"prefix '{self.prefix}'"] if self.prefix else [])
        return ", ".join(parts)

    def tensors(self) -> State:
        """The network's tensors by our names; counters where the file has them."""
        state, ours = self.weights.state, self.candidate.ours
        return {own: state[self.prefix + key] for key, own in ours.items() if self.prefix + key in state}

    def misfit(self) -> str:
        """How it does not fit, in words."""
        told = (("missing", self.missing), ("unexpected", self.unexpected), ("misshapen", self.misshapen))
        return "; ".join(f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in told if keys)


def find_network(
    found: Sequence[Weights],
    candidates: Callable[[State], Iterable[Candidate]],
    choice: Choice = ANYWHERE,
    path: str | Path = "the checkpoint",
) -> list[Fit]:
    """The best fit of each architecture in each mapping and at each prefix, exact ones first, then the closest.

    A mapping whose names have wrappers of modules inside of them (a compiled or sharded block) is tried without these.
    UserError for a file with so many places to look at that it would take minutes.
    """
    fits = []
    work = _Work(path)
    for weights in found:
        here = _fits(weights, candidates(weights.state), choice.prefix, work)
        if not any(fit.is_exact for fit in here):
            bare = _unwrapped(weights)
            here += _fits(bare, candidates(bare.state), choice.prefix, work) if bare is not None else []
        fits += here
    return sorted(fits, key=lambda fit: (not fit.is_exact, -fit.closeness, -len(fit.candidate.shapes)))


class _Work:
    """Counts the names that were compared. UserError beyond what an honest file could take."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.left = path, _MOST_LOOKED_AT

    def add(self, names: int) -> None:
        self.left -= names
        if self.left < 0:
            raise UserError(
                f"{self.path} has too many places where a network could begin: choose one with --key or --prefix, or "
                "save model.state_dict()"
            )


def choose(fits: Sequence[Fit], path: str | Path, kind: str) -> tuple[Fit, tuple[str, ...]]:
    """The fit to take of those that are exact, and where the others lie.

    Trained networks come before copies of them (momentum, EMA, target, teacher); an encoder's teacher before its
    student, as DINO's users load it. UserError where two of one rank differ, with --key or --prefix for each, and for
    an object among the tensors.
    """
    ranks = [_rank(fit, fits, kind) for fit in fits]
    best = [fit for fit, rank in zip(fits, ranks, strict=True) if rank == min(ranks)]
    best.sort(key=lambda fit: (len(fit.prefix), fit.weights.path, fit.prefix))
    differing = [fit for fit in best[1:] if not _same(fit, best[0])]
    if differing:
        places = " and ".join(
            f"{fit.candidate.arch} ({shown(fit.place, _MOST_PLACE) or 'the file itself'})"
            for fit in (best[0], *differing[:_MOST_TOLD])
        )
        option = "--key" if len({fit.weights.path for fit in (best[0], *differing)}) > 1 else "--prefix"
        raise UserError(f"{path} holds several networks: {places}; choose one with {option}")
    if best[0].weights.object is not None and best[0].weights.path:
        raise pickles_more(path, best[0].weights.object)
    others = {fit.place or "the file itself": " (the same tensors)" if _same(fit, best[0]) else "" for fit in fits}
    others.pop(best[0].place or "the file itself")
    return best[0], tuple(sorted(place + note for place, note in others.items()))


def is_self_supervised(fit: Fit) -> bool:
    """Whether projectors, prototypes, momentum copies and their like stand beside the network.

    Also an encoder that is a teacher or a student. Classifiers are that in distillation.
    """
    around = {*fit.weights.path, *fit.prefix.split(".")}
    if around & {"teacher", "student"} and not fit.num_classes:
        return True
    beside = {part for key in fit.beside for part in key.split(".")[:-1] or [key]}
    return any(map(_SELF_SUPERVISED.fullmatch, beside | around))


def _unwrapped(weights: Weights) -> Weights | None:
    """The mapping without wrappers' names inside of its keys; None where it has none, or two keys would be one."""
    state = {".".join(part for part in key.split(".") if part not in _WRAPPERS): v for key, v in weights.state.items()}
    if len(state) != len(weights.state) or state.keys() == weights.state.keys():
        return None
    return Weights(weights.path, state, weights.is_ordered, weights.object, weights.ignored)


def _fits(weights: Weights, candidates: Iterable[Candidate], prefix: str | None, work: _Work) -> list[Fit]:
    best: dict[tuple[str, str], Fit] = {}
    first: Candidate | None = None
    for candidate in candidates:
        first = first or candidate
        work.add(len(weights.state) // 10)
        for place in _prefixes(weights.state, candidate, prefix):
            work.add(len(candidate.shapes) // 4)
            named = sum(place + key in weights.state for key in candidate.shapes)
            if named < _LEAST_SHARE * len(candidate.shapes):
                continue
            work.add(len(candidate.shapes) + len(weights.state))
            fit = _fit(weights, place, candidate)
            known = best.get((candidate.arch, place))
            if known is None or fit.closeness > known.closeness:
                best[candidate.arch, place] = fit
            if fit.is_exact and not any(weights.state[key].dim() == 4 for key in fit.beside):
                return list(best.values())  # nothing is left that another network could be made of
    return list(best.values()) or ([_fit(weights, prefix or "", first)] if first is not None else [])


def _prefixes(state: State, candidate: Candidate, prefix: str | None) -> list[str]:
    """Where the network may begin: what stands before its first, its middle and its last tensors' names."""
    if prefix is not None:
        return [prefix if not prefix or prefix.endswith(".") else f"{prefix}."]
    names = [name for name, shape in candidate.shapes.items() if CLASSES not in shape]
    anchors = {names[0], names[len(names) // 2], names[-1]}
    found = {
        key[: len(key) - len(anchor)]
        for anchor in anchors
        for key in state
        if key.endswith(anchor) and key[: len(key) - len(anchor)][-1:] in ("", ".")
    }
    return sorted(found, key=lambda place: (len(place), place))[:_MOST_PREFIXES]


def _fit(weights: Weights, prefix: str, candidate: Candidate) -> Fit:
    state = weights.state
    head = candidate.head
    sizes = [_classes(state.get(prefix + key), candidate.shapes[key]) for key in head]
    num_classes = next((size for size in sizes if size), 0)
    missing, misshapen = [], []
    for key, shape in candidate.shapes.items():
        value = state.get(prefix + key)
        expected = tuple(num_classes if size == CLASSES else size for size in shape)
        if value is None:
            missing.append(prefix + key)
        elif tuple(value.shape) != expected:
            misshapen.append(f"{prefix}{key} {told_shape(value)} instead of {expected}")
    parts = {key.split(".")[0] for key in candidate.ours}
    taken = {prefix + key for key in candidate.ours}
    beside: list[str] = []
    unexpected: list[str] = []
    for key in sorted(state.keys() - taken):
        part, _, rest = key.removeprefix(prefix).partition(".")
        is_inside = key.startswith(prefix) and not _is_beside(part, rest, parts, state[key])
        (unexpected if is_inside else beside).append(key)
    return Fit(
        weights, prefix, candidate, num_classes, tuple(missing), tuple(misshapen), tuple(unexpected), tuple(beside)
    )


def _is_beside(part: str, rest: str, parts: set[str], value: Tensor) -> bool:
    """Whether a tensor at the network's own level is none of its modules'."""
    last = (rest or part).split(".")[-1]
    if last in (*_COUNTERS, COUNTER) or last.endswith("_mask"):
        return True
    if part in parts:
        return False
    return bool(_BESIDE.fullmatch(part)) or (part.isdigit() and value.dim() < 4)


def _classes(value: Tensor | None, shape: tuple[int, ...]) -> int:
    is_like = value is not None and value.dim() == len(shape)
    return int(value.shape[shape.index(CLASSES)]) if value is not None and is_like else 0


def _rank(fit: Fit, fits: Sequence[Fit], kind: str) -> int:
    parts = [*fit.weights.path, *filter(None, fit.prefix.split("."))]
    if any(map(OPTIMIZERS.fullmatch, parts)):
        return 3
    has_teacher = kind == "encoder" and any("teacher" in f"{f.weights.name}.{f.prefix}" for f in fits)
    if has_teacher and any("student" in part for part in parts):
        return 1
    if has_teacher and any("teacher" in part for part in parts):
        return 0
    return 2 if any(map(_COPIES.fullmatch, parts)) else 0


def told_shape(value: Tensor) -> str:
    """The sizes, of the first dimensions where there are many."""
    return str(tuple(value.shape)) if value.dim() <= 6 else f"({', '.join(map(str, value.shape[:6]))}, ...)"


def _same(one: Fit, other: Fit) -> bool:
    """Whether two fits give the same network: one set of tensors under two names."""
    if one.candidate.arch != other.candidate.arch:
        return False
    ours, theirs = one.tensors(), other.tensors()
    return ours.keys() == theirs.keys() and all(_equal(ours[key], theirs[key]) for key in ours)


def _equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    try:
        return one.equal(other)
    except RuntimeError:  # numbers of a type that torch does not compare, such as float8; check_values refuses them
        return False


def _some(keys: Sequence[str]) -> str:
    return ", ".join(map(shown, keys[:_MOST_TOLD])) + (", ..." if len(keys) > _MOST_TOLD else "")


def unknown(path: str | Path, found: Sequence[Weights], fits: Sequence[Fit], arch: str | None) -> UserError:
    """What is said where nothing fits: how far the nearest architectures are, and what the user can do.

    An object among the tensors of the nearest mapping is named before all.
    """
    for weights in [fit.weights for fit in fits[:1]] or found:
        if weights.object is not None:
            return pickles_more(path, weights.object)
    if arch is not None and fits:
        nearest = fits[0]
        place = f" ({shown(nearest.place, _MOST_PLACE)})" if nearest.place else ""
        return UserError(
            f"{path} does not fit the model {arch}{place}: {nearest.misfit()}: use the architecture (arch) it was made "
            "with; --key, --prefix and --ignore choose among its tensors"
        )
    keys = ", ".join(map(shown, sorted(found[0].state)[:_MOST_TOLD]))
    remedy = (
        "name the network with --arch, where it lies with --key and --prefix, and what to leave out with --ignore; "
        "an architecture that docs/models.md does not list cannot be imported yet"
    )
    where = f"in '{shown(found[0].name, _MOST_PLACE)}', " if found[0].path else ""
    told: list[str] = []
    for fit in fits:
        if fit.closeness > 0.05 and len(told) < _MOST_TOLD and all(fit.candidate.arch not in one for one in told):
            count = f"{fit.num_agreeing} of {len(fit.candidate.shapes)} tensors agree by name and shape"
            told.append(
                f"{fit.candidate.arch} ({count}, {len(fit.misshapen)} misshapen{', ' * bool(fit.place)}"
                f"{shown(fit.place, _MOST_PLACE)})"
            )
    nearest_told = f"; nearest: {', '.join(told)}; the first has {fits[0].misfit()}" if told else ""
    return UserError(f"{path} has a layout that is not known ({where}keys {keys}, ...){nearest_told}: {remedy}")
