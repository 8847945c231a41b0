"""Copies from the host to a GPU for which the host does not wait."""

import torch
from torch import Tensor


def is_apart(device: torch.device) -> bool:
    """Whether a device has memory and streams of its own, so that the host can wait for it."""
    return device.type != "cpu"


def to_device(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor on the device, in ``dtype`` where that is given; it itself if it is there already.

    From the host to a GPU by way of pinned memory: copies from other memory are synchronous, even with non_blocking.
    torch keeps the pinned memory until the copy is done.
    """
    tensor = tensor if dtype is None else tensor.to(dtype)
    if is_apart(device) and not is_apart(tensor.device):
        tensor = tensor.pin_memory()  # itself if it is pinned
    return tensor.to(device, non_blocking=True)
