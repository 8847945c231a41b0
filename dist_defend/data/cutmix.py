"""CutMix (Yun et al. 2019) without labels: a box of every image is replaced by that of another image of the batch."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_defend.batch import Batch
from dist_defend.bounds import positive, share
from dist_defend.data.loader import Loader
from dist_defend.data.order import rank_slice
from dist_defend.ops.collectives import all_gather_rows, rank, world_size
from dist_defend.ops.streams import Stream, draws
from dist_defend.ops.transfer import to_device


@dataclass(frozen=True)
class CutMixConfig:
    """What CutMix draws for each batch.

    Keys:
        probability: with which a batch is mixed
        beta: the box leaves a share lambda ~ Beta(beta, beta) of the image
    """

    probability: float = 1.0
    beta: float = 0.25

    def __post_init__(self) -> None:
        share(self, "probability")
        positive(self, "beta")


@dataclass(frozen=True, eq=False)
class Mix:
    """Pixels [top, bottom) x [left, right) come from image ``partners[i]`` (B,) of the global batch."""

    top: int
    bottom: int
    left: int
    right: int
    partners: np.ndarray


def draw_mix(config: CutMixConfig, size: int, batch_size: int, seed: int, epoch: int, number: int) -> Mix:
    """Of the number-th global batch of an epoch, images of size x size pixels; an empty box if it is not mixed.

    The box has sides sqrt(1 - lambda) size around a uniform centre and is cut off at the border, as published.
    """
    draw = draws(seed, Stream.CUTMIX, epoch, number)
    is_mixed, kept = draw.random() < config.probability, draw.beta(config.beta, config.beta)
    half = int(size * np.sqrt(1 - kept)) // 2 if is_mixed else 0
    y, x = draw.integers(size, size=2)
    top, bottom, left, right = (int(np.clip(edge, 0, size)) for edge in (y - half, y + half, x - half, x + half))
    return Mix(top, bottom, left, right, draw.permutation(batch_size))


class CutMixLoader:
    """A loader's batches, mixed. Boxes and partners are drawn over the global batch, so ranks exchange their images."""

    def __init__(self, loader: Loader, config: CutMixConfig, seed: int) -> None:
        self.loader, self.config, self.seed = loader, config, seed
        self.num_batches = loader.num_batches

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """This rank's shares of the epoch's global batches, from the start_batch-th on; whole batches, equal shares."""
        size = self.loader.batch_size
        own = rank_slice(size, rank(), world_size())
        for number, batch in enumerate(self.loader.epoch(epoch, start_batch), start_batch):
            mix = draw_mix(self.config, batch.images.shape[2], size, self.seed, epoch, number)
            everyone = all_gather_rows(batch.images, rows=[len(batch.labels)] * world_size())
            partners = to_device(torch.from_numpy(mix.partners[own]), batch.images.device)
            yield batch._replace(views=(mixed(batch.images, everyone[partners], mix),))


def mixed(images: Tensor, others: Tensor, mix: Mix) -> Tensor:
    """images (b, 3, H, W) with the box taken from ``others``, image by image."""
    result = images.clone()
    box = (..., slice(mix.top, mix.bottom), slice(mix.left, mix.right))
    result[box] = others[box]
    return result
