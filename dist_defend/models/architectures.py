"""The networks that are written here: one table of classifiers, one of encoders, with the checkpoints that fit each.

models.classifier and models.encoder add those of timm, torchvision and open_clip, by their names there. Others are
of plug-ins, and of users' own modules as ``module:name``.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from dist_defend import plugins
from dist_defend.errors import UserError, did_you_mean
from dist_defend.models.mobilenet import MobileNetV2
from dist_defend.models.preact_resnet import PreActResNet18
from dist_defend.models.resnet import BasicBlock, Bottleneck, ResNet
from dist_defend.models.resnet_cifar import CifarResNet
from dist_defend.models.simclr_resnet import Block, resnet_encoder, small_encoder
from dist_defend.models.vgg import ibau_vgg, vgg_cifar
from dist_defend.models.wide_resnet import WideResNet


@dataclass(frozen=True)
class ClassifierArchitecture:
    """make: num_classes, image_size (pixels) -> network with fresh weights (torch's global generator).

    image_size: pixels for which it was made. keys: of its state dict, in words. source: the project that they are from.
    """

    make: Callable[[int, int], nn.Module]
    keys: str
    source: str
    image_size: int = 32


@dataclass(frozen=True)
class EncoderArchitecture:
    """make: network of eight children with fresh weights, whose last gives (B, feature_dim, 1, 1). Else as above."""

    make: Callable[[], nn.Sequential]
    feature_dim: int
    keys: str
    source: str
    image_size: int = 32


_RESNET_KEYS = "conv1, bn1, layer{1..4}.N.{conv1, bn1, conv2, bn2, shortcut.0, shortcut.1}, linear"
_BOTTLENECK_KEYS = "conv1, bn1, layer{1..4}.N.{conv1, bn1, conv2, bn2, conv3, bn3, shortcut.0, shortcut.1}, linear"
_CIFAR_KEYS = "conv1, bn1, layer{1..3}.N.{conv1, bn1, conv2, bn2}, linear; shortcuts without parameters"
_VGG_KEYS = "features.N, classifier (one linear layer)"
_WIDE_KEYS = "conv1, block{1..3}.layer.N.{bn1, conv1, bn2, conv2, convShortcut}, bn1, fc"
_PYTORCH_CIFAR = "kuangliu/pytorch-cifar"
_RNP = "bboylyg/RNP"


def _resnet(block: type[BasicBlock | Bottleneck], depths: tuple[int, ...]) -> ClassifierArchitecture:
    keys = _RESNET_KEYS if block is BasicBlock else _BOTTLENECK_KEYS
    return ClassifierArchitecture(lambda classes, _: ResNet(block, depths, classes), keys, f"{_PYTORCH_CIFAR}, {_RNP}")


def _resnet_cifar(depth: int) -> ClassifierArchitecture:
    return ClassifierArchitecture(
        lambda classes, _: CifarResNet(depth, classes), _CIFAR_KEYS, "akamaster/pytorch_resnet_cifar10"
    )


def _vgg(depth: int, batch_norm: bool) -> ClassifierArchitecture:
    source = f"{_PYTORCH_CIFAR}, {_RNP}" if batch_norm else f"vgg{depth}_bn, without its norms"
    return ClassifierArchitecture(partial(vgg_cifar, depth, batch_norm), _VGG_KEYS, source)


def _wide_resnet(depth: int, widen: int) -> ClassifierArchitecture:
    return ClassifierArchitecture(
        lambda classes, _: WideResNet(depth, widen, classes), _WIDE_KEYS, "polo5/ZeroShotKnowledgeTransfer"
    )


def _narrow_resnet18(width: int) -> ClassifierArchitecture:
    """ResNet-18 with so many channels in its first stage, instead of 64."""
    widths = tuple(width * 2**stage for stage in range(4))
    return ClassifierArchitecture(
        lambda classes, _: ResNet(BasicBlock, (2, 2, 2, 2), classes, widths), _RESNET_KEYS, "this project"
    )


def _small_resnet(num_classes: int, image_size: int) -> ResNet:
    """One BasicBlock per stage, each halving the map. Made for two cores."""
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes, widths=(16, 32, 64, 128), strides=(2, 2, 2, 2))


CLASSIFIERS: dict[str, ClassifierArchitecture] = {
    "resnet18": _resnet(BasicBlock, (2, 2, 2, 2)),
    "resnet34": _resnet(BasicBlock, (3, 4, 6, 3)),
    "resnet50": _resnet(Bottleneck, (3, 4, 6, 3)),
    "resnet18_half": _narrow_resnet18(32),
    "resnet18_quarter": _narrow_resnet18(16),
    "small_resnet": ClassifierArchitecture(_small_resnet, _RESNET_KEYS, "this project"),
    "preact_resnet18": ClassifierArchitecture(
        lambda classes, _: PreActResNet18(classes),
        "conv1, layer{1..4}.N.{bn1, conv1, bn2, conv2, shortcut.0}, linear",
        "SCLBD/BackdoorBench",
    ),
    **{f"resnet{depth}_cifar": _resnet_cifar(depth) for depth in (20, 32, 44, 56, 110)},
    **{f"vgg{depth}_bn": _vgg(depth, True) for depth in (11, 13, 16, 19)},
    **{f"vgg{depth}": _vgg(depth, False) for depth in (11, 13, 16, 19)},
    "ibau_vgg": ClassifierArchitecture(ibau_vgg, _VGG_KEYS, "YiZeng623/I-BAU"),
    "mobilenet_v2": ClassifierArchitecture(
        lambda classes, _: MobileNetV2(classes),
        "conv1, bn1, layers.N.{conv1, bn1, conv2, bn2, conv3, bn3, shortcut.0, shortcut.1}, conv2, bn2, linear",
        f"{_PYTORCH_CIFAR}, {_RNP}",
    ),
    **{
        f"wrn_{depth}_{widen}": _wide_resnet(depth, widen)
        for depth, widen in ((10, 1), (16, 1), (16, 2), (40, 1), (40, 2))
    },
}

_STAGED_KEYS = "0 (conv), 1 (norm), {3..6}.N.{conv1, bn1, conv2, bn2, downsample.0, downsample.1}"
_BADENCODER = "jinyuan-jia/BadEncoder, wssun/MIMIC"


def _encoder(block: Block, depths: tuple[int, ...]) -> EncoderArchitecture:
    make = partial(resnet_encoder, block, depths)
    if block == "BasicBlock":
        return EncoderArchitecture(make, 512, _STAGED_KEYS, _BADENCODER)
    return EncoderArchitecture(make, 2048, _STAGED_KEYS.replace("bn2,", "bn2, conv3, bn3,"), _BADENCODER)


ENCODERS: dict[str, EncoderArchitecture] = {
    "resnet18_cifar": _encoder("BasicBlock", (2, 2, 2, 2)),
    "resnet34_cifar": _encoder("BasicBlock", (3, 4, 6, 3)),
    "resnet50_cifar": _encoder("Bottleneck", (3, 4, 6, 3)),
    "small_cifar": EncoderArchitecture(small_encoder, 256, _STAGED_KEYS, "this project"),
}

PUBLISHED = ("timm:", "torchvision:", "open_clip:")  # libraries that are asked for the rest of the name
_BUILT_IN = (*CLASSIFIERS, *ENCODERS, "clip_resnet50")


def architecture_sources() -> dict[str, str]:
    """The installed distribution and version that each architecture comes from, by name."""
    return plugins.sources("architectures", _BUILT_IN)


def added(arch: str) -> ClassifierArchitecture | EncoderArchitecture | None:
    """A plug-in's architecture, or that of the user's own ``module:name``; None for any other name.

    A function stands for a ClassifierArchitecture with it as ``make``. UserError for what cannot be imported, or is
    neither, and for a name that two packages have.
    """
    plug_in = plugins.find("architectures", arch, _BUILT_IN)
    if plug_in is None and (arch.startswith(PUBLISHED) or not plugins.is_object(arch)):
        return None
    try:
        found = plugins.load_object(arch) if plug_in is None else plug_in.load()
    except UserError as error:
        near = difflib.get_close_matches(f"{arch.partition(':')[0]}:", PUBLISHED, n=1)
        raise UserError(f"{error}; did you mean '{near[0]}NAME'?") if near else error from None
    if isinstance(found, ClassifierArchitecture | EncoderArchitecture):
        return found
    if not callable(found):
        raise UserError(
            f"arch '{arch}' is a {type(found).__name__}: name a function (num_classes, image_size) -> network"
        )
    return ClassifierArchitecture(found, "its own", arch if plug_in is None else plug_in.source)


def find_classifier(arch: str) -> ClassifierArchitecture | None:
    """The architecture of a classifier that is not PUBLISHED. UserError as from ``added``."""
    found = added(arch) or CLASSIFIERS.get(arch)
    return found if isinstance(found, ClassifierArchitecture) else None


def find_encoder(arch: str) -> EncoderArchitecture | None:
    """The same of an encoder."""
    found = added(arch) or ENCODERS.get(arch)
    return found if isinstance(found, EncoderArchitecture) else None


def unknown(arch: str, known: tuple[str, ...], kind: str) -> UserError:
    """The error for an arch that is not one of ``known``, nor a plug-in's of this kind."""
    if added(arch) is not None:
        return UserError(f"arch '{arch}' is none of {kind}: use it for the other kind of model")
    names = (*known, *plugins.names("architectures"), "module:name")
    return UserError(f"unknown arch '{arch}': {did_you_mean(arch, names)}choose from {', '.join(names)}")
