"""The constants that a foreign network was trained with, and whether they are known or guessed.

Known: what the file's own layout says (BackdoorBench names its data set), what an architecture comes with (CLIP,
I-BAU's network, timm's by name), and an image size that the shapes fix. Anything else is a guess by kind and classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_defend.errors import UserError
from dist_defend.models.architectures import PUBLISHED
from dist_defend.models.clip_image import OPEN_CLIP
from dist_defend.models.pixel_space import NORMALIZATIONS

BACKDOORBENCH_DATA = {  # normalization, image size (pixels), classes
    "cifar10": ("cifar10_backdoorbench", 32, 10),
    "cifar100": ("cifar100", 32, 100),
    "gtsrb": ("none", 32, 43),
    "celeba": ("none", 64, 8),
    "tiny": ("tiny", 64, 200),
    "imagenet": ("imagenet", 224, 1000),
}
BACKDOORBENCH_RESIZE = {"torchvision:vit_b_16": 224, "torchvision:inception_v3": 299}  # pixels, inside of its networks
_BY_CLASSES = {10: ("cifar10", 32), 100: ("cifar100", 32), 200: ("tiny", 64), 1000: ("imagenet", 224)}


@dataclass(frozen=True)
class Constants:
    """normalization, image_size in pixels, and which of the two are guesses; resize: pixels inside of the model."""

    normalization: str
    image_size: int
    guessed: tuple[str, ...] = ()
    resize: int | None = None

    def told(self, normalization: str | None, image_size: int | None) -> "Constants":
        """With what the user gave in place of it."""
        given = {key for key, value in (("normalization", normalization), ("image_size", image_size)) if value}
        size = image_size or self.image_size
        guessed = tuple(key for key in self.guessed if key not in given)
        return Constants(
            normalization or self.normalization, size, guessed, self.resize if self.resize != size else None
        )


def encoder_constants(
    arch: str, size: int, is_named: bool, is_self_supervised: bool, is_badencoders: bool
) -> Constants:
    """size: what the candidate was built for. is_named: the user gave the architecture.

    A ResNet of BadEncoder's ImageNet experiments is taken not to normalise, other networks of timm's to be ImageNet's.
    """
    if arch == "clip_resnet50" or arch.startswith(OPEN_CLIP):
        return Constants("clip", size)
    if not arch.startswith("timm:"):
        return Constants("cifar10", size, ("normalization", "image_size"))
    published = timm_normalization(arch)
    if is_named and published is not None and not is_self_supervised:
        return Constants(published, size)
    is_sized = "vit_" in arch  # by its position embeddings
    guessed = ("normalization",) if is_sized else ("normalization", "image_size")
    return Constants("none" if is_badencoders else "imagenet", size, guessed)


def classifier_constants(arch: str, num_classes: int, size: int, is_named: bool) -> Constants:
    """size: what the candidate was built for. CIFAR-10's constants are for ten classes alone."""
    if arch == "ibau_vgg":
        return Constants("none", size)
    guessed = ("normalization",) if "vit_" in arch else ("normalization", "image_size")
    if is_named and arch.startswith("timm:"):
        published = timm_normalization(arch)
        if published is not None:
            return Constants(published, size)
    if arch.startswith(PUBLISHED):
        return Constants("imagenet", size, guessed)
    normalization, image_size = _BY_CLASSES.get(num_classes, ("none", 32))
    return Constants(normalization, image_size, guessed)


def backdoorbench_constants(
    facts: dict[str, Any], arch: str, num_classes: int, normalization: str | None, path: str | Path
) -> Constants:
    """By its data set; a defense_result names none, so a guess by the number of classes.

    UserError where no constants are known and the user gave no normalization.
    """
    data = facts.get("clean_data")
    guessed: tuple[str, ...] = ()
    if data is None:
        data = next((name for name, (*_, classes) in BACKDOORBENCH_DATA.items() if classes == num_classes), None)
        guessed = ("normalization",) if "img_size" in facts else ("normalization", "image_size")
    if data not in BACKDOORBENCH_DATA and normalization is None:
        raise UserError(f"{path}: no constants are known for {data or f'{num_classes} classes'}: give --normalization")
    constants = BACKDOORBENCH_DATA.get(data or "", (normalization or "none", 32, 0))
    if data not in BACKDOORBENCH_DATA and "img_size" not in facts:
        guessed = (*guessed, "image_size") if "image_size" not in guessed else guessed
    size = facts["img_size"][0] if "img_size" in facts else constants[1]
    resize = BACKDOORBENCH_RESIZE.get(arch)
    return Constants(constants[0], size, guessed, resize if resize != size else None)


def timm_normalization(arch: str) -> str | None:
    """The constants that timm publishes for "timm:NAME": a name of NORMALIZATIONS, or numbers; None for none."""
    import timm

    published = timm.models.get_pretrained_cfg(arch.removeprefix("timm:"))
    if published is None:
        return None
    numbers = (*published.mean, *published.std)
    for name, (mean, std) in NORMALIZATIONS.items():
        if all(abs(one - other) < 1e-6 for one, other in zip(numbers, (*mean, *std), strict=True)):
            return name
    return ",".join(f"{number:g}" for number in numbers)
