"""Encoders in checkpoints of others.

models.finder looks for the networks of models.candidates under every key and prefix: the SimCLR models of
jinyuan-jia/BadEncoder and wssun/MIMIC, leftthomas/SimCLR's, CLIP's image tower, and the backbones that MoCo, BYOL,
DINO, MAE, SimSiam, SwAV, Barlow Twins, lightly and solo-learn save. What stands beside the backbone is left out and
told.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from dist_defend.errors import UserError
from dist_defend.models.candidates import COUNTER, classifier_candidates, encoder_candidates
from dist_defend.models.clip_image import OPEN_CLIP
from dist_defend.models.constants import encoder_constants
from dist_defend.models.encoder import SimCLR, build_simclr
from dist_defend.models.finder import Fit, choose, find_network, is_self_supervised, unknown
from dist_defend.models.foreign_file import State
from dist_defend.models.foreign_folder import read_weights
from dist_defend.models.foreign_report import (
    ImportReport,
    check_memory,
    fill,
    match_by_position,
    plain_facts,
    reported,
)
from dist_defend.models.mappings import ANYWHERE, Choice, Weights, find_weights, list_objects

_NO_CLASSIFIER = "torchvision's networks are classifiers here: name timm's of that name, or leave out --kind encoder"


def import_encoder(
    path: str | Path,
    arch: str | None = None,
    normalization: str | None = None,
    image_size: int | None = None,
    content: Any = None,
    choice: Choice = ANYWHERE,
    by_position: bool = False,
) -> tuple[SimCLR, ImportReport]:
    """The model in a checkpoint or a folder of weights (on the CPU, in train mode), and what was recognised.

    content: what read_weights gave for it, where the caller has read it already. arch is otherwise read off the keys;
    normalization and image_size (pixels) default to models.constants'. A file without BadEncoder's projector gives an
    identity for it. choice: where to look. by_position: match tensors in order, whatever their names. UserError for a
    missing or damaged file, an object where weights should be, tensors that do not fit or are not finite.
    """
    content = read_weights(path)[0] if content is None else content
    if arch is not None and arch.startswith("torchvision:"):
        raise UserError(f"{arch} is no encoder: {_NO_CLASSIFIER}")
    found = find_weights(content, path, choice)
    others: tuple[str, ...] = ()
    candidates = partial(encoder_candidates, arch=arch, image_size=image_size)
    if by_position:
        fit = match_by_position(found, candidates, choice.prefix, path, whole=False)
    else:
        fits = find_network(found, candidates, choice, path)
        exact = [fit for fit in fits if fit.is_exact]
        if not exact:
            if arch is None:
                _refuse_clips_vit(found, path)
                _refuse_classifier(found, path, choice)
            raise unknown(path, found, fits, arch)
        fit, others = choose(exact, path, "encoder")
    _refuse_mocos_small_vit(fit, path)
    is_badencoders = _is_badencoders(fit, content)
    constants = encoder_constants(
        fit.candidate.arch, fit.candidate.image_size, arch is not None, is_self_supervised(fit), is_badencoders
    ).told(normalization, image_size)
    projector = _projector(fit)
    tensors = {**{f"f.f.{key}": value for key, value in fit.tensors().items()}, **projector}
    check_memory(tensors, path)
    model = build_simclr(fit.candidate.arch, constants.normalization, constants.image_size, bool(projector))
    told: dict[str, Any] = {
        "layout": _told(fit, is_badencoders),
        "others": others,
        "objects": tuple(list_objects(content)),
        "facts": plain_facts(content),
        "filled": fill(model, tensors, path),
        "has_projector": bool(projector),
    }
    used = {f"{_root(fit)}{key}" for key in projector}
    return model, reported(fit, model, tensors, constants, by_position, used, **told)


def _refuse_clips_vit(found: list[Weights], path: str | Path) -> None:
    for weights in found:
        names = {key.rpartition("visual.")[2] for key in weights.state}
        if {"class_embedding", "ln_pre.weight"} <= names:
            raise UserError(f"{path} holds a ViT of CLIP: name it, --arch {OPEN_CLIP}ViT-B-32-quickgelu or its like")


def _refuse_mocos_small_vit(fit: Fit, path: str | Path) -> None:
    """Names and shapes do not say the number of heads."""
    is_mocos = any(part in ("base_encoder", "momentum_encoder") for part in fit.prefix.split("."))
    if is_mocos and fit.candidate.arch.startswith("timm:vit_small"):
        raise UserError(
            f"{path} holds MoCo v3's ViT-S, which has 12 heads where {fit.candidate.arch} has 6, so it would compute "
            "something else: it cannot be imported yet"
        )


def _refuse_classifier(found: list[Weights], path: str | Path, choice: Choice) -> None:
    """Say so where a network is known as a classifier alone."""
    fits = find_network(found, lambda state: classifier_candidates(state, None, None), choice, path)
    if fits and fits[0].is_exact:
        arch = fits[0].candidate.arch
        raise UserError(f"{path} holds {arch}, which can be had as a classifier only: leave out --kind encoder")


def _is_badencoders(fit: Fit, content: Any) -> bool:
    """Whether an ImageNet ResNet lies as BadEncoder saves it: below 'visual.', or alone in {"state_dict": ...}."""
    is_alone = isinstance(content, dict) and set(content) == {"state_dict"} and fit.prefix in ("", "module.")
    return fit.candidate.arch.startswith("timm:") and (fit.prefix.endswith("visual.") or is_alone)


def _root(fit: Fit) -> str:
    """What stands before f. and g. of a SimCLR model; the prefix itself where the encoder lies elsewhere."""
    for own in ("f.f.", "f."):
        if fit.prefix == own or fit.prefix.endswith(f".{own}"):
            return fit.prefix.removesuffix(own)
    return fit.prefix


def _projector(fit: Fit) -> State:
    """BadEncoder's projector g., where all of it lies beside f.; our names for it."""
    root = _root(fit)
    if root == fit.prefix:
        return {}
    with torch.device("meta"):
        model = build_simclr(fit.candidate.arch, "none", fit.candidate.image_size)
    own = {key: value for key, value in model.state_dict().items() if key.startswith("g.")}
    state = fit.weights.state
    theirs = {key.removeprefix(root): value for key, value in state.items() if key.startswith(f"{root}g.")}
    fits = theirs.keys() <= own.keys() and all(
        theirs[key].shape == value.shape if key in theirs else key.endswith(COUNTER) for key, value in own.items()
    )
    return theirs if fits else {}


def _told(fit: Fit, is_badencoders: bool) -> str:
    root = _root(fit)
    arch = fit.candidate.arch
    name = "SimCLR" if root != fit.prefix else "ImageNet" if is_badencoders else "backbone"
    name = "CLIP image tower" if arch == "clip_resnet50" or arch.startswith(OPEN_CLIP) else name
    prefix = root if root != fit.prefix else fit.prefix
    return ", ".join([name, *(f"in '{key}'" for key in fit.weights.path), *([f"prefix '{prefix}'"] if prefix else [])])
