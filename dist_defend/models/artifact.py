"""A model on disk: model.safetensors (weights) and model.json (its card). Nothing here can run code from a file."""

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dist_defend.errors import UserError
from dist_defend.files import open_regular, write_atomic
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.models.encoder import SimCLR, build_simclr
from dist_defend.screen import printable
from dist_defend.strict_json import build, read_json

FORMAT = 2  # format 1 had the key trigger, which differed between encoders and classifiers
KINDS = ("simclr", "encoder", "classifier")
MOST_PIXELS = 4096  # of an image's side
MOST_OUTPUTS = 1 << 17  # classes, or features
GUESSABLE = ("normalization", "image_size", "arch")
_MOST_DEPTH = 30  # of what a card keeps beside
_MOST_BYTES = 16 << 20


@dataclass(frozen=True)
class ModelCard:
    """What model.json says: how to rebuild the model, whether it is poisoned, and where it comes from.

    kind: simclr, encoder for one without a projector, or classifier. image_size: pixels. feature_dim: an encoder's;
    num_classes: a classifier's. attack: the attack whose backdoor the model has or had, if any, with the keys of
    attacks.attack.AttackConfig, for encoders and classifiers alike.
    resize: side in pixels to which the model itself resizes its images, if it does. classes: names by label, if known.
    parent_sha256: digest of the weights this model was made from. provenance: anything else worth keeping (JSON).
    guessed: which of normalization, image_size and arch were neither told by the source nor given by the user.
    defended_by: the defence that was applied. counts: {"before": ..., "after": ...} of that defence,
    each measure as {"correct", "n"}. chosen_by: by what the outcome was chosen (defence_data, oracle, ...), if it was.
    """

    kind: str
    arch: str
    normalization: str
    image_size: int
    feature_dim: int | None = None
    num_classes: int | None = None
    backdoored: bool = False
    attack: dict[str, Any] | None = None
    parent_sha256: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    resize: int | None = None
    classes: tuple[str, ...] | None = None
    guessed: tuple[str, ...] = ()
    defended_by: str | None = None
    counts: dict[str, Any] | None = None
    chosen_by: str | None = None

    def __post_init__(self) -> None:
        for key in ("classes", "guessed"):  # JSON knows lists only
            if isinstance(getattr(self, key), list):
                object.__setattr__(self, key, tuple(getattr(self, key)))
        ranges = {"image_size": MOST_PIXELS, "resize": MOST_PIXELS, "feature_dim": MOST_OUTPUTS}
        for key, most in {**ranges, "num_classes": MOST_OUTPUTS}.items():
            value = getattr(self, key)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"key '{key}' is {value}; it must be in 1 to {most}")
        if self.kind not in KINDS:
            raise ValueError(f"key 'kind' is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if self.classes is not None and self.num_classes not in (None, len(self.classes)):
            raise ValueError(f"key 'classes' has {len(self.classes)} names, but num_classes is {self.num_classes}")
        if unknown := set(self.guessed) - set(GUESSABLE):
            raise ValueError(f"key 'guessed' names {sorted(unknown)}; it may name {', '.join(GUESSABLE)}")
        if self.parent_sha256 is not None and not re.fullmatch("[0-9a-f]{0,64}", self.parent_sha256):
            raise ValueError("key 'parent_sha256' is no sha256 in hex")
        _check_counts(self.counts or {})


def card_of(model: SimCLR | Classifier, **told: Any) -> ModelCard:
    """The card of a model: what it says of itself, and ``told``, other fields of the card."""
    if isinstance(model, SimCLR):
        own: dict[str, Any] = {"kind": model.kind, "feature_dim": model.f.feature_dim}
    else:
        own = {"kind": "classifier", "num_classes": model.num_classes}
    return ModelCard(arch=model.arch, normalization=model.normalization, image_size=model.image_size, **(own | told))


def _check_counts(counts: dict[str, Any]) -> None:
    for when, found in counts.items():
        if when not in ("before", "after") or not isinstance(found, dict):
            raise ValueError(f"key 'counts' has {when!r}; it may have the counts before and after")
        for name, count in found.items():
            numbers = [count.get("correct"), count.get("n")] if isinstance(count, dict) and len(count) == 2 else []
            whole = [number for number in numbers if isinstance(number, int) and not isinstance(number, bool)]
            if len(whole) != 2 or not 0 <= whole[0] <= whole[1]:
                raise ValueError(f"key 'counts.{when}.{name}' is no {{correct, n}} with 0 <= correct <= n")


def save_artifact(folder: str | Path, model: SimCLR | Classifier, card: ModelCard) -> str:
    """Write both files, each atomically and the card last; returns the sha256 (hex) of the weights file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    card = dataclasses.replace(card, resize=model.resize)  # what the weights were used with, whoever wrote the card
    weights = packed(model)
    sha256 = hashlib.sha256(weights).hexdigest()
    warning = {"BACKDOORED": True} if card.backdoored else {}
    text = {"format": FORMAT, **warning, **dataclasses.asdict(card), "sha256": sha256}
    write_atomic(folder / "model.safetensors", weights)
    write_atomic(folder / "model.json", json.dumps(text, indent=2) + "\n")
    return sha256


def weights_digest(model: SimCLR | Classifier) -> str:
    """sha256 (hex) of the weights file that save_artifact would write now."""
    return hashlib.sha256(packed(model)).hexdigest()


def packed(model: nn.Module, metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file with the module's state dict; tied weights are there twice."""
    state: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, value in model.state_dict().items():
        tensor = value.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        state[key] = tensor.clone() if place in taken else tensor  # tied weights, which safetensors refuses
        taken.add(place)
    return safetensors.torch.save(state, metadata)


def load_simclr(folder: str | Path, has_weights: bool = True) -> tuple[SimCLR, ModelCard]:
    """As load_artifact; UserError for a classifier too."""
    model, card = load_artifact(folder, has_weights)
    if not isinstance(model, SimCLR):
        raise UserError(
            f"{folder} holds a classifier ({card.arch}), not an encoder: point at an encoder's model folder"
        )
    return model, card


def load_classifier(folder: str | Path, has_weights: bool = True) -> tuple[Classifier, ModelCard]:
    """As load_artifact; UserError for an encoder too."""
    model, card = load_artifact(folder, has_weights)
    if not isinstance(model, Classifier):
        raise UserError(
            f"{folder} holds an encoder ({card.arch}), not a classifier: point at a classifier's model folder, "
            "or measure the encoder with a run of method 'probe'"
        )
    return model, card


def load_artifact(folder: str | Path, has_weights: bool = True) -> tuple[SimCLR | Classifier, ModelCard]:
    """The model (on the CPU, in train mode) and its card. UserError for files that are missing, altered or misfit.

    Without has_weights they are fresh ones, and their file is not read.
    """
    folder = Path(folder)
    if os.path.isfile(folder):  # unlike Path's, False for a name that is too long
        raise UserError(f"{folder} is a file, not a model folder: turn a checkpoint into one with `dist-defend import`")
    card, sha256 = _read_card(folder / "model.json")
    path = folder / "model.safetensors"
    state = _read_weights(path, sha256) if has_weights else None
    if state is not None:
        _check_fit(card, state, path)
    model = _built(card, folder)
    if state is not None:
        load_strict(model, state, path)
    return model, card


def read_card(folder: str | Path) -> ModelCard:
    """The card in a model folder. UserError if it is missing or altered."""
    return _read_card(Path(folder) / "model.json")[0]


def _build(card: ModelCard) -> SimCLR | Classifier:
    if card.kind == "classifier":
        assert card.num_classes is not None  # _read_card has seen to it
        return build_classifier(card.arch, card.num_classes, card.normalization, card.image_size, card.resize)
    has_projector = card.kind == "simclr"
    return build_simclr(card.arch, card.normalization, card.image_size, has_projector, card.resize)


def _built(card: ModelCard, folder: Path) -> SimCLR | Classifier:
    """The model that the card describes. UserError for one that cannot be: sizes that its architecture has not."""
    try:
        return _build(card)
    except UserError as error:
        raise UserError(f"{folder / 'model.json'}: {error}") from error
    except Exception as error:  # of timm, torchvision, open_clip: assertions and arithmetic of any kind
        told = printable(" ".join(f"{type(error).__name__}: {error}".split()), 200)
        size = card.resize or card.image_size
        raise UserError(
            f"{folder / 'model.json'}: no {card.arch} for images of {size} px can be built ({told}): restore it"
        ) from error


def _check_fit(card: ModelCard, state: dict[str, Tensor], path: Path) -> None:
    """UserError for weights that do not fit the card's model, found without allocating it.

    A card of a few bytes can ask for a million classes, or name the largest network that there is.
    """
    try:
        with torch.device("meta"):
            own = _build(card).state_dict()
    except Exception:  # some networks read their own tensors while they are built: the real one is compared
        return
    check_fit(own, state, path)


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    try:
        with open_regular(path) as file:
            weights = file.read()
    except FileNotFoundError:
        raise _missing(path) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): restore it") from error
    if looks_pickled(weights):
        raise UserError(f"{path} is a pickle, not safetensors, and is not read: convert it with `dist-defend import`")
    found = hashlib.sha256(weights).hexdigest()
    if found != sha256:
        raise UserError(f"{path} was altered: sha256 {found[:12]} is not model.json's {sha256[:12]}: restore both")
    try:
        return safetensors.torch.load(weights)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        told = printable(error, 200)
        raise UserError(f"{path} is not a safetensors file ({told}): restore it") from error


def load_strict(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load a state dict that must fit exactly. UserError with the first offending keys and their counts."""
    check_fit(model.state_dict(), state, path)
    model.load_state_dict(state)


def check_fit(own: dict[str, Tensor], state: dict[str, Tensor], path: str | Path) -> None:
    """UserError unless names, shapes and kinds of numbers are those of a model's ``own`` state dict."""
    both = [key for key in own if key in state]
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": sorted(key for key in state if key not in own),
        "misshapen": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in both
            if state[key].shape != own[key].shape
        ],
        "of another type": [
            f"{key} {state[key].dtype} instead of {own[key].dtype}"
            for key in both
            if state[key].is_floating_point() != own[key].is_floating_point() or state[key].is_complex()
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in problems.items() if keys)
        raise UserError(f"{path} does not fit the model: {told}: use the architecture (arch) it was made with")


def looks_pickled(head: bytes) -> bool:
    """Whether a file starts like something torch.save or pickle wrote (zip archive or pickle protocol 2 and later)."""
    return head[:2] == b"PK" or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def _first(keys: list[str], most: int = 3) -> str:
    return ", ".join(printable(key, 120) for key in keys[:most]) + (", ..." if len(keys) > most else "")


def _missing(path: Path) -> UserError:
    return UserError(f"{path} does not exist: point at a folder that holds model.json and model.safetensors")


def _read_card(path: Path) -> tuple[ModelCard, str]:
    try:
        text = read_json(path, "restore it", most_bytes=_MOST_BYTES)
    except FileNotFoundError:
        raise _missing(path) from None
    version = text.pop("format", None) if isinstance(text, dict) else None
    if version not in (1, FORMAT) or isinstance(version, bool):
        raise UserError(f"{path} is not a model card of format {FORMAT}: it was written by another program or version")
    if version == 1:
        upgrade_card(text, path)
    sha256 = text.pop("sha256", "")
    told_backdoored = text.pop("BACKDOORED", False)
    is_counted = isinstance(text.get("num_classes"), int) == (text.get("kind") == "classifier")
    if told_backdoored is not text.get("backdoored", False) or text.get("kind") not in KINDS or not is_counted:
        raise UserError(f"{path} contradicts itself (keys BACKDOORED, backdoored, kind, num_classes): restore it")
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise UserError(f"{path}: key 'sha256' is no sha256 in hex (64 digits): restore it")
    if not _is_shallow(text, _MOST_DEPTH):
        raise UserError(f"{path} is nested deeper than {_MOST_DEPTH} levels, which no model card is: restore it")
    return build(ModelCard, text, path, "restore it; a later version may have written it"), sha256


def upgrade_card(text: dict[str, Any], path: Path) -> None:
    """What format 1 said as ``trigger`` becomes ``attack``. UserError for a trigger that format 1 never wrote."""
    trigger = text.pop("trigger", None)
    if "attack" in text:
        raise UserError(f"{path} says format 1 and has the key 'attack', which came with format {FORMAT}: restore it")
    if isinstance(trigger, dict) and text.get("kind") != "classifier":
        classes, known = trigger.get("target_class"), {"file", "size", "margin", "target_class"}
        if not isinstance(classes, list) or not classes or not trigger.keys() <= known:
            raise UserError(f"{path}: key 'trigger' is no encoder's of format 1 (file, size, margin, target_class)")
        file, square = trigger.get("file"), {key: trigger[key] for key in ("size", "margin") if key in trigger}
        own = {"name": "file", "file": file} if file else {"name": "badnets", "size": 10, "margin": 1, **square}
        trigger = {"trigger": own, "target_class": classes[0], "rate": 1.0}
    text["attack"] = trigger


def _is_shallow(content: Any, depth: int) -> bool:
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return depth > 0 and all(_is_shallow(item, depth - 1) for item in inner)
