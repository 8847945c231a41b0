"""Patch torchvision in programs that import it without dist_defend, such as ``accelerate launch``.

launch/bootstrap copies this file into the virtual environment, beside a .pth line that imports it at start-up. It does
nothing until something looks for torchvision; then it imports dist_defend's patch (tv_compat.py) and applies it.
"""

import contextlib
import sys


class _BeforeTorchvision:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(_BeforeTorchvision)
            with contextlib.suppress(ModuleNotFoundError):  # the package was uninstalled, this file stayed
                from dist_defend.tv_compat import patch_torchvision

                patch_torchvision()


sys.meta_path.insert(0, _BeforeTorchvision)
