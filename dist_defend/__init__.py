"""Train, poison, purify and measure image encoders and classifiers, on one CPU or many GPUs."""

import importlib
import os
from typing import Any

# Loader threads and compute threads share the cores; OpenMP threads that spin for long while they wait cost a factor of
# 3 to 6 on a busy machine, and those that never spin a quarter of a small head's step. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from dist_defend.tv_compat import patch_before_torchvision

__version__ = "0.1.0"

_PUBLIC = ("attack", "defend", "evaluate", "load", "save", "train", "wrap")
# public name: the module that has it, imported when the name is first used; type checkers read __init__.pyi
_PLACES = {**dict.fromkeys(_PUBLIC, "dist_defend.api"), "UserError": "dist_defend.errors"}

patch_before_torchvision()


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
