"""Image classifiers in pixel space: normalisation, then a network with its upstream's keys."""

from typing import Any

from torch import Tensor, nn

from dist_defend.errors import UserError, no_model
from dist_defend.models import in_process
from dist_defend.models.architectures import CLASSIFIERS, find_classifier, unknown
from dist_defend.models.encoder import create_timm
from dist_defend.models.pixel_space import Normalize, Resize
from dist_defend.models.wide_resnet import WideResNet


class Classifier(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> logits (B, num_classes). The state dict of ``net`` has upstream's keys.

    image_size: pixels of the images. resize: side in pixels to which ``net`` resizes its input, if it does; that
    is a hook, so it holds where ``net`` is called by itself, for a perturbation of normalised images.
    """

    def __init__(
        self,
        net: nn.Module,
        arch: str,
        num_classes: int,
        normalization: str,
        image_size: int,
        resize: int | None = None,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(normalization)
        self.net = net
        self.arch, self.num_classes = arch, num_classes
        self.normalization, self.image_size, self.resize = normalization, image_size, resize
        if resize is not None:
            entrance = net.conv1 if isinstance(net, WideResNet) else net  # whose feature maps are asked for without it
            entrance.register_forward_pre_hook(Resize(resize).hook)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(self.normalize(images))
        return logits


def create_torchvision(name: str, image_size: int, num_classes: int) -> nn.Module:
    """A torchvision classifier with fresh weights, of one output in train mode too. UserError for an unknown name."""
    import torchvision.models as published

    names = published.list_models(module=published)
    if name not in names:
        raise no_model("torchvision", name, names)
    options: dict[str, Any] = {"image_size": image_size} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}  # their auxiliary heads serve training alone
    net: nn.Module = published.get_model(name, weights=None, num_classes=num_classes, **options)
    return net


ARCHITECTURES = (*CLASSIFIERS, "timm:NAME", "torchvision:NAME")


def build_classifier(
    arch: str, num_classes: int, normalization: str = "cifar10", image_size: int = 32, resize: int | None = None
) -> Classifier:
    """A classifier with fresh weights (torch's global generator); arch: as in ``added`` or ARCHITECTURES; sizes in px.

    With ``resize`` the model brings its images to that side itself: its network is made for resize px, while images,
    and triggers with them, have image_size px. UserError for an unknown arch (with the nearest name) or normalization,
    and for images too small for the network.
    """
    side = resize or image_size
    if arch.startswith(in_process.PREFIX):
        net = in_process.build(arch, num_classes, side)
    elif arch.startswith("timm:"):
        net = create_timm(arch.removeprefix("timm:"), side, num_classes)
    elif arch.startswith("torchvision:"):
        net = create_torchvision(arch.removeprefix("torchvision:"), side, num_classes)
    else:
        found = find_classifier(arch)
        if found is None:
            raise unknown(arch, ARCHITECTURES, "the classifiers")
        net = found.make(num_classes, side)
        if not isinstance(net, nn.Module):
            raise UserError(f"arch '{arch}' made a {type(net).__name__}: its function must return a torch.nn.Module")
    return Classifier(net, arch, num_classes, normalization, image_size, resize)
