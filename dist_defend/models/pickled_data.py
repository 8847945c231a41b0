"""All that a foreign pickle may hold besides Python's own literals and containers: the allow-list.

Tensors of dense storages, numpy arrays and numbers, PIL images as raw pixels. Each name maps to a constructor written
here, so that no code of torch, numpy or PIL is reached with arguments from the file that were not checked. Every other
name stays a placeholder.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_defend.models.restricted_pickle import Attributed, Buildable, Refused, shown

_STORED = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
STORAGES = {f"{package}.{name}Storage": t for package in ("torch", "torch.cuda") for name, t in _STORED.items()}
_MAX_DIMENSIONS = 16
_MOST_VALUES = 2**48  # along a dimension, or as a stride
_MOST_STATE = 16  # parts of a state
_MOST_KEY = 10_000  # characters of a text as a key
_BUILTINS = ("builtins", "__builtin__")  # Python 3's, Python 2's
_BANDS = {"L": 1, "RGB": 3}


class PickledDtype(Buildable):
    """A numpy number type: b, i, u or f and its bytes."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
            raise Refused(f"numpy values of type {shown(code)}")
        self.value = np.dtype(code)

    def build(self, state: Any) -> None:
        """numpy's state (version, byte order, ...); subtypes and fields are refused."""
        _, order, *rest = _parts(state)
        if not isinstance(order, str) or order not in ("<", "|", ">") or any(part is not None for part in rest[:3]):
            raise Refused("numpy values with fields")
        self.value = self.value.newbyteorder(order)  # type: ignore[arg-type]


class PickledArray(Buildable):
    """A numpy array; value is empty until the state was read."""

    value = np.empty(0)

    def build(self, state: Any) -> None:
        """numpy's state (version, shape, dtype, is Fortran, bytes)."""
        _, shape, dtype, is_fortran, data = _parts(state)
        if isinstance(dtype, Buildable) and dtype.refused is not None:
            raise Refused(dtype.refused)
        if not isinstance(dtype, PickledDtype) or not isinstance(data, bytes):
            raise Refused("a numpy array of Python objects")
        array = np.frombuffer(data, dtype.value).reshape(_sizes(shape), order="F" if is_fortran else "C")
        native = dtype.value.newbyteorder("=")
        self.copied = 0 if array.dtype == native else array.nbytes
        self.value = array.astype(native, copy=False)


class PickledImage(Buildable):
    """A PIL image; value (H, W, 3) uint8 is empty until the state was read. stored: bytes that it has in the file."""

    value = np.empty((0, 0, 3), np.uint8)
    stored = 0

    def build(self, state: Any) -> None:
        """PIL's state [info, mode, (width, height), palette, bytes, ...]. Modes L and RGB; grey is repeated."""
        _, mode, size, _, data, *_ = _parts(state)
        if not isinstance(mode, str) or mode not in _BANDS or not isinstance(data, bytes):
            raise Refused(f"a PIL image of mode {shown(mode)}")
        width, height = _sizes(size)
        pixels = np.frombuffer(data, np.uint8).reshape(height, width, _BANDS[mode])
        self.value, self.stored = np.broadcast_to(pixels, (height, width, 3)), len(data)


def _parts(state: Any) -> tuple[Any, ...] | list[Any]:
    """A state of a few parts: one of a million, in the memo, would be copied at each use."""
    if not isinstance(state, tuple | list) or len(state) > _MOST_STATE:
        raise ValueError("state")
    return state


def _sizes(sizes: Any) -> tuple[int, ...]:
    if not isinstance(sizes, tuple | list) or len(sizes) > _MAX_DIMENSIONS:
        raise ValueError("sizes")
    if not all(type(size) is int and 0 <= size < _MOST_VALUES for size in sizes):
        raise ValueError("sizes")
    return tuple(sizes)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """torch's view of a storage. The rest: whether it wants gradients, hooks (none can be made), metadata."""
    if not isinstance(storage, Tensor) or type(offset) is not int or not 0 <= offset < _MOST_VALUES:
        raise ValueError("storage")
    size, stride = _sizes(size), _sizes(stride)
    if math.prod(size) > storage.numel():
        raise ValueError("tensor larger than its storage")
    return torch.as_strided(storage, size, stride, offset)  # which checks the bounds


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError("parameter")
    return data


def _ordered_dict(items: Any = ()) -> Attributed:
    made = Attributed()
    for pair in as_list(items):
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], str | int):
            raise Refused("an OrderedDict of no pairs")
        made[pair[0][:_MOST_KEY] if isinstance(pair[0], str) else shown(pair[0])] = pair[1]
    return made


def _number(dtype: Any, data: Any) -> int | float | bool:
    if not isinstance(dtype, PickledDtype) or dtype.refused is not None or not isinstance(data, bytes):
        raise Refused("a numpy value that is a Python object")
    number: int | float | bool = np.frombuffer(data, dtype.value).reshape(()).item()
    return number


def _bytes(text: Any = "", encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or not isinstance(encoding, str) or encoding not in ("latin1", "latin-1"):
        raise Refused(f"bytes in {shown(encoding)}")
    return text.encode("latin1")


def as_list(items: Any = ()) -> list[Any]:
    """A list as it is, a tuple as a list; nothing else, which could be a tensor or a text, is taken apart."""
    if not isinstance(items, tuple | list):
        raise Refused(f"a collection from a {type(items).__name__}")
    return items if isinstance(items, list) else list(items)


ALLOWED: dict[str, Callable[..., Any] | None] = {
    **dict.fromkeys(STORAGES),
    **{str(dtype): None for dtype in _STORED.values()},
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": _sizes,
    "torch.device": lambda kind, index=None: f"{shown(kind)}:{shown(index)}",
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": lambda counts=None: counts if isinstance(counts, dict) else {},
    "collections.defaultdict": lambda *_: {},
    "_codecs.encode": _bytes,
    "PIL.Image.Image": PickledImage,
    "PIL.PngImagePlugin.PngImageFile": PickledImage,
    "numpy.ndarray": None,
    "numpy.dtype": PickledDtype,
    **{f"{builtins}.{kind}": None for builtins in _BUILTINS for kind in ("dict", "list", "int", "float")},
    **{f"{builtins}.bytes": _bytes for builtins in _BUILTINS},
    **{f"{builtins}.{kind}": as_list for builtins in _BUILTINS for kind in ("set", "frozenset")},
    **{f"numpy.{core}.multiarray._reconstruct": lambda *_: PickledArray() for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _number for core in ("core", "_core")},
}
