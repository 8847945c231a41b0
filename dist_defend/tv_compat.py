"""Let torchvision (and timm, which imports it) load beside a CPU build of torch.

PyPI's Linux wheels of torchvision link CUDA libraries, so on a CPU torch its extension cannot be loaded, and the import
then dies while registering fake kernels for ``nms`` and ``qnms`` (pytorch/vision#9337). Declaring these two operators
first is enough for everything written in Python: transforms, models, data sets, PIL loading. Compiled operators
(``ops.nms``, ``io.decode_jpeg``) still raise torchvision's own error. Nothing is done, and torch is not imported, until
something imports torchvision.
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

_library: Any = None  # its destructor would unregister the operators


def _extension_loads() -> bool:
    import torch

    spec = PathFinder.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True  # not installed, or built from source: let its import say so
    libraries = sorted(Path(spec.submodule_search_locations[0]).glob("_C*.so"))
    try:
        for library in libraries:
            torch.ops.load_library(str(library))
    except OSError:
        return False
    return bool(libraries)


def patch_torchvision() -> bool:
    """Declare the operators that torchvision misses on a CPU torch; True if that was needed. Harmless when repeated."""
    global _library
    import torch

    if _library is not None:
        return True
    if "torchvision" in sys.modules or torch.version.cuda or torch.version.hip or _extension_loads():
        return False
    _library = torch.library.Library("torchvision", "FRAGMENT")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return True


class _BeforeTorchvision:
    """Stands first among the finders of modules, and finds none."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            patch_torchvision()


def patch_before_torchvision() -> None:
    """Have ``patch_torchvision`` called by the first import of torchvision. Harmless when repeated."""
    if _BeforeTorchvision not in sys.meta_path:
        sys.meta_path.insert(0, _BeforeTorchvision)
