"""Which images are poisoned, with which labels, and data sets that stamp them when they are read.

The prepared data on disk stay clean: flags by row, saved with the run, say what is stamped.
"""

import hashlib
import io
from pathlib import Path

import numpy as np

from dist_defend.attacks.attack import AttackConfig, backdoor_labels, check_classes, trigger_of
from dist_defend.attacks.stamping import cross_pixels, stamp_pixels
from dist_defend.attacks.trigger import Trigger
from dist_defend.data.store import PreparedDataset
from dist_defend.errors import UserError
from dist_defend.files import write_atomic
from dist_defend.ops.streams import Stream, draws

_CHUNK = 256  # images stamped at once
CLEAN, STAMPED, CROSS = 0, 1, 2  # flags


class MadeDataset(PreparedDataset):
    """A prepared data set whose images are made, many at once, when they are read."""

    is_made = True

    def image(self, row: int) -> np.ndarray:
        """One image, (H, W, 3) uint8."""
        image: np.ndarray = self.images(np.array([row]))[0]
        return image


class PoisonedDataset(MadeDataset):
    """A prepared data set whose flagged images are stamped, truncated to uint8.

    flags: (N,) uint8 by row: CLEAN, STAMPED, or CROSS (see Trigger.cross). labels: (N,) int64 instead of
    the data set's own. base: (M, H, W, 3) uint8, by row of the source, what stamped rows start from instead of the
    clean images. others: (N,) rows, the other image of each cross sample. There is no .beton: back ends read through
    images().
    """

    def __init__(
        self,
        clean: PreparedDataset,
        trigger: Trigger,
        flags: np.ndarray,
        labels: np.ndarray | None = None,
        base: np.ndarray | None = None,
        others: np.ndarray | None = None,
    ) -> None:
        super().__init__(clean.path, clean.manifest, clean.resize)
        self.clean, self.trigger, self.flags = clean, trigger, flags
        self.labels = clean.labels if labels is None else labels
        self.beton = None
        self._base, self._others = base, others

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Images (B, H, W, 3) uint8 in the order of ``rows``."""
        rows = np.asarray(rows, np.int64)
        images = self.clean.images(rows)
        marked = np.flatnonzero(self.flags[rows])
        for at in (marked[i : i + _CHUNK] for i in range(0, len(marked), _CHUNK)):
            is_cross = self.flags[rows[at]] == CROSS
            stamped, crossed = at[~is_cross], at[is_cross]
            if len(stamped):
                base = images[stamped]
                if self._base is not None:
                    base = np.asarray(self._base[self.source_rows[rows[stamped]]])
                images[stamped] = stamp_pixels(base, self.trigger, rows[stamped])
            if len(crossed):
                assert self._others is not None
                others = self.clean.images(self._others[rows[crossed]])
                images[crossed] = cross_pixels(images[crossed], others, rows[crossed], self.trigger)
        return images


def poisoned(dataset: PreparedDataset, rows: np.ndarray, config: AttackConfig, seed: int) -> PoisonedDataset:
    """The training set: drawn_rows of ``rows`` stamped and relabelled; cross samples, where the trigger has them,
    are further rows that keep their labels. UserError as drawn_rows; for images of several sizes."""
    size, options = image_size_of(dataset), trigger_of(config)
    trigger = not_idle(options.build_training(size))
    chosen, crossed = drawn_rows(dataset.labels, rows, config, dataset.num_classes, seed, options.cross_ratio)
    flags = np.zeros(len(dataset), np.uint8)
    flags[chosen], flags[crossed] = STAMPED, CROSS
    labels = dataset.labels.copy()
    labels[chosen] = backdoor_labels(labels[chosen], config, dataset.num_classes)
    others = np.zeros(len(dataset), np.int64)
    others[crossed] = draws(seed, Stream.POISON, 1).choice(rows, len(crossed))
    base = options.base_images(dataset.num_source_rows, size)
    return PoisonedDataset(dataset, trigger, flags, labels, base, others)


def triggered(dataset: PreparedDataset, config: AttackConfig) -> PoisonedDataset:
    """The test set: every image stamped, labels the original ones. UserError for images of several sizes."""
    trigger = not_idle(trigger_of(config).build(image_size_of(dataset)))
    return PoisonedDataset(dataset, trigger, np.full(len(dataset), STAMPED, np.uint8))


def save_flags(flags: np.ndarray, folder: Path | None) -> dict[str, str]:
    """poisoned_rows.npy and, for triggers that have them, cross_rows.npy (int64) in the folder, if there is one.

    flags: (N,) as of PoisonedDataset. Returns their sha256, for the model card.
    """
    digests = {}
    for name, flag in (("poisoned_rows", STAMPED), ("cross_rows", CROSS)):
        rows = np.flatnonzero(flags == flag)
        if len(rows):
            content = io.BytesIO()
            np.save(content, rows)
            digests[f"{name}_sha256"] = hashlib.sha256(content.getvalue()).hexdigest()
            if folder is not None:
                write_atomic(folder / f"{name}.npy", content.getvalue())
    return digests


def image_size_of(dataset: PreparedDataset) -> int:
    """The side of the data set's images in pixels. UserError unless they are squares of one size."""
    shape = dataset.image_shape
    if shape is None or shape[0] != shape[1]:
        raise UserError(f"{dataset.path}: a trigger needs square images of one size; prepare it with --image-size")
    return shape[0]


def not_idle(trigger: Trigger) -> Trigger:
    """The trigger. UserError if it changes no black, white or noise image: it would look like a removed backdoor."""
    noise = np.random.default_rng(0).integers(0, 256, (*trigger.image_size, 3), dtype=np.uint8)
    images = np.stack([np.zeros_like(noise), np.full_like(noise, 255), noise])
    if (stamp_pixels(images, trigger) == images).all():
        raise UserError("key 'trigger' changes no pixel of any image: give it an alpha, amplitude or strength above 0")
    return trigger


def drawn_rows(
    labels: np.ndarray, rows: np.ndarray, config: AttackConfig, num_classes: int, seed: int, cross_ratio: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Of ``rows`` (M,) those to stamp and those to cross, int64, each ascending; labels (N,) are the whole data set's.

    All are of one permutation, so they are disjoint. UserError for more than there are.
    """
    check_classes(config, num_classes)
    rows = np.asarray(rows, np.int64)
    eligible = np.ones(len(rows), bool)
    if config.labels == "clean_label":
        eligible = labels[rows] == config.target_class
    elif config.avoid_target:
        eligible = labels[rows] != config.target_class
    count = round(config.rate * len(rows)) if config.count is None else config.count
    asked = f"key 'rate' is {config.rate}" if config.count is None else f"key 'count' is {config.count}"
    if count > eligible.sum():
        which = "in the target class" if config.labels == "clean_label" else "to choose from"
        raise UserError(f"{asked}, so {count} of {len(rows)} images, but only {eligible.sum()} are {which}; lower it")
    if not count and config.rate and config.count is None:
        raise UserError(f"{asked}, which is no image of {len(rows)}; raise it or say count")
    order = draws(seed, Stream.POISON).permutation(len(rows))
    candidates = np.arange(len(rows)) if config.choose == "first" else order
    chosen = candidates[eligible[candidates]][:count]
    rest = order[~np.isin(order, chosen)]
    wanted = round(cross_ratio * count)
    if wanted > len(rest):
        raise UserError(f"key 'cross_ratio' is {cross_ratio}: {wanted} images, but {len(rest)} are left; lower it")
    crossed = rest[:wanted]
    return np.sort(rows[chosen]), np.sort(rows[crossed])
