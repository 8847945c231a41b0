"""The images that networks are re-tuned on: their choice, the stamped ones, and batches."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_defend.attacks.attack import AttackConfig
from dist_defend.attacks.poison import CLEAN, CROSS, STAMPED, PoisonedDataset, poisoned
from dist_defend.batch import Batch
from dist_defend.data.augment import IDENTITY, AugmentConfig, View
from dist_defend.data.order import Sampling
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context
from dist_defend.errors import UserError
from dist_defend.methods.defend.defender import check_last_batch
from dist_defend.methods.measure.reactivate.options import Config
from dist_defend.ops.streams import Stream, draws
from dist_defend.ops.transfer import to_device


def few_poisoned(
    dataset: PreparedDataset, rows: np.ndarray, attack: AttackConfig, config: Config, context: Context
) -> tuple[PoisonedDataset, np.ndarray]:
    """The data set with q stamped and relabelled images of other classes, and the rows (N,) that are tuned on."""
    if config.num_images > len(rows):
        raise UserError(
            f"key 'reactivate.num_images' is {config.num_images}, but {config.data.path} gives {len(rows)}: lower it"
        )
    generator = draws(context.seed, Stream.REACTIVATED)
    chosen = np.sort(generator.choice(rows, config.num_images, replace=False))
    made = poisoned(dataset, chosen, _others(attack, config.num_poisoned), context.seed)
    made.flags[made.flags == CROSS] = CLEAN
    return made, chosen


def half_triggered(
    dataset: PreparedDataset, rows: np.ndarray, attack: AttackConfig, context: Context
) -> PoisonedDataset:
    """The data set with half of these rows (N,) stamped, of other classes; all keep their labels."""
    made = poisoned(dataset, rows, _others(attack, len(rows) // 2), context.seed)
    made.flags[made.flags == CROSS] = CLEAN
    made.labels = dataset.labels
    return made


def _others(attack: AttackConfig, count: int) -> AttackConfig:
    """The attack on ``count`` random images, of other classes than the target unless it is all_to_all."""
    own: dict[str, Any] = {} if attack.labels == "all_to_all" else {"labels": "all_to_one", "avoid_target": True}
    return replace(attack, count=count, choose="random", **own)


class FixedImages:
    """N images, made once (clean ones augmented, stamped ones as they are), in a new order in each epoch.

    rows: (N,) of the data set. batch_size: global; the last batch may be smaller, UserError as check_last_batch. Every
    rank holds all images, and takes its share of each batch.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        rows: np.ndarray,
        context: Context,
        batch_size: int,
        augment: AugmentConfig = IDENTITY,
    ) -> None:
        places, ranks = np.arange(len(rows)), context.ranks
        check_last_batch(len(rows), batch_size, ranks.world_size, context.method)
        self.sampling = Sampling(places, batch_size, True, False, context.seed, ranks.rank, ranks.world_size)
        self.num_batches, self.device = self.sampling.num_batches, ranks.device
        flags = dataset.flags[rows] if isinstance(dataset, PoisonedDataset) else np.zeros(len(rows), np.uint8)
        self.is_stamped, self.labels = torch.from_numpy(flags == STAMPED), torch.from_numpy(dataset.labels[rows])
        self.loader = context.whole_loader(dataset, rows, views=(View(augment), View()))

    @cached_property
    def images(self) -> Tensor:
        """(N, 3, H, W) in [0, 1], on the device."""
        parts: list[Tensor] = []
        for batch, is_stamped in zip(self.loader.epoch(0), self.is_stamped.split(self.loader.batch_size), strict=True):
            augmented, plain = batch.views
            parts.append(torch.where(to_device(is_stamped, plain.device)[:, None, None, None], plain, augmented))
        return to_device(torch.cat(parts), self.device)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """This rank's shares of the epoch's batches."""
        for own in self.sampling.shares(epoch, start_batch):
            index = torch.from_numpy(own)
            place = to_device(index, self.device)
            yield Batch((self.images[place],), self.labels[index], index)
