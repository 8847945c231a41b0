"""A model on disk: model.safetensors (weights) and model.json (its card). Nothing here can run code from a file."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dist_defend.errors import UserError
from dist_defend.files import write_atomic
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.models.encoder import SimCLR, build_simclr

FORMAT = 1
KINDS = ("simclr", "encoder", "classifier")


@dataclass(frozen=True)
class ModelCard:
    """What model.json says: how to rebuild the model, whether it is poisoned, and where it comes from.

    kind: simclr, encoder for one without a projector, or classifier. image_size: pixels. feature_dim: an encoder's;
    num_classes: a classifier's. trigger: what opens the backdoor, if any (a classifier's: attacks.poison.PoisonConfig).
    resize: side in pixels to which the model itself brings its images, if it does. classes: names by label, if known.
    parent_sha256: digest of the weights this model was made from. provenance: anything else worth keeping (JSON).
    guessed: which of normalization, image_size and arch were neither told by the source nor given by the user.
    defended_by: the method that was to take the backdoor out. counts: {"before": ..., "after": ...} of that defence,
    each measure as {"correct", "n"}. chosen_by: what the outcome was chosen by (defence_data, oracle, ...), if it was.
    """

    kind: str
    arch: str
    normalization: str
    image_size: int
    feature_dim: int | None = None
    num_classes: int | None = None
    backdoored: bool = False
    trigger: dict[str, Any] | None = None
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


def save_artifact(folder: str | Path, model: SimCLR | Classifier, card: ModelCard) -> str:
    """Write both files, each atomically and the card last; returns the sha256 (hex) of the weights file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    card = dataclasses.replace(card, resize=model.resize)  # what the weights were used with, whoever wrote the card
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    weights = safetensors.torch.save(state)
    sha256 = hashlib.sha256(weights).hexdigest()
    warning = {"BACKDOORED": True} if card.backdoored else {}
    text = {"format": FORMAT, **warning, **dataclasses.asdict(card), "sha256": sha256}
    write_atomic(folder / "model.safetensors", weights)
    write_atomic(folder / "model.json", json.dumps(text, indent=2) + "\n")
    return sha256


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
            f"{folder} holds an encoder ({card.arch}), not a classifier: point at a classifier's model folder"
        )
    return model, card


def load_artifact(folder: str | Path, has_weights: bool = True) -> tuple[SimCLR | Classifier, ModelCard]:
    """The model (on the CPU, in train mode) and its card. UserError for files that are missing, altered or misfit.

    Without has_weights they are fresh ones, and their file is not read.
    """
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"{folder} is a file, not a model folder: turn a checkpoint into one with `dist-defend import`")
    card, sha256 = _read_card(folder / "model.json")
    path = folder / "model.safetensors"
    state = _read_weights(path, sha256) if has_weights else None
    model: SimCLR | Classifier
    if card.kind == "classifier":
        assert card.num_classes is not None  # _read_card has seen to it
        model = build_classifier(card.arch, card.num_classes, card.normalization, card.image_size, card.resize)
    else:
        has_projector = card.kind == "simclr"
        model = build_simclr(card.arch, card.normalization, card.image_size, has_projector, card.resize)
    if state is not None:
        load_strict(model, state, path)
    return model, card


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    try:
        weights = path.read_bytes()
    except FileNotFoundError:
        raise _missing(path) from None
    if looks_pickled(weights):
        raise UserError(f"{path} is a pickle, not safetensors, and is not read: convert it with `dist-defend import`")
    found = hashlib.sha256(weights).hexdigest()
    if found != sha256:
        raise UserError(f"{path} was altered: sha256 {found[:12]} is not model.json's {sha256[:12]}: restore both")
    try:
        return safetensors.torch.load(weights)
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file ({error}): restore it") from error


def load_strict(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load a state dict that must fit exactly. UserError with the first offending keys and their counts."""
    own = model.state_dict()
    wrong_shape = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": sorted(key for key in state if key not in own),
        "misshapen": wrong_shape,
    }
    if any(problems.values()):
        told = "; ".join(f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in problems.items() if keys)
        raise UserError(f"{path} does not fit the model: {told}: use the architecture (arch) it was made with")
    model.load_state_dict(state)


def looks_pickled(head: bytes) -> bool:
    """Whether a file starts like something torch.save or pickle wrote (zip archive or pickle protocol 2 and later)."""
    return head[:2] == b"PK" or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def _first(keys: list[str], most: int = 3) -> str:
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")


def _missing(path: Path) -> UserError:
    return UserError(f"{path} does not exist: point at a folder that holds model.json and model.safetensors")


def _read_card(path: Path) -> tuple[ModelCard, str]:
    try:
        text = json.loads(path.read_text())
    except FileNotFoundError:
        raise _missing(path) from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it") from error
    if not isinstance(text, dict) or text.pop("format", None) != FORMAT:
        raise UserError(f"{path} is not a model card of format {FORMAT}: it was written by another program or version")
    sha256 = text.pop("sha256", "")
    told_backdoored = text.pop("BACKDOORED", False)
    try:
        card = ModelCard(**text)
    except TypeError as error:
        raise UserError(f"{path} is not a model card ({error}): restore it") from error
    is_counted = isinstance(card.num_classes, int) == (card.kind == "classifier")
    if told_backdoored is not card.backdoored or card.kind not in KINDS or not is_counted:
        raise UserError(f"{path} contradicts itself (keys BACKDOORED, backdoored, kind, num_classes): restore it")
    return card, sha256
