"""Train, poison, purify and measure image encoders and classifiers, on one CPU or many GPUs."""

from dist_defend.tv_compat import patch_torchvision

__version__ = "0.1.0"

patch_torchvision()
