"""The batches of a round: all for the inner maximisation, in each order, then once all for the outer minimisation."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from dist_defend.batch import Batch
from dist_defend.data.loader import Loader
from dist_defend.data.order import rank_slice
from dist_defend.engine.dist import Ranks

_MOST_KEPT = 1 << 30  # bytes of images that may stay on a device


class KeptPass:
    """All batches of a pass on the device, for captured steps that take one after the other without the host.

    images (T, B, H, W, 3), labels and weights (T, B), padded; next: number of the batch that take() returns.
    """

    def __init__(self, batches: list[Batch], padded: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        images, labels, weights = zip(*padded, strict=True)
        self.images = torch.stack([part.permute(0, 2, 3, 1) for part in images])
        self.labels, self.weights = torch.stack(labels), torch.stack(weights)
        self.next = torch.zeros(1, dtype=torch.int64, device=self.labels.device)
        self._expected = 0  # the value of self.next, known on the host without waiting for the device
        self.batches = [batch._replace(views=()) for batch in batches]

    def aim(self, number: int) -> None:
        """Have the next update take this batch, and later ones those after it."""
        if number != self._expected:
            self.next.fill_(number)
        self._expected = (number + 1) % len(self.batches)

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W), labels and weights (B,), chosen on the device; for updates alone."""
        taken = (table.index_select(0, self.next)[0] for table in (self.images, self.labels, self.weights))
        images, labels, weights = taken
        self.next.add_(1).remainder_(len(self.batches))
        return images.permute(0, 3, 1, 2), labels, weights


class Rounds:
    """Epoch r is round r: the T batches of an inner pass, as often as there are orders, then those of the outer pass.

    The outer pass is the loader's epoch 0, inner pass k of N is its epoch 1 + r N + k. With a loader that shuffles and
    augments, the outer pass thus sees the same images in every round, drawn once, and the inner pass new ones, as in
    SCLBD/BackdoorBench. With one that does neither all passes are the same, except that inner passes k > 0 have their
    images in a drawn order. Every rank gets every batch, even if its share is empty.
    """

    def __init__(
        self, loader: Loader, image_size: int, ranks: Ranks, is_constant: bool = False, orders: int = 1
    ) -> None:
        """is_constant: the loader neither shuffles nor augments. orders: inner passes of a round."""
        self.is_constant, self.orders = is_constant, orders
        self.shuffled = loader.shuffled() if orders > 1 else loader
        self.kept: KeptPass | None = None
        self.loader, self.image_size, self.ranks = loader, image_size, ranks
        self.batches = loader.num_batches  # T
        self.inner_batches = orders * loader.num_batches  # of a round
        self.num_batches = self.inner_batches + loader.num_batches

    def keep(self) -> KeptPass | None:
        """Read all batches once and keep them on the device; None where passes differ, or are large.

        Batches of epoch() are then without images, and in the order of the pass.
        """
        size = self.batches * self.share * 3 * self.image_size**2 * self.ranks.dtype.itemsize
        if self.is_constant and self.orders == 1 and size <= _MOST_KEPT:
            batches = [self._moved(batch) for batch in self._pass(self.loader, 0, 0)]
            self.kept = KeptPass(batches, [self.padded(batch, number) for number, batch in enumerate(batches)])
        return self.kept

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """This rank's shares of the round's batches from ``start_batch`` on."""
        for number in range(start_batch // self.batches, self.orders):
            loader = self.shuffled if number else self.loader
            start = max(0, start_batch - number * self.batches)
            yield from self._pass(loader, 1 + epoch * self.orders + number, start)
        yield from self._pass(self.loader, 0, max(0, start_batch - self.inner_batches))

    def size(self, number: int) -> int:
        """Images of the number-th batch of a pass over all ranks."""
        return min(self.loader.batch_size, self.loader.num_samples - number * self.loader.batch_size)

    def own(self, number: int) -> slice:
        """This rank's slice of the number-th batch."""
        return rank_slice(self.size(number), self.ranks.rank, self.ranks.world_size)

    def padded(self, batch: Batch, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and weights of this rank's share, padded so that all batches have one length.

        Weights are 1 / size for images and 0 for padding, so a weighted sum, summed over ranks, is the batch's mean.
        In eval mode images do not influence each other, so padding changes nothing.
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
        return self.padded(self._moved(next(self._pass(self.loader, 0, 0))), 0)

    def _moved(self, batch: Batch) -> Batch:
        device, dtype = self.ranks.device, self.ranks.dtype
        return Batch((batch.images.to(device, dtype),), batch.labels.to(device), batch.index.to(device))

    def _pass(self, loader: Loader, epoch: int, start_batch: int) -> Iterator[Batch]:
        if self.kept is not None:
            yield from self.kept.batches[start_batch:]
            return
        done = start_batch
        for batch in loader.epoch(epoch, start_batch):
            done += 1
            yield batch
        for _ in range(done, self.batches):
            nothing = torch.zeros(0, dtype=torch.int64)
            yield Batch((torch.zeros(0, 3, self.image_size, self.image_size),), nothing, nothing)
