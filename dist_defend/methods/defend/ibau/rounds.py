"""The batches of a round: once all for the inner maximisation, then once all for the outer minimisation."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from dist_defend.batch import Batch
from dist_defend.data.loader import Loader
from dist_defend.data.order import rank_slice
from dist_defend.engine.dist import Ranks


class Rounds:
    """Epoch r is round r: T batches of the loader's epoch r + 1, then the T batches of its epoch 0.

    With a loader that shuffles and augments, the outer pass thus sees the same images in every round, drawn once, and
    the inner pass new ones, as SCLBD/BackdoorBench has it; with one that does neither all passes are the same.
    Every rank gets every batch, even if its own share is empty.
    """

    def __init__(self, loader: Loader, image_size: int, ranks: Ranks) -> None:
        self.loader, self.image_size, self.ranks = loader, image_size, ranks
        self.batches = loader.num_batches  # T
        self.num_batches = 2 * loader.num_batches

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """This rank's shares of the round's batches from ``start_batch`` on."""
        if start_batch < self.batches:
            yield from self._pass(epoch + 1, start_batch)
        yield from self._pass(0, max(0, start_batch - self.batches))

    def size(self, number: int) -> int:
        """Images of the number-th batch of a pass over all ranks."""
        return min(self.loader.batch_size, self.loader.num_samples - number * self.loader.batch_size)

    def own(self, number: int) -> slice:
        """This rank's part of that batch."""
        return rank_slice(self.size(number), self.ranks.rank, self.ranks.world_size)

    def padded(self, batch: Batch, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and weights of this rank's share, all batches of one length.

        Weights are 1 / size for images and 0 for padding, so a weighted sum, summed over ranks, is the batch's mean.
        In eval mode no image sees another one, so padding changes nothing.
        """
        more = self.share - len(batch.labels)
        weights = torch.full_like(batch.labels, 1, dtype=batch.images.dtype) / self.size(number)
        images = functional.pad(batch.images, (0, 0, 0, 0, 0, 0, 0, more))
        images = images.contiguous(memory_format=torch.channels_last)
        return images, functional.pad(batch.labels, (0, more)), functional.pad(weights, (0, more))

    @property
    def share(self) -> int:
        """The length to pad to: the largest share of a rank in a batch."""
        return -(-self.size(0) // self.ranks.world_size)

    def first(self) -> tuple[Tensor, Tensor, Tensor]:
        """The first batch of the outer pass, padded, on the device."""
        device, dtype = self.ranks.device, self.ranks.dtype
        batch = next(self._pass(0, 0))
        moved = Batch((batch.images.to(device, dtype),), batch.labels.to(device), batch.index.to(device))
        return self.padded(moved, 0)

    def _pass(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        done = start_batch
        for batch in self.loader.epoch(epoch, start_batch):
            done += 1
            yield batch
        for _ in range(done, self.batches):
            nothing = torch.zeros(0, dtype=torch.int64)
            yield Batch((torch.zeros(0, 3, self.image_size, self.image_size),), nothing, nothing)
