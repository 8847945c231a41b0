"""What a loader yields and a step consumes."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One rank's share of a global batch.

    views: each (B, 3, H, W) float32 in [0, 1], channels_last in memory; two of them for SimCLR.
    labels: (B,) int64. index: (B,) int64, rows of the data set (they key caches and random draws).
    """

    views: tuple[Tensor, ...]
    labels: Tensor
    index: Tensor  # type: ignore[assignment]  # not tuple.index

    @property
    def images(self) -> Tensor:
        """The first view."""
        return self.views[0]
