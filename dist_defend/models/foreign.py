"""Encoders in checkpoints of others.

Known layouts: the SimCLR models of jinyuan-jia/BadEncoder and wssun/MIMIC, their ImageNet ResNet-50 (torchvision's
keys) and CLIP's image tower, alone or in a whole CLIP; each bare or inside {"state_dict": ...}, with or without the
prefixes `module.` and `visual.`. The layout is read off the keys, never off the file's name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_defend.errors import UserError
from dist_defend.models.artifact import load_strict
from dist_defend.models.clip import published_image_size
from dist_defend.models.encoder import OPEN_CLIP, SimCLR, TimmEncoder, build_simclr
from dist_defend.models.foreign_file import State, read_checkpoint, unwrap


@dataclass(frozen=True)
class ImportReport:
    """What was recognised. `dropped` names tensors that the encoder does not use (a classifier, a text tower)."""

    layout: str
    arch: str
    normalization: str
    image_size: int
    has_projector: bool
    num_tensors: int
    num_parameters: int
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class _Layout:
    name: str
    archs: tuple[str, ...]  # what it may hold
    normalization: str
    image_size: int


_SIMCLR = _Layout("SimCLR", ("resnet18_cifar", "resnet34_cifar", "resnet50_cifar", "small_cifar"), "cifar10", 32)
_IMAGENET = _Layout("ImageNet", ("timm:resnet50", "timm:resnet34", "timm:resnet18"), "none", 224)
_CLIP = _Layout("CLIP image tower", ("clip_resnet50",), "clip", 224)


def import_encoder(
    path: str | Path,
    arch: str | None = None,
    normalization: str | None = None,
    image_size: int | None = None,
    content: Any = None,
) -> tuple[SimCLR, ImportReport]:
    """The model in a .pth or .safetensors file (on the CPU, in train mode), and what was recognised.

    content: what read_checkpoint gave for the file, where the caller has read it already.

    arch is otherwise read off the keys; normalization and image_size (pixels) default to the layout's: cifar10 and 32
    for SimCLR, none and 224 for ImageNet, clip and 224 (open_clip's size for the arch) for CLIP. A file without
    projector gives an identity for it.
    UserError for a missing or damaged file, a pickle of more than plain tensors, and keys that do not fit.
    """
    state, wrappings, dropped = _unwrap(read_checkpoint(path) if content is None else content, path)
    layout = _layout_of(state, arch, path)
    if layout is _SIMCLR and "f.f.0.weight" not in state and "f.0.weight" in state:  # an encoder saved by itself
        state = {f"f.{key}": value for key, value in state.items()}
    has_projector = layout is _SIMCLR and any(key.startswith("g.") for key in state)
    normalization, image_size = normalization or layout.normalization, image_size or _image_size(layout, arch)
    if arch is None:
        arch = _closest(layout, state, has_projector)
    model = build_simclr(arch, normalization, image_size, has_projector)
    if layout is not _SIMCLR:
        state, unused = _to_ours(state, model)
        dropped += unused
    load_strict(model, state, path)
    told = ", ".join([layout.name, *wrappings])
    count = sum(parameter.numel() for parameter in model.parameters())
    return model, ImportReport(told, arch, normalization, image_size, has_projector, len(state), count, tuple(dropped))


def _unwrap(content: Any, path: str | Path) -> tuple[State, list[str], list[str]]:
    """The state dict without wrapper and prefixes; what was taken off; keys left out."""
    state, wrappings = unwrap(content, path, ("state_dict", "model"))
    dropped: list[str] = []
    if any(key.startswith("visual.") for key in state):
        dropped = [key for key in state if not key.startswith("visual.")]
        state = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
        wrappings.append("prefix 'visual.'")
    return state, wrappings, dropped


def _layout_of(state: State, arch: str | None, path: str | Path) -> _Layout:
    if "f.f.0.weight" in state or "f.0.weight" in state:
        return _SIMCLR
    if "attnpool.positional_embedding" in state or (arch or "").startswith(OPEN_CLIP):
        return _CLIP
    if "class_embedding" in state and "ln_pre.weight" in state:
        raise UserError(f"{path} holds a ViT of CLIP: name it, --arch {OPEN_CLIP}ViT-B-32-quickgelu or its like")
    if "layer1.0.conv1.weight" in state or (arch or "").startswith("timm:"):
        return _IMAGENET
    keys = ", ".join(list(state)[:3])
    raise UserError(f"{path} has a layout that is not known (keys {keys}, ...): for a timm model, name it as timm:NAME")


def _closest(layout: _Layout, state: State, has_projector: bool) -> str:
    """The architecture whose tensors agree best with the file's, by key and shape."""

    prefix = "" if layout is _SIMCLR else "f.f."
    found = {(prefix + key, value.shape) for key, value in state.items()}

    def misfits(arch: str) -> int:
        with torch.device("meta"):
            own = build_simclr(arch, "none", layout.image_size, has_projector).state_dict()
        return len(found ^ {(key, value.shape) for key, value in own.items()})

    return layout.archs[0] if len(layout.archs) == 1 else min(layout.archs, key=misfits)


def _image_size(layout: _Layout, arch: str | None) -> int:
    return published_image_size(arch) if arch and arch.startswith(OPEN_CLIP) else layout.image_size


def _to_ours(state: State, model: SimCLR) -> tuple[State, list[str]]:
    """Rename to the encoder's keys; also the keys of a classifier, which is left out."""
    if isinstance(model.f, TimmEncoder) and model.arch == "clip_resnet50":
        from timm.models.byobnet import checkpoint_filter_fn

        state = checkpoint_filter_fn({f"visual.{key}": value for key, value in state.items()}, model.f.f)
    own = model.state_dict()
    classifier = [key for key in state if key.split(".")[0] in ("fc", "head", "classifier") and f"f.f.{key}" not in own]
    return {f"f.f.{key}": value for key, value in state.items() if key not in classifier}, classifier
