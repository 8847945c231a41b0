"""A small network, and the constants of its images."""

from torch import nn

TINY_IMAGES = ((0.4, 0.4, 0.4), (0.25, 0.25, 0.25))  # mean and std per channel, for images in [0, 1]


def tiny_net(num_classes: int, image_size: int) -> nn.Module:
    """Two convolutions and a linear layer; images (B, 3, image_size, image_size), normalised -> (B, num_classes)."""
    if image_size < 8:
        raise ValueError(f"images have {image_size} px; two strides and a pool need 8")
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )
