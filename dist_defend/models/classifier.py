"""Image classifiers in pixel space: normalisation, then a network with its upstream's keys."""

import difflib
from collections.abc import Callable

from torch import Tensor, nn

from dist_defend.errors import UserError
from dist_defend.models.encoder import Normalize, create_timm
from dist_defend.models.mobilenet import MobileNetV2
from dist_defend.models.preact_resnet import PreActResNet18
from dist_defend.models.resnet import BasicBlock, Bottleneck, ResNet
from dist_defend.models.vgg import ibau_vgg, vgg19_bn
from dist_defend.models.wide_resnet import WideResNet


class Classifier(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> logits (B, num_classes). The state dict of ``net`` has upstream's keys."""

    def __init__(self, net: nn.Module, arch: str, num_classes: int, normalization: str, image_size: int) -> None:
        super().__init__()
        self.normalize = Normalize(normalization)
        self.net = net
        self.arch, self.num_classes = arch, num_classes
        self.normalization, self.image_size = normalization, image_size

    def forward(self, images: Tensor) -> Tensor:
        return self.net(self.normalize(images))


def _small_resnet(num_classes: int, image_size: int) -> ResNet:
    """One BasicBlock per stage, each halving the map. Made for two cores."""
    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes, widths=(16, 32, 64, 128), strides=(2, 2, 2, 2))


def create_torchvision(name: str, image_size: int, num_classes: int) -> nn.Module:
    """A torchvision classifier with fresh weights. UserError for an unknown name or one with several outputs."""
    import torchvision.models as published

    names = [known for known in published.list_models(module=published) if known not in ("googlenet", "inception_v3")]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        raise UserError(f"torchvision has no model '{name}'" + (f": did you mean {', '.join(near)}?" if near else ""))
    sized = {"image_size": image_size} if name.startswith("vit_") else {}
    return published.get_model(name, weights=None, num_classes=num_classes, **sized)


_NETS: dict[str, Callable[[int, int], nn.Module]] = {  # arch -> net of (num_classes, image_size)
    "resnet18": lambda classes, _: ResNet(BasicBlock, (2, 2, 2, 2), classes),
    "resnet34": lambda classes, _: ResNet(BasicBlock, (3, 4, 6, 3), classes),
    "resnet50": lambda classes, _: ResNet(Bottleneck, (3, 4, 6, 3), classes),
    "small_resnet": _small_resnet,
    "preact_resnet18": lambda classes, _: PreActResNet18(classes),
    "vgg19_bn": vgg19_bn,
    "ibau_vgg": ibau_vgg,
    "mobilenet_v2": lambda classes, _: MobileNetV2(classes),
    "wrn_10_1": lambda classes, _: WideResNet(10, 1, classes),
    "wrn_16_1": lambda classes, _: WideResNet(16, 1, classes),
    "wrn_16_2": lambda classes, _: WideResNet(16, 2, classes),
    "wrn_40_1": lambda classes, _: WideResNet(40, 1, classes),
    "wrn_40_2": lambda classes, _: WideResNet(40, 2, classes),
}
ARCHITECTURES = (*_NETS, "timm:NAME", "torchvision:NAME")


def build_classifier(arch: str, num_classes: int, normalization: str = "cifar10", image_size: int = 32) -> Classifier:
    """A classifier with fresh weights (torch's global generator); arch: one of ARCHITECTURES, image_size in pixels.

    UserError for an unknown arch (with the nearest name) or normalization, and for images too small for the network.
    """
    if arch.startswith("timm:"):
        net = create_timm(arch.removeprefix("timm:"), image_size, num_classes)
    elif arch.startswith("torchvision:"):
        net = create_torchvision(arch.removeprefix("torchvision:"), image_size, num_classes)
    elif arch in _NETS:
        net = _NETS[arch](num_classes, image_size)
    else:
        near = difflib.get_close_matches(arch, ARCHITECTURES, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UserError(f"unknown arch '{arch}': {hint}choose from {', '.join(ARCHITECTURES)}")
    return Classifier(net, arch, num_classes, normalization, image_size)
