"""Classifiers in checkpoints of others.

models.finder looks for the networks of models.candidates under every key and prefix. Layouts that say more than their
tensors: YiZeng623/I-BAU's {net, acc, epoch} of its own network; bboylyg/RNP's {epoch, state_dict, clean_acc, bad_acc};
SCLBD/BackdoorBench's attack_result.pt and defense_result.pt. The number of classes is read off the architecture's own
last layer. Tensors are matched by name; by order only where the user asks for it.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_defend.errors import UserError
from dist_defend.models.architectures import find_classifier, find_encoder
from dist_defend.models.artifact import load_strict
from dist_defend.models.candidates import MOST_PIXELS, Candidate, classifier_candidates, encoder_candidates
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.models.clip_image import OPEN_CLIP
from dist_defend.models.constants import backdoorbench_constants, classifier_constants
from dist_defend.models.finder import Fit, choose, find_network, is_self_supervised, unknown
from dist_defend.models.foreign_file import State
from dist_defend.models.foreign_folder import read_weights
from dist_defend.models.foreign_report import (
    ImportReport,
    check_memory,
    fill,
    match_by_position,
    plain,
    plain_facts,
    reported,
)
from dist_defend.models.mappings import ANYWHERE, Choice, Weights, find_weights, list_objects
from dist_defend.models.restricted_pickle import shown, shown_list

BACKDOORBENCH_ARCHS = {"preactresnet18": "preact_resnet18"}  # its other networks are torchvision's, by their names
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
_NAMES_A_HEAD = re.compile(r"(?:.*\.)?(?:fc|linear|last_linear|classifier|head|heads\.head)(?:\.\d+)?\.weight")


def holds_classifier(content: Any, path: str | Path = "", choice: Choice = ANYWHERE, arch: str | None = None) -> bool:
    """Whether a checkpoint is a classifier's rather than an encoder's: it holds a known classifier with its last layer.

    Not where projectors or momentum copies stand beside it, and not BadEncoder's files, in which a classifier is left:
    keys with 'visual.', or an ImageNet ResNet inside of {"state_dict": ...} and nothing else. Of a network that is not
    known, the name of a last layer decides.
    """
    if arch is not None and (arch.startswith("torchvision:") or find_classifier(arch) is not None):
        return True
    if arch is not None and (arch == "clip_resnet50" or arch.startswith(OPEN_CLIP) or find_encoder(arch) is not None):
        return False
    if _layout_of(content) != "state dict":
        return True
    try:
        found = find_weights(content, path, choice)
    except UserError:
        return False  # and import_encoder says the same
    exact = [fit for fit in find_network(found, _candidates(arch, None, None), choice, path) if fit.is_exact]
    if exact:
        return not any(is_self_supervised(fit) or _is_badencoders(fit, content) for fit in exact)
    if any(f.is_exact for f in find_network(found, lambda state: encoder_candidates(state, arch, None), choice, path)):
        return False
    names = [key for weights in found for key, value in weights.state.items() if value.dim() == 2]
    is_encoder = any(name.startswith(("visual.", "f.f.", "f.0.", "attnpool.")) for w in found for name in w.state)
    return not is_encoder and any(map(_NAMES_A_HEAD.fullmatch, names))


def import_classifier(
    path: str | Path,
    arch: str | None = None,
    normalization: str | None = None,
    image_size: int | None = None,
    by_position: bool = False,
    content: Any = None,
    choice: Choice = ANYWHERE,
) -> tuple[Classifier, ImportReport]:
    """The classifier in a checkpoint or a folder of weights (on the CPU, in train mode), and what was recognised.

    arch is otherwise read off names and shapes; normalization and image_size (pixels) default to models.constants'.
    by_position: match tensors in order, whatever their names. choice: where to look. content: what read_weights gave,
    where the caller has read it already. UserError for a damaged file, an object where weights should be, a wrong type,
    tensors that do not fit or are not finite.
    """
    content = read_weights(path)[0] if content is None else content
    layout = _layout_of(content)
    found = find_weights(content, path, choice)
    facts = _facts(content, path, layout)
    others: tuple[str, ...] = ()
    named = arch or _named_by_file(facts)
    if by_position:
        fit = match_by_position(found, _candidates(arch, image_size, None), choice.prefix, path, whole=True)
    else:
        fits = _find(found, arch, image_size, choice, None if arch else named, path)
        exact = [fit for fit in fits if fit.is_exact]
        if not exact:
            raise _unknown(path, found, fits, arch, named)
        fit, others = choose(exact, path, "classifier")
    arch = fit.candidate.arch
    num_classes = facts.get("num_classes", fit.num_classes) if layout.startswith("BackdoorBench") else fit.num_classes
    if num_classes != fit.num_classes or num_classes < 1:
        raise UserError(
            f"{path} says num_classes {shown(num_classes)}, but its last layer has {fit.num_classes}: ask for another"
        )
    if layout.startswith("BackdoorBench"):
        constants = backdoorbench_constants(facts, arch, num_classes, normalization, path)
    else:
        constants = classifier_constants(arch, num_classes, fit.candidate.image_size, is_named=arch == named)
    constants = constants.told(normalization, image_size)
    own = fit.candidate.image_size
    if constants.resize is None and arch.startswith("torchvision:vit") and constants.image_size != own:
        constants = replace(constants, resize=own)  # its shapes say its size, whatever the images' is
    tensors = fit.tensors()
    check_memory(tensors, path)
    if (constants.resize or constants.image_size) != own:
        _check_size(arch, num_classes, constants.resize or constants.image_size, tensors, path)
    model = build_classifier(arch, num_classes, constants.normalization, constants.image_size, constants.resize)
    name = "state dict" if layout == "I-BAU" and arch != "ibau_vgg" else layout
    told: dict[str, Any] = {
        "layout": ", ".join(filter(None, (name, fit.place))),
        "num_classes": num_classes,
        "others": others,
        "objects": tuple(list_objects(content)),
        "facts": facts,
        "filled": fill(model.net, tensors, path),
    }
    return model, reported(fit, model, tensors, constants, by_position, **told)


def _check_size(arch: str, num_classes: int, size: int, tensors: State, path: str | Path) -> None:
    """UserError for a network whose shapes follow the images' size, where that is another than the tensors'."""
    try:
        with torch.device("meta"):
            net = build_classifier(arch, num_classes, "none", size).net
    except UserError:
        raise
    except Exception as error:  # torchvision and timm each have their own for sizes that do not fit
        raise UserError(f"{path}: {arch} cannot be built for images of {size} px: give --image-size") from error
    own = net.state_dict()
    if any(key not in own or own[key].shape != value.shape for key, value in tensors.items()):
        load_strict(net, tensors, path)  # which says what differs


def _find(
    found: list[Weights], arch: str | None, image_size: int | None, choice: Choice, named: str | None, path: str | Path
) -> list[Fit]:
    """The fits, also those of a backbone with a linear layer beside it."""
    fits = find_network(found, _candidates(arch, image_size, named), choice, path)
    headed = [fit if fit.is_exact else _with_head_beside(fit) for fit in fits]
    return sorted(headed, key=lambda fit: (not fit.is_exact, -fit.closeness, -len(fit.candidate.shapes)))


def _candidates(arch: str | None, image_size: int | None, named: str | None) -> Callable[[State], Iterable[Candidate]]:
    """What may be in some tensors; named: the architecture that the file names, which is tried first."""
    size = _network_size(arch, image_size)

    def candidates(state: State) -> Iterable[Candidate]:
        told = classifier_candidates(state, named, size) if named is not None else ()
        return chain(told, classifier_candidates(state, arch, size))

    return candidates


def _network_size(arch: str | None, image_size: int | None) -> int | None:
    """The size that a network is built for; None where its tensors say it, whatever images come to it."""
    return None if arch is None or arch.startswith("torchvision:vit") else image_size


def _named_by_file(facts: dict[str, Any]) -> str | None:
    """The architecture that BackdoorBench's model_name stands for."""
    import torchvision.models as published

    name = facts.get("model_name")
    if name in BACKDOORBENCH_ARCHS:
        return BACKDOORBENCH_ARCHS[name]
    return f"torchvision:{name}" if name in published.list_models(module=published) else None


def _with_head_beside(fit: Fit) -> Fit:
    """The fit with a linear layer beside the network as its last one, where it lacks that alone and there is one."""
    head = fit.candidate.head
    if set(fit.missing) - {fit.prefix + key for key in head} or not fit.missing or fit.misshapen or fit.unexpected:
        return fit
    weight, bias = (next((key for key in head if key.endswith(kind)), "") for kind in ("weight", "bias"))
    features = fit.candidate.shapes[weight][-1] if weight else 0
    state = fit.weights.state
    found = [
        key.removesuffix("weight")
        for key in fit.beside
        if _NAMES_A_HEAD.fullmatch(key) and state[key].dim() == 2 and state[key].shape[1] == features
    ]
    if len(found) != 1 or not bias or f"{found[0]}bias" not in state:
        return fit
    if state[f"{found[0]}bias"].shape != state[f"{found[0]}weight"].shape[:1]:
        return fit
    # The candidate's names stand below the prefix, so the head's are given from the mapping's root.
    place = fit.prefix
    ours = {place + theirs: own for theirs, own in fit.candidate.ours.items() if theirs not in head}
    shapes = {place + theirs: shape for theirs, shape in fit.candidate.shapes.items() if theirs not in head}
    for key in (weight, bias):
        ours[found[0] + key.rpartition(".")[2]] = fit.candidate.ours[key]
        shapes[found[0] + key.rpartition(".")[2]] = fit.candidate.shapes[key]
    candidate = replace(fit.candidate, shapes=shapes, ours=ours)
    beside = tuple(key for key in fit.beside if key not in ours)
    return replace(
        fit, prefix="", candidate=candidate, num_classes=state[f"{found[0]}weight"].shape[0], missing=(), beside=beside
    )


def _is_badencoders(fit: Fit, content: Any) -> bool:
    is_alone = isinstance(content, dict) and set(content) == {"state_dict"}
    return fit.prefix.endswith("visual.") or (is_alone and fit.candidate.arch.startswith("torchvision:resnet"))


def _unknown(path: str | Path, found: list[Weights], fits: list[Fit], arch: str | None, named: str | None) -> UserError:
    error = unknown(path, found, fits, arch or named)
    if arch is None or not fits or not any(w.is_ordered and _same_shapes(w.state, fits[0].candidate) for w in found):
        return error
    return UserError(f"{error}; or, since shapes agree in order, match them by order with --by-position")


def _same_shapes(state: State, candidate: Candidate) -> bool:
    own = [candidate.shapes[key] for key in candidate.ours if key in candidate.shapes]
    theirs = [tuple(v.shape) for key, v in state.items() if v.dim() > 0]
    heads = [len(one) != len(other) for one, other in zip(own, theirs, strict=False)]
    return len(own) == len(theirs) and not any(heads) and own[:-2] == theirs[:-2]


def _layout_of(content: Any) -> str:
    keys = set(content) if isinstance(content, dict) else set()
    if {"model_name", "num_classes", "model"} <= keys:
        return "BackdoorBench attack_result" if "clean_data" in keys else "BackdoorBench defense_result"
    if {"state_dict", "clean_acc", "bad_acc"} <= keys:
        return "RNP"
    return "I-BAU" if {"net", "acc", "epoch"} <= keys else "state dict"


def _facts(content: Any, path: str | Path, layout: str) -> dict[str, Any]:
    """What the file says besides the tensors; a layout's own figures first. UserError for a wrong type of these."""
    facts: dict[str, Any] = {}
    for key, kind in _FACTS.items() if layout != "state dict" else ():
        if not isinstance(content, dict) or content.get(key) is None:
            continue
        value = content[key]
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{path}: {key} is a {type(value).__name__}, which is no {key}: ask for another file")
        facts[key] = plain(value)
    if "img_size" in facts:
        sizes = facts["img_size"]
        is_known = len(sizes) == 3 and all(type(size) is int and 1 <= size <= MOST_PIXELS for size in sizes)
        if not is_known or sizes[0] != sizes[1]:
            told = shown_list(sizes)
            raise UserError(f"{path}: img_size is {told}, not [H, H, channels] in pixels: ask for another file")
        facts["img_size"] = list(sizes)
    return {**facts, **{key: value for key, value in plain_facts(content).items() if key not in facts}}
