"""Architectures that exist in this process alone: networks and functions that a Python program handed over.

A model folder names its architecture, and others can build it from that name. A network that was only ever made in a
program has no such name, so it gets one that starts with PREFIX and holds while the program keeps it known.
"""

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator

from torch import nn

from dist_defend.errors import UserError

PREFIX = "in_process:"
Make = Callable[[int, int], nn.Module]  # number of classes, image size (pixels) -> network

_makes: dict[str, Make] = {}


def copies_of(net: nn.Module) -> tuple[str, Make]:
    """A name for a network, the same in every process that builds the same one, and what makes its copies.

    Copies have its weights and whatever else the module holds; they are on the CPU, in train mode, and all of their
    parameters are trained, as those of a network that was just built. UserError for one that cannot be copied.
    """
    shapes = [f"{key} {tuple(value.shape)}" for key, value in net.state_dict().items()]
    digest = hashlib.sha256("\n".join(shapes).encode()).hexdigest()

    def make(num_classes: int, image_size: int) -> nn.Module:
        try:
            return copy.deepcopy(net).cpu().train().requires_grad_(True)
        except Exception as error:  # of any module's own
            told = " ".join(str(error).split())
            raise UserError(f"{type(net).__name__} cannot be copied (copy.deepcopy says: {told}): mend that") from error

    return f"{PREFIX}{type(net).__name__}-{digest[:8]}", make


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Within, new names may be made known; they are forgotten at its end."""
    before = dict(_makes)
    try:
        yield
    finally:
        _makes.clear()
        _makes.update(before)


def make_known(name: str, make: Make) -> str:
    """Let build_classifier find an architecture; its name, with a number behind it where another one has it already."""
    free, number = name, 1
    while free in _makes:
        number += 1
        free = f"{name}-{number}"
    _makes[free] = make
    return free


def build(arch: str, num_classes: int, image_size: int) -> nn.Module:
    """The network of a known name. UserError for one that this process does not know."""
    if arch not in _makes:
        raise UserError(
            f"arch '{arch}' was a network of another Python program, which a folder cannot hold: build the network and "
            "say dist_defend.load(FOLDER, net=NETWORK), or wrap it with arch='module:function' before it is saved"
        )
    return _makes[arch](num_classes, image_size)
