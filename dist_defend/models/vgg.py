"""VGG networks: I-BAU's small one (YiZeng623/I-BAU's keys), and VGG-11 to 19 for CIFAR (kuangliu/pytorch-cifar's keys).

All are ``features`` (an nn.Sequential) and ``classifier`` (one linear layer). Activations are out of place.
"""

from torch import Tensor, nn

from dist_defend.errors import UserError

_WIDTHS = (64, 128, 256, 512, 512)  # of the five blocks' convolutions
_CONVOLUTIONS = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}  # configurations A, B, D, E


class VGG(nn.Module):
    """features, flatten (channels first), classifier."""

    def __init__(self, features: nn.Sequential, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(feature_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.classifier(self.features(x).flatten(1))
        return x


def ibau_vgg(num_classes: int, image_size: int) -> VGG:
    """Six convolutions with ELU in three blocks that end in max pool and dropout (Zeng et al. 2022, "small VGG").

    UserError for images under 8 px, of which the three pools leave nothing.
    """
    _check_size(image_size, 8)
    features = nn.Sequential()
    before = 3
    for width, dropout in ((32, 0.3), (64, 0.4), (128, 0.4)):
        for _ in range(2):
            features.extend((nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ELU()))
            before = width
        features.extend((nn.MaxPool2d(2), nn.Dropout(dropout)))
    return VGG(features, before * (image_size // 8) ** 2, num_classes)


def vgg_cifar(depth: int, batch_norm: bool, num_classes: int, image_size: int) -> VGG:
    """depth - 3 convolutions (Simonyan and Zisserman 2015), five max pools, the mean over what they leave, Linear(512).

    depth: 11, 13, 16 or 19. UserError for images under 32 px, of which the five pools leave nothing.
    """
    _check_size(image_size, 32)
    features = nn.Sequential()
    before = 3
    for width, convolutions in zip(_WIDTHS, _CONVOLUTIONS[depth], strict=True):
        for _ in range(convolutions):
            norm = (nn.BatchNorm2d(width),) if batch_norm else ()
            features.extend((nn.Conv2d(before, width, 3, padding=1), *norm, nn.ReLU()))
            before = width
        features.append(nn.MaxPool2d(2))
    features.append(nn.AdaptiveAvgPool2d(1))
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return VGG(features, before, num_classes)


def _check_size(image_size: int, least: int) -> None:
    if image_size < least:
        raise UserError(f"images of {image_size} px are too small for this VGG: prepare them at {least} px or more")
