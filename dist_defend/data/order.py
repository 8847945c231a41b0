"""One permutation per epoch over the whole data set, cut into global batches, each cut by rank.

The order knows nothing of ranks, so the same samples meet in the same batch for any world size, and the number of
global batches done is a resume point that outlives a change of the world size.
"""

from dataclasses import dataclass

import numpy as np

from dist_defend.ops.streams import order_draws


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Positions 0..n-1 in the order of this epoch, (n,) int64; ``seed`` and ``epoch`` are not negative."""
    if not shuffle:
        return np.arange(n, dtype=np.int64)
    return order_draws(seed, epoch).permutation(n).astype(np.int64, copy=False)


def rank_slice(n: int, rank: int, world_size: int) -> slice:
    """The contiguous share of a rank in a batch of n, with the bounds of np.array_split; may be empty."""
    share, extra = divmod(n, world_size)
    start = rank * share + min(rank, extra)
    return slice(start, start + share + (rank < extra))


@dataclass(frozen=True, eq=False)
class Sampling:
    """Which rows of a data set make which batch of which rank. rows: (M,) int64; batch_size: over all ranks."""

    rows: np.ndarray
    batch_size: int
    shuffle: bool
    drop_last: bool
    seed: int
    rank: int
    world_size: int

    @property
    def num_batches(self) -> int:
        """Global batches per epoch; an incomplete last one counts unless ``drop_last``."""
        whole, rest = divmod(len(self.rows), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def shares(self, epoch: int, start_batch: int = 0) -> list[np.ndarray]:
        """This rank's rows of every global batch from ``start_batch`` on, without empty ones (uneven last batch)."""
        order = self.rows[epoch_order(len(self.rows), self.seed, epoch, self.shuffle)]
        shares = []
        for batch in range(start_batch, self.num_batches):
            rows = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            shares.append(rows[rank_slice(len(rows), self.rank, self.world_size)])
        return [share for share in shares if len(share)]
