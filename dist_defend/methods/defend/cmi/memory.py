"""CMI's memories on the device: a pool of all images so far, and a bank of the latest features."""

from typing import Any

import torch
from torch import Tensor


class ImagePool:
    """Every synthesised image as (H, W, 3) uint8; at most ``capacity``."""

    def __init__(self, capacity: int, size: int, device: torch.device) -> None:
        self.images = torch.zeros(capacity, size, size, 3, dtype=torch.uint8, device=device)
        self.count = 0

    def add(self, images: Tensor) -> None:
        """images (B, 3, H, W) in [0, 1]; truncated to whole grey levels, as a PNG file would hold them."""
        levels = (images.detach() * 255).to(torch.uint8).permute(0, 2, 3, 1)
        self.images[self.count : self.count + len(levels)] = levels
        self.count += len(levels)

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images[: self.count]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = len(state["images"])
        self.images[: self.count] = state["images"]


class MemoryBank:
    """A ring buffer of the latest feature rows (size, D)."""

    def __init__(self, size: int, dim: int, device: torch.device, dtype: torch.dtype) -> None:
        self.rows = torch.zeros(size, dim, device=device, dtype=dtype)
        self.added = 0  # rows since the start, overwritten ones included

    @property
    def filled(self) -> int:
        return min(self.added, len(self.rows))

    def add(self, rows: Tensor) -> None:
        """rows (B, D), B at most the size; the oldest rows are overwritten."""
        places = (self.added + torch.arange(len(rows), device=rows.device)) % len(self.rows)
        self.rows[places] = rows.detach()
        self.added += len(rows)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows[: self.filled], "added": self.added}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.added = state["added"]
        self.rows[: self.filled] = state["rows"]
