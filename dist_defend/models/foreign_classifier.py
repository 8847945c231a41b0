"""Classifiers in checkpoints of others.

Known layouts: YiZeng623/I-BAU's {net, acc, epoch}; bboylyg/RNP's {epoch, state_dict, clean_acc, bad_acc, optimizer};
SCLBD/BackdoorBench's attack_result.pt and defense_result.pt; a state dict of this package's, torchvision's or timm's
networks, bare or inside {"state_dict": ...}. Tensors are matched by name; by order only where the user asks for it.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_defend.errors import UserError
from dist_defend.models.artifact import load_strict
from dist_defend.models.classifier import ARCHITECTURES, Classifier, build_classifier
from dist_defend.models.foreign_file import State, read_checkpoint, unwrap
from dist_defend.models.restricted_pickle import shown

_WRAPPERS = ("state_dict", "net", "model")
_TORCHVISION = ("resnet18", "resnet34", "resnet50", "vgg19_bn", "mobilenet_v2", "convnext_tiny", "efficientnet_b3")
_CANDIDATES = (
    *(arch for arch in ARCHITECTURES if ":" not in arch),
    *(f"torchvision:{name}" for name in _TORCHVISION),
)
BACKDOORBENCH_ARCHS = {"preactresnet18": "preact_resnet18"}  # its other networks are torchvision's, by their names
BACKDOORBENCH_DATA = {  # normalization, image size (pixels), classes
    "cifar10": ("cifar10_backdoorbench", 32, 10),
    "cifar100": ("cifar100", 32, 100),
    "gtsrb": ("none", 32, 43),
    "celeba": ("none", 64, 8),
    "tiny": ("tiny", 64, 200),
    "imagenet": ("imagenet", 224, 1000),
}


@dataclass(frozen=True)
class ClassifierReport:
    """What was recognised. facts: what the file says besides (JSON). renamed: (file's name, ours) of tensors matched by
    order. filled: counters of batches that files from before torch 0.4.1 lack; they start at 0.
    """

    layout: str
    arch: str
    num_classes: int
    normalization: str
    image_size: int
    num_tensors: int
    num_parameters: int
    facts: dict[str, Any]
    renamed: tuple[tuple[str, str], ...]
    filled: tuple[str, ...]


def holds_classifier(content: Any) -> bool:
    """Whether a checkpoint is a classifier's rather than an encoder's (models.foreign): it ends in a linear layer.

    BadEncoder's files are encoders' also where a classifier is left in: keys with 'visual.', or an ImageNet ResNet
    inside of {"state_dict": ...} and nothing else.
    """
    if _layout_of(content) != "state dict":
        return True
    state = content
    for wrapper in _WRAPPERS:
        state = state[wrapper] if isinstance(state, dict) and isinstance(state.get(wrapper), dict) else state
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        return False
    names = {key.removeprefix("module.") for key in state}
    if any(name.startswith(("visual.", "f.f.", "f.0.", "attnpool.")) for name in names):
        return False
    is_badencoders = set(content) == {"state_dict"} and "fc.weight" in names
    return not is_badencoders and _head(state) is not None


def import_classifier(
    path: str | Path,
    arch: str | None = None,
    normalization: str | None = None,
    image_size: int | None = None,
    by_position: bool = False,
    content: Any = None,
) -> tuple[Classifier, ClassifierReport]:
    """The classifier in a checkpoint (on the CPU, in train mode), and what was recognised.

    arch is otherwise read off names and shapes, normalization and image_size (pixels) off the layout and its data set:
    none and 32 for I-BAU, cifar10 and 32 for CIFAR networks, BackdoorBench's own constants, imagenet and 224 for
    torchvision and timm. by_position: where names differ, match tensors in order. content: what read_checkpoint gave,
    where the caller has read the file already. UserError for a damaged file, a wrong type, and tensors that do not fit.
    """
    content = read_checkpoint(path) if content is None else content
    layout = _layout_of(content)
    state, wrappings = unwrap(content, path, _WRAPPERS)
    facts = _facts(content, path)
    head = _head(state)
    if head is None:
        raise UserError(f"{path} has no linear layer to end in, so it is no classifier: import it with --kind encoder")
    num_classes = facts.get("num_classes", head.shape[0])
    if num_classes != head.shape[0] or num_classes < 1:
        raise UserError(
            f"{path} says num_classes {num_classes}, but its last layer has {head.shape[0]}: ask for another"
        )
    if arch is None:
        arch = _closest(state, num_classes, facts.get("model_name"), by_position)
    if layout == "I-BAU" or arch == "ibau_vgg":
        constants: tuple[str, int] = ("none", 32)
    elif "model_name" in facts:
        constants = _backdoorbench_constants(facts, num_classes, normalization, path)
    else:
        constants = ("imagenet", 224) if ":" in arch else ("cifar10", 32)
    normalization, image_size = normalization or constants[0], image_size or constants[1]
    model = build_classifier(arch, num_classes, normalization, image_size)
    state, filled = _with_counters(state, model.net.state_dict())
    renamed: tuple[tuple[str, str], ...] = ()
    if by_position:
        state, renamed = _in_order(state, model.net.state_dict(), path)
    _check_types(state, model.net.state_dict(), path)
    try:
        load_strict(model.net, state, path)
    except UserError as error:
        if by_position or not _same_shapes(state, model.net.state_dict()):
            raise
        raise UserError(f"{error}; or, since shapes agree in order, match them by order with --by-position") from None
    count = sum(parameter.numel() for parameter in model.parameters())
    told = ", ".join([layout, *wrappings])
    return model, ClassifierReport(
        told, arch, num_classes, normalization, image_size, len(state), count, facts, renamed, filled
    )


def _layout_of(content: Any) -> str:
    keys = set(content) if isinstance(content, dict) else set()
    if {"model_name", "num_classes", "model"} <= keys:
        return "BackdoorBench attack_result" if "clean_data" in keys else "BackdoorBench defense_result"
    if {"state_dict", "clean_acc", "bad_acc"} <= keys:
        return "RNP"
    return "I-BAU" if {"net", "acc", "epoch"} <= keys else "state dict"


def _head(state: dict[str, Any]) -> Tensor | None:
    """The weight (num_classes, features) of the last linear layer."""
    weights = [v for k, v in state.items() if k.endswith("weight") and isinstance(v, Tensor) and v.ndim == 2]
    return weights[-1] if weights else None


_FACTS: dict[str, type | tuple[type, ...]] = {
    "epoch": int,
    "acc": (int, float),
    "clean_acc": (int, float),
    "bad_acc": (int, float),
    "model_name": str,
    "num_classes": int,
    "clean_data": str,
    "img_size": (list, tuple),
}


def _facts(content: Any, path: str | Path) -> dict[str, Any]:
    """What the file says besides the tensors. UserError for a wrong type."""
    facts: dict[str, Any] = {}
    for key, kind in _FACTS.items():
        if not isinstance(content, dict) or content.get(key) is None:
            continue
        value = content[key]
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{path}: {key} is a {type(value).__name__}, which is no {key}: ask for another file")
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)  # JSON has none
        facts[key] = shown(value) if isinstance(value, str) else value
    if "img_size" in facts:
        sizes = list(facts["img_size"])
        if (
            len(sizes) != 3
            or not all(type(size) is int and 1 <= size <= 4096 for size in sizes)
            or sizes[0] != sizes[1]
        ):
            raise UserError(f"{path}: img_size is {shown(sizes)}, not [H, H, channels] in pixels: ask for another file")
        facts["img_size"] = sizes
    return facts


def _closest(state: State, num_classes: int, model_name: str | None, by_position: bool) -> str:
    """The architecture whose tensors agree best with the file's, by name and shape (by_position: shape alone)."""
    found = _signature(state, by_position)
    misfits: dict[str, int] = {}
    for arch in _CANDIDATES:
        with torch.device("meta"):
            own = build_classifier(arch, num_classes, "none").net.state_dict()
        misfits[arch] = len(found ^ _signature(own, by_position))
        if not misfits[arch]:
            return arch
    if model_name is not None:
        return BACKDOORBENCH_ARCHS.get(model_name, f"torchvision:{model_name}")
    return min(misfits, key=misfits.__getitem__)


def _signature(state: State, by_position: bool) -> set[tuple[Any, ...]]:
    values = state.items()
    if by_position:
        return {(number, tuple(value.shape)) for number, (_, value) in enumerate(values)}
    return {(key, tuple(value.shape)) for key, value in values if not key.endswith("num_batches_tracked")}


def _backdoorbench_constants(
    facts: dict[str, Any], num_classes: int, normalization: str | None, path: str | Path
) -> tuple[str, int]:
    """Its normalisation and image size, by the data set; a defense_result names none, so by the number of classes."""
    data = facts.get("clean_data")
    if data is None:
        known = [name for name, (_, _, classes) in BACKDOORBENCH_DATA.items() if classes == num_classes]
        data = known[0] if known else None
    if data not in BACKDOORBENCH_DATA and normalization is None:
        raise UserError(f"{path}: no constants are known for {data or f'{num_classes} classes'}: give --normalization")
    constants = BACKDOORBENCH_DATA.get(data or "", (normalization or "none", 32, 0))
    return constants[0], facts["img_size"][0] if "img_size" in facts else constants[1]


def _with_counters(state: State, own: State) -> tuple[State, tuple[str, ...]]:
    counters = [key for key in own if key.endswith("num_batches_tracked")]
    if any(key in state for key in counters) or not all(
        f"{key.rpartition('.')[0]}.weight" in state for key in counters
    ):
        return state, ()
    return {**state, **{key: torch.tensor(0) for key in counters}}, tuple(counters)


def _in_order(state: State, own: State, path: str | Path) -> tuple[State, tuple[tuple[str, str], ...]]:
    if len(state) != len(own):
        raise UserError(f"{path} has {len(state)} tensors and the network {len(own)}, so none can be matched by order")
    pairs = list(zip(state, own, strict=True))
    for theirs, ours in pairs:
        if state[theirs].shape != own[ours].shape:
            shapes = f"{tuple(state[theirs].shape)} and {tuple(own[ours].shape)}"
            raise UserError(f"{path} does not fit by order: {theirs} and {ours} are {shapes}: name another --arch")
    return {ours: state[theirs] for theirs, ours in pairs}, tuple((a, b) for a, b in pairs if a != b)


def _same_shapes(state: State, own: State) -> bool:
    return [value.shape for value in state.values()] == [value.shape for value in own.values()]


def _check_types(state: State, own: State, path: str | Path) -> None:
    for key in own:
        if key in state and state[key].is_floating_point() != own[key].is_floating_point():
            raise UserError(f"{path}: {key} is of type {state[key].dtype}, not {own[key].dtype}: ask for another file")
