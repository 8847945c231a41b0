"""The generator's inputs: normal draws that depend on the seed and the pseudo-batch alone."""

from collections.abc import Iterator

import torch

from dist_defend.batch import Batch
from dist_defend.data.order import rank_slice
from dist_defend.engine.dist import Ranks
from dist_defend.ops.streams import Stream, draws


class LatentBatches:
    """Epoch n is pseudo-batch n: z ~ N(0, I), (batch_size, z_dim) over all ranks, drawn from (seed, n).

    A batch's only view is this rank's rows of z, float64; its labels are 0 and without meaning.
    """

    num_batches = 1

    def __init__(self, batch_size: int, z_dim: int, seed: int, ranks: Ranks) -> None:
        self.batch_size, self.z_dim, self.seed = batch_size, z_dim, seed
        self.own = rank_slice(batch_size, ranks.rank, ranks.world_size)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The pseudo-batch's one batch."""
        if start_batch == 0:
            rows = torch.arange(self.own.start, self.own.stop)
            yield Batch((self.draw(epoch)[self.own],), torch.zeros_like(rows), rows)

    def draw(self, number: int) -> torch.Tensor:
        """All rows of a pseudo-batch's z."""
        rows = draws(self.seed, Stream.ZSKT_INPUTS, number).standard_normal((self.batch_size, self.z_dim))
        return torch.from_numpy(rows)
