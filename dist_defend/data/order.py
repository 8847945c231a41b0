"""One permutation per epoch over the whole data set, cut into global batches, each cut by rank.

The order knows nothing of ranks, so the same samples meet in the same batch for any world size, and the number of
global batches done is a resume point that outlives a change of the world size.
"""

import numpy as np


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Positions 0..n-1 in the order of this epoch, (n,) int64; ``seed`` and ``epoch`` are not negative."""
    if not shuffle:
        return np.arange(n, dtype=np.int64)
    return np.random.default_rng([seed, epoch]).permutation(n).astype(np.int64, copy=False)


def rank_slice(n: int, rank: int, world_size: int) -> slice:
    """The contiguous share of a rank in a batch of n, with the bounds of np.array_split; may be empty."""
    share, extra = divmod(n, world_size)
    start = rank * share + min(rank, extra)
    return slice(start, start + share + (rank < extra))


def rank_batches(
    order: np.ndarray, batch_size: int, start_batch: int, drop_last: bool, rank: int, world_size: int
) -> list[np.ndarray]:
    """This rank's share of every global batch from ``start_batch`` on; empty shares (uneven last batch) are left out."""
    stop = len(order) // batch_size * batch_size if drop_last else len(order)
    batches = (order[i : min(i + batch_size, stop)] for i in range(start_batch * batch_size, stop, batch_size))
    shares = (batch[rank_slice(len(batch), rank, world_size)] for batch in batches)
    return [share for share in shares if len(share)]
