"""The networks that a checkpoint may hold, with the names that their tensors go by in others' files.

A candidate is built on the meta device, with a number of classes that no other dimension has, so that its last
layer can be told. The networks of models.architectures are all tried; torchvision's and timm's by their families.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

import torch
from torch import Tensor

from dist_defend.errors import UserError
from dist_defend.models.architectures import CLASSIFIERS, ENCODERS, PUBLISHED, find_classifier, find_encoder
from dist_defend.models.classifier import build_classifier
from dist_defend.models.clip_image import OPEN_CLIP, published_image_size
from dist_defend.models.encoder import build_encoder

Shape = tuple[int, ...]
CLASSES = 100_003  # stands for the number of classes in a shape
COUNTER = "num_batches_tracked"  # not in files from before torch 0.4.1
_NAMED = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
_NUMBERED = tuple(("0", "1", *(str(first + stage) for stage in range(4))) for first in (2, 3, 4))
_SHORTCUTS = ("downsample", "shortcut")
_SHORTCUT = re.compile(rf"(\d+\.)(?:{'|'.join(_SHORTCUTS)})\.")
MOST_PIXELS = 4096  # of an image's side
_HEADS = ("fc", "linear", "classifier")
_CLIP, _CLIP_POOL, _CLIP_STRIDE = "clip_resnet50", "attnpool.positional_embedding", 32
_CLIP_NAMES = tuple(  # CLIP's own for timm's
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^stem\.conv(\d)\.conv\.", r"conv\1."),
        (r"^stem\.conv(\d)\.bn\.", r"bn\1."),
        (r"^stages\.0\.", "layer1."),
        (r"^stages\.1\.", "layer2."),
        (r"^stages\.2\.", "layer3."),
        (r"^stages\.3\.", "layer4."),
        (r"\.conv(\d)_\dx\d\.conv\.", r".conv\1."),
        (r"\.conv(\d)_\dx\d\.bn\.", r".bn\1."),
        (r"\.conv2_kxk\.(conv|bn)\.", r".\g<1>2."),
        (r"\.shortcut\.conv\.conv\.", ".downsample.0."),
        (r"\.shortcut\.conv\.bn\.", ".downsample.1."),
        (r"^head\.pos_embed$", _CLIP_POOL),
        (r"^head\.([qkv])\.", r"attnpool.\1_proj."),
        (r"^head\.proj\.", "attnpool.c_proj."),
    )
)
_LARGE_STEMS = ("resnet", "resnext", "wide_resnet")
_TORCHVISION_FAMILIES = {  # a tensor that all of a family have, and how its names begin
    "layer1.0.conv1.weight": _LARGE_STEMS,
    "features.denseblock1.denselayer1.norm1.weight": ("densenet",),
    "features.1.conv.0.0.weight": ("mobilenet_v2",),
    "features.1.block.0.0.weight": ("mobilenet_v3",),
    "features.1.0.block.0.0.weight": ("efficientnet",),
    "features.1.0.layer_scale": ("convnext",),
    "features.1.0.attn.qkv.weight": ("swin",),
    "features.3.squeeze.weight": ("squeezenet",),
    "features.0.weight": ("vgg", "alexnet"),
    "encoder.pos_embedding": ("vit",),
    "Conv2d_1a_3x3.conv.weight": ("inception_v3",),
    "inception3a.branch1.conv.weight": ("googlenet",),
    "stage2.0.branch1.0.weight": ("shufflenet",),
    "layers.8.0.layers.0.weight": ("mnasnet",),
    "trunk_output.block1.block1-0.proj.weight": ("regnet",),
    "trunk_output.block1.block1-0.proj.0.weight": ("regnet",),
}
_TIMM_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "resnext50_32x4d")
_VIT_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large"}


@dataclass(frozen=True)
class Candidate:
    """shapes: of every tensor but counters, by the file's name for it; ours: our name by the file's, counters too."""

    arch: str
    image_size: int
    shapes: Mapping[str, Shape]
    ours: Mapping[str, str]

    @property
    def head(self) -> tuple[str, ...]:
        """The file's names of the tensors that the number of classes shapes."""
        return tuple(key for key, shape in self.shapes.items() if CLASSES in shape)


def classifier_candidates(state: Mapping[str, Tensor], arch: str | None, image_size: int | None) -> Iterator[Candidate]:
    """Classifiers that may be in the tensors, or the one asked for in each spelling; image_size in pixels."""
    for name in _classifier_names(state) if arch is None else [arch]:
        size = _token_size(state, ".pos_embedding", "conv_proj.weight") if name.startswith("torchvision:vit") else None
        size = size or _token_size(state, "pos_embed", "patch_embed.proj.weight") if name.startswith("timm:") else size
        found = find_classifier(name)
        size = image_size or size or (found.image_size if found else 224 if name.startswith(PUBLISHED) else 32)
        yield from _built(name, size, False, arch is not None, image_size is not None)


def _classifier_names(state: Mapping[str, Tensor]) -> Iterator[str]:
    yield from CLASSIFIERS
    yield from _torchvision_names(state)  # which are looked up only where none of ours fits


def encoder_candidates(state: Mapping[str, Tensor], arch: str | None, image_size: int | None) -> Iterator[Candidate]:
    """As classifier_candidates, for encoders."""
    for name in [*ENCODERS, *_timm_names(state)] if arch is None else [arch]:
        size = _token_size(state, "pos_embed", "patch_embed.proj.weight") if name.startswith("timm:") else None
        size = image_size or size or (_clip_size(state) if name == _CLIP else None) or published_size(name)
        yield from _built(name, size, True, arch is not None, image_size is not None)


def published_size(arch: str) -> int:
    """Pixels that an encoder's architecture was made for."""
    if arch.startswith(OPEN_CLIP):
        return published_image_size(arch)
    if arch.startswith("timm:"):
        import timm

        published = timm.models.get_pretrained_cfg(arch.removeprefix("timm:"))
        return int(published.input_size[-1]) if published is not None else 224
    found = find_encoder(arch)
    return 224 if found is None else found.image_size


def _built(arch: str, size: int, is_encoder: bool, is_named: bool, is_sized: bool) -> tuple[Candidate, ...]:
    """None where a guess at the size, off a file's shapes, is one that the architecture cannot have.

    is_named, is_sized: whether the user gave the architecture, and the size.
    """
    try:
        return _spelled(arch, size, is_encoder)
    except UserError:
        if is_named:
            raise
    except Exception as error:  # torch, timm, torchvision and open_clip each have their own for sizes that do not fit
        if is_named and is_sized:
            raise UserError(
                f"{arch} cannot be built for images of {size} px ({type(error).__name__}): give another --image-size"
            ) from error
    return ()


@lru_cache(maxsize=128)
def _spelled(arch: str, size: int, is_encoder: bool) -> tuple[Candidate, ...]:
    with torch.device("meta"):
        net = build_encoder(arch, "none", size) if is_encoder else build_classifier(arch, CLASSES, "none", size).net
    own = {key.removeprefix("f.") if is_encoder else key: tuple(v.shape) for key, v in net.state_dict().items()}
    found: dict[frozenset[str], Candidate] = {}
    for theirs in _spellings(own):
        shapes = {name: own[ours] for name, ours in theirs.items() if not name.endswith(COUNTER)}
        found.setdefault(frozenset(theirs), Candidate(arch, size, shapes, theirs))
    return tuple(found.values())


def _spellings(own: Mapping[str, Shape]) -> Iterator[dict[str, str]]:
    """Our names by others' names: as they are, with other names of the last layer, and other projects' ResNets."""
    if "head.pos_embed" in own and "stem.conv1.conv.weight" in own:  # clip_resnet50, whose names are timm's
        yield {_clips_name(key): key for key in own}
    yield {key: key for key in own}
    tops = {key.split(".")[0] for key in own}
    heads = tops & set(_HEADS)
    parts = next((parts for parts in (_NAMED, _NUMBERED[1]) if set(parts) <= tops and "attnpool" not in tops), ())
    spellings = [_NAMED] if heads else [_NAMED, *_NUMBERED]
    for spelling in spellings if parts else [()]:
        for shortcut in _SHORTCUTS if parts else ("",):
            for head in _HEADS if len(heads) == 1 else ("",):
                renamed = dict(zip(parts, spelling, strict=True)) | dict.fromkeys(heads, head)
                yield {_respelled(key, renamed, shortcut): key for key in own}


def _clips_name(key: str) -> str:
    for pattern, name in _CLIP_NAMES:
        key = pattern.sub(name, key)
    return key


def _respelled(key: str, renamed: Mapping[str, str], shortcut: str) -> str:
    top, dot, rest = key.partition(".")
    rest = _SHORTCUT.sub(rf"\1{shortcut}.", rest) if shortcut else rest
    return renamed.get(top, top) + dot + rest


def ends_with(state: Mapping[str, Tensor], name: str) -> Iterator[Tensor]:
    """The tensors of that name, whatever their prefix."""
    return (value for key, value in state.items() if key == name or key.endswith(f".{name}"))


def _torchvision_names(state: Mapping[str, Tensor]) -> list[str]:
    import torchvision.models as published

    begins = tuple(
        name
        for marker, names in _TORCHVISION_FAMILIES.items()
        if next(ends_with(state, marker), None) is not None
        for name in names
    )
    names = [name for name in published.list_models(module=published) if begins and name.startswith(begins)]
    if not _has_large_stem(state):
        names = [name for name in names if not name.startswith(_LARGE_STEMS)]
    return [f"torchvision:{name}" for name in sorted(names, key=lambda name: (len(name), name))]


def _timm_names(state: Mapping[str, Tensor]) -> list[str]:
    """timm's encoders: CLIP's ResNet by its pool, ResNets by a 7x7 stem, and ViTs by width and patch."""
    if next(ends_with(state, _CLIP_POOL), None) is not None:
        return [_CLIP]
    names: list[str] = []
    if _has_large_stem(state):
        names += _TIMM_RESNETS
    if next(ends_with(state, "cls_token"), None) is not None:
        for stem in ends_with(state, "patch_embed.proj.weight"):
            if stem.dim() == 4 and stem.shape[0] in _VIT_WIDTHS:
                name = f"vit_{_VIT_WIDTHS[stem.shape[0]]}_patch{stem.shape[2]}_224"
                names += [name] if _in_timm(name) and name not in names else []
    return [f"timm:{name}" for name in names]


def _clip_size(state: Mapping[str, Tensor]) -> int | None:
    """Pixels that the pool of CLIP's ResNet, (tokens, D), was made for."""
    pool = next((value for value in ends_with(state, _CLIP_POOL) if value.dim() == 2), None)
    return None if pool is None else _plausible(isqrt(max(pool.shape[0] - 1, 1)) * _CLIP_STRIDE)


def _has_large_stem(state: Mapping[str, Tensor]) -> bool:
    """Whether there is the first layer of ImageNet's ResNets."""
    return any(tuple(value.shape) == (64, 3, 7, 7) for value in state.values())


def _in_timm(name: str) -> bool:
    import timm

    return timm.is_model(name)


def _token_size(state: Mapping[str, Tensor], positions: str, stem: str) -> int | None:
    """Pixels that a ViT's position embeddings (1, tokens, D) and patches (D, 3, P, P) speak of."""
    tokens = next(
        (value.shape[1] for key, value in state.items() if key.endswith(positions) and value.dim() == 3), None
    )
    patch = next((value.shape[2] for value in ends_with(state, stem) if value.dim() == 4), None)
    if tokens is None or patch is None:
        return None
    sizes = (isqrt(n) * patch for n in (tokens - 1, tokens, tokens - 2) if n > 0 and isqrt(n) ** 2 == n)
    return _plausible(next(sizes, 0))


def _plausible(size: int) -> int | None:
    return size if 0 < size <= MOST_PIXELS else None
