"""Models in pixel space: they take images (B, 3, H, W) in [0, 1], and normalise and resize them themselves."""

import math
import re
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_defend import plugins
from dist_defend.errors import UserError, did_you_mean

NORMALIZATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {  # mean, std per channel
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar10_backdoorbench": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tiny": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    "gtsrb": ((0.3403, 0.3121, 0.3214), (0.2724, 0.2608, 0.2669)),
    "stl10": ((0.44087798, 0.42790666, 0.38678814), (0.25507198, 0.24801506, 0.25641308)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "fashion_mnist": ((0.286, 0.286, 0.286), (0.353, 0.353, 0.353)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # timm's augreg ViTs, its EfficientNet-lite and others
}


def normalization_names() -> list[str]:
    """Of NORMALIZATIONS and of the plug-ins'."""
    return [*NORMALIZATIONS, *plugins.names("normalizations")]


def normalization_constants(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel of one of normalization_names(), or of the user's own ``module:name``, or of numbers.

    Numbers are in [0, 1]: "mean,std" or three of each. UserError for an unknown name, another count of numbers, and a
    std that is not positive.
    """
    plug_in = plugins.find("normalizations", name, NORMALIZATIONS)
    if name in NORMALIZATIONS:
        return NORMALIZATIONS[name]
    if plug_in is not None or plugins.is_object(name):
        return _checked(name, plugins.load_object(name) if plug_in is None else plug_in.load())
    try:
        numbers = tuple(float(word) for word in re.split(r"[\s,;/]+", name.strip()))
    except ValueError:
        known = normalization_names()
        told = f"unknown normalization '{name}': {did_you_mean(name, known)}choose from {', '.join(known)}"
        raise UserError(f"{told}, or give numbers, mean,std or three of each") from None
    if len(numbers) not in (2, 6):
        raise UserError(
            f"normalization '{name}' has {len(numbers)} numbers: give mean,std or three means and three stds"
        )
    return _checked(name, (numbers[:1] * 3, numbers[1:] * 3) if len(numbers) == 2 else (numbers[:3], numbers[3:]))


def _checked(name: str, found: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A pair of three means and three stds. UserError for anything else."""
    try:
        mean, std = (tuple(float(number) for number in numbers) for numbers in found)
    except (TypeError, ValueError):
        mean, std = (), ()
    if len(mean) != 3 or len(std) != 3:
        raise UserError(f"normalization '{name}' is no pair of three means and three stds: make it one")
    if not all(math.isfinite(number) for number in (*mean, *std)) or min(std) <= 0:
        raise UserError(f"normalization '{name}': numbers must be finite and each std positive, for images in [0, 1]")
    return mean, std


class Normalize(nn.Module):
    """(x - mean) / std per channel. Constants of the code, not of a checkpoint: the buffers are not persistent."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        constants = normalization_constants(name)
        self.is_identity = constants == NORMALIZATIONS["none"]
        for key, values in zip(("mean", "std"), constants, strict=True):
            self.register_buffer(key, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.is_identity else (x - self.mean) / self.std


class Resize:
    """Images (B, C, H, W) -> (B, C, side, side), bilinear, as torchvision's Resize does it with tensors.

    Called by itself or as a forward pre-hook, which adds no key to the module's state dict.
    """

    def __init__(self, side: int) -> None:
        if side < 1:
            raise UserError(f"key 'resize' is {side}; it must be at least 1 px")
        self.side = side

    def __call__(self, images: Tensor) -> Tensor:
        size = (self.side, self.side)
        if images.shape[-2:] == size:
            return images
        return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)

    def hook(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """For register_forward_pre_hook: the first input is images."""
        return self(inputs[0]), *inputs[1:]


class Encoder(nn.Module, ABC):
    """Images (B, 3, H, W) in [0, 1] -> raw features h (B, feature_dim).

    resize: what brings normalised images to the network's size, where that is not theirs.
    """

    feature_dim: int
    normalize: nn.Module
    resize: Resize | None = None

    def prepared(self, x: Tensor) -> Tensor:
        """What the network itself gets for images x (B, 3, H, W) in [0, 1]."""
        x = self.normalize(x)
        return x if self.resize is None else self.resize(x)

    @abstractmethod
    def layers(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The four stage outputs (B, C, H', W') and h, of one pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[1]
