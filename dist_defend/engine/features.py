"""Features by frozen encoders, computed once; every rank makes and keeps its share of the rows."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn

from dist_defend.counts import unit_features
from dist_defend.data.order import rank_slice
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context, Place
from dist_defend.ops.collectives import all_gather_rows, all_reduce_sum

_IMAGES_AT_ONCE = 512  # over all ranks


@torch.no_grad()
def moments(rows: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance, each (E, 1, D), over the rows (n, E, D) of all ranks, ``total`` together."""
    mean = all_reduce_sum(rows.sum(0)) / total
    return mean[:, None], all_reduce_sum((rows - mean).square().sum(0))[:, None] / (total - 1)


def standardise(features: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(v - mean) / sqrt(variance + 1e-5) of each feature, as SSLBKD's linear probe has its inputs."""
    return (features - mean) / (variance + 1e-5).sqrt()


class FrozenFeatures:
    """f(x) / |f(x)| of N chosen images, not augmented, by E encoders with features of one length D.

    Rank r of W keeps the r-th of W contiguous shares: N E D / W numbers, on its device or in a mapped file. Rows go to
    whom they serve batch by batch: each is the sum over ranks of zeros and of what its keeper has, so it is exact, and
    the order of the samples needs to know nothing of the shares. Computed when first asked for, so a resume on any
    number of ranks computes it anew.
    """

    def __init__(
        self,
        encoders: Sequence[nn.Module],
        feature_dim: int,
        context: Context,
        dataset: PreparedDataset,
        rows: np.ndarray,
        place: Place = "memory",
    ) -> None:
        self.encoders, self.feature_dim, self.context, self.place = list(encoders), feature_dim, context, place
        ranks = context.ranks
        self.total, self.own = len(rows), rank_slice(len(rows), ranks.rank, ranks.world_size)
        at_once = -(-_IMAGES_AT_ONCE // ranks.world_size)
        self.loader = context.whole_loader(dataset, rows[self.own], at_once)

    @cached_property
    @torch.no_grad()
    def table(self) -> Tensor:
        """This rank's share (n, E, D); one unused row where it has none."""
        shape = (max(1, self.own.stop - self.own.start), len(self.encoders), self.feature_dim)
        table = self.context.room(shape, self.place)
        for number, encoder in enumerate(self.encoders):
            for place, features in self._passes(encoder):
                table[place, number] = features.to(table.device)
        return table

    @torch.no_grad()
    def take(self, positions: Tensor, counts: Sequence[int]) -> Tensor:
        """Features (E, b, D) of the images at positions (b,) among the N; by all ranks together, of which r asks for
        counts[r]."""
        ranks = self.context.ranks
        wanted = all_gather_rows(positions, counts) - self.own.start
        is_own = (wanted >= 0) & (wanted < self.own.stop - self.own.start)
        rows = self.table[wanted.clamp(0, len(self.table) - 1).to(self.table.device)].to(wanted.device)
        if ranks.world_size > 1:
            before = sum(counts[: ranks.rank])
            rows = all_reduce_sum(torch.where(is_own[:, None, None], rows, 0))[before : before + len(positions)]
        return rows.transpose(0, 1)

    @torch.no_grad()
    def mean_cosine(self, encoder: nn.Module) -> float:
        """Mean cosine between another encoder's features of the N images and the first encoder's."""
        ranks = self.context.ranks
        total = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for place, features in self._passes(encoder):
            total += (features * self.table[place, 0].to(features.device)).sum()
        return all_reduce_sum(total).item() / self.total

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of each feature over the N images, each (E, 1, D), on the rank's device."""
        return moments(self.table[: self.own.stop - self.own.start].to(self.context.ranks.device), self.total)

    def forget(self) -> None:
        """Let go of the table; asked again, it is computed anew."""
        self.__dict__.pop("table", None)

    def _passes(self, encoder: nn.Module) -> Iterator[tuple[slice, Tensor]]:
        """Places in this rank's share and the features (b, D) that belong there."""
        done = 0
        was_training = encoder.training
        encoder.eval()
        for batch in self.loader.epoch(0) if self.own.stop > self.own.start else ():
            features = unit_features(encoder, batch.images.to(self.context.ranks.device), self.context.ranks)
            yield slice(done, done + len(features)), features
            done += len(features)
        encoder.train(was_training)
