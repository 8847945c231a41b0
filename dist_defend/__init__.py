"""Train, poison, purify and measure image encoders and classifiers, on one CPU or many GPUs."""

import os

# Loader threads and compute threads share the cores; OpenMP threads that spin for long while they wait cost a factor of
# 3 to 6 on a busy machine, and those that never spin a quarter of a small head's step. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from dist_defend.tv_compat import patch_torchvision

__version__ = "0.1.0"

patch_torchvision()
