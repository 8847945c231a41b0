"""Which images are poisoned, with which labels, and data sets that stamp them when they are read.

The prepared data on disk stay clean: flags by row, saved with the run, say what is stamped.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import dacite
import numpy as np
import torch
from torch import Tensor

from dist_defend.attacks.pattern_file import open_images
from dist_defend.attacks.patterns import LabelConsistent, PatternConfig
from dist_defend.attacks.stamp import CrossStamp, Stamp, grey_levels
from dist_defend.data.store import PreparedDataset
from dist_defend.errors import UserError
from dist_defend.ops.streams import Stream, draws

_CHUNK = 256  # images stamped at once
CLEAN, STAMPED, CROSS = 0, 1, 2  # flags

Labels = TypeVar("Labels", np.ndarray, Tensor)


@dataclass(frozen=True)
class PoisonConfig:
    """A trigger, and what it does to which images. Defaults are BackdoorBench's.

    all_to_one: images of any class become the target class. all_to_all: class y becomes y + shift. clean_label: only
    images of the target class are stamped and keep their label. ``rate`` counts against all training images.
    choose: random ones, by the run's seed, or the first in the prepared order. ABD's teachers have the first in the
    published order, which is the prepared one after `data prepare --keep-order`.
    images: triggered test images that others made, instead of a trigger (attacks/given.py). They can only be measured.
    """

    trigger: PatternConfig | None = None
    labels: Literal["all_to_one", "all_to_all", "clean_label"] = "all_to_one"
    target_class: int | None = None  # of a trigger 0; given images may bring their own
    rate: float = 0.1
    count: int | None = None  # images; replaces rate
    shift: int = 1
    avoid_target: bool = False  # all_to_one: choose among the other classes, as I-BAU does
    choose: Literal["random", "first"] = "random"
    images: str | None = None  # npz, or a prepared data set

    def __post_init__(self) -> None:
        if self.trigger is None and self.images is None:
            raise ValueError("key 'trigger' is missing: name one, or give others' triggered test images as 'images'")
        if self.trigger is not None and self.images is not None:
            raise ValueError("key 'images' is set, but 'trigger' says what is stamped: leave one out")
        if self.target_class is None and self.trigger is not None:
            object.__setattr__(self, "target_class", 0)
        if not 0 <= self.rate <= 1:
            raise ValueError(f"key 'rate' is {self.rate}; it must be in [0, 1]")
        if self.count is not None and self.count < 0:
            raise ValueError(f"key 'count' is {self.count}; it cannot be negative")
        if self.target_class is not None and self.target_class < 0:
            raise ValueError(f"key 'target_class' is {self.target_class}; it cannot be negative")
        if self.avoid_target and self.labels != "all_to_one":
            raise ValueError(f"key 'avoid_target' is true, but labels is {self.labels!r}; it needs all_to_one")


def poison_from(plain: dict[str, Any]) -> PoisonConfig:
    """The attack that ``dataclasses.asdict`` wrote into a model card. UserError if it is another thing."""
    try:
        return dacite.from_dict(PoisonConfig, plain, dacite.Config(strict=True))
    except (dacite.DaciteError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the model card's trigger is no classifier attack of this version: {error}") from error


def poisoned_rows(
    labels: np.ndarray, rows: np.ndarray, config: PoisonConfig, num_classes: int, seed: int
) -> np.ndarray:
    """The rows (P,) int64, ascending, to poison among ``rows`` (M,); labels (N,) are the whole data set's.

    P is count, or rate M rounded. UserError if the eligible images are too few, or if classes do not exist.
    """
    return _draw(labels, rows, config, num_classes, seed, 0.0)[0]


def backdoor_labels(labels: Labels, config: PoisonConfig, num_classes: int) -> Labels:
    """What a successful attack predicts on stamped images with these labels (N,)."""
    if config.labels == "all_to_all":
        return (labels + config.shift) % num_classes
    assert config.target_class is not None
    return labels * 0 + config.target_class


def trigger_of(config: PoisonConfig) -> PatternConfig:
    """What the attack stamps. UserError for given images, which say nothing of other ones."""
    if config.trigger is None:
        raise UserError(
            f"key 'images' is {config.images}: given images are measured, nothing is trained on them; name a 'trigger'"
        )
    return config.trigger


def check_classes(config: PoisonConfig, num_classes: int, prefix: str = "") -> None:
    """UserError unless the attack's classes are among so many, and other ones than the images'."""
    if config.target_class is not None and config.target_class >= num_classes:
        told = f"key '{prefix}target_class' is {config.target_class}"
        raise UserError(f"{told}; the classes are 0 to {num_classes - 1}")
    if config.labels == "all_to_all" and config.shift % num_classes == 0:
        told = f"key '{prefix}shift' is {config.shift}"
        raise UserError(f"{told}, which maps each of the {num_classes} classes to itself")


class PoisonedDataset(PreparedDataset):
    """A prepared data set whose flagged images are stamped when they are read, truncated to uint8.

    flags: (N,) uint8 by row: CLEAN, STAMPED, or CROSS (a wrong trigger, see CrossStamp). labels: (N,) int64 instead of
    the data set's own. base: (M, H, W, 3) uint8, by row of the source, what stamped rows start from instead of the
    clean images. others: (N,) rows, the other image of each cross sample. There is no .beton: back ends read through
    images().
    """

    def __init__(
        self,
        clean: PreparedDataset,
        trigger: Stamp,
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

    def image(self, row: int) -> np.ndarray:
        """One image, (H, W, 3) uint8."""
        image: np.ndarray = self.images(np.array([row]))[0]
        return image

    def images(self, rows: np.ndarray) -> np.ndarray:
        """Images (B, H, W, 3) uint8 in the order of ``rows``."""
        rows = np.asarray(rows, np.int64)
        images = self.clean.images(rows)
        marked = np.flatnonzero(self.flags[rows])
        for at in (marked[i : i + _CHUNK] for i in range(0, len(marked), _CHUNK)):
            is_cross = self.flags[rows[at]] == CROSS
            stamped, crossed = at[~is_cross], at[is_cross]
            if len(stamped):
                source = (
                    images[stamped] if self._base is None else np.asarray(self._base[self.source_rows[rows[stamped]]])
                )
                images[stamped] = to_bytes(self.trigger(to_images(source)))
            if len(crossed):
                assert isinstance(self.trigger, CrossStamp) and self._others is not None
                others = to_images(self.clean.images(self._others[rows[crossed]]))
                made = self.trigger.cross(to_images(images[crossed]), others, torch.from_numpy(rows[crossed]))
                images[crossed] = to_bytes(made)
        return images


def poisoned(dataset: PreparedDataset, rows: np.ndarray, config: PoisonConfig, seed: int) -> PoisonedDataset:
    """The training set: poisoned_rows of ``rows`` stamped and relabelled; cross samples, where the trigger has them,
    are further rows that keep their labels. UserError as poisoned_rows; for images of several sizes."""
    size, pattern = image_size_of(dataset), trigger_of(config)
    trigger = pattern.build(size)
    cross_ratio = getattr(pattern, "cross_ratio", 0.0)
    chosen, crossed = _draw(dataset.labels, rows, config, dataset.num_classes, seed, cross_ratio)
    flags = np.zeros(len(dataset), np.uint8)
    flags[chosen], flags[crossed] = STAMPED, CROSS
    labels = dataset.labels.copy()
    labels[chosen] = backdoor_labels(labels[chosen], config, dataset.num_classes)
    base = None
    if isinstance(pattern, LabelConsistent) and pattern.adversarial is not None:
        base = open_images(pattern.adversarial, dataset.num_source_rows, size)
    others = np.zeros(len(dataset), np.int64)
    others[crossed] = draws(seed, Stream.POISON, 1).choice(rows, len(crossed))
    return PoisonedDataset(dataset, not_idle(trigger), flags, labels, base, others)


def triggered(dataset: PreparedDataset, config: PoisonConfig) -> PoisonedDataset:
    """The test set: every image stamped, labels the original ones. UserError for images of several sizes."""
    trigger = not_idle(trigger_of(config).build(image_size_of(dataset)))
    return PoisonedDataset(dataset, trigger, np.full(len(dataset), STAMPED, np.uint8))


def image_size_of(dataset: PreparedDataset) -> int:
    """The side of the data set's images in pixels. UserError unless they are squares of one size."""
    shape = dataset.image_shape
    if shape is None or shape[0] != shape[1]:
        raise UserError(f"{dataset.path}: a trigger needs square images of one size; prepare it with --image-size")
    return shape[0]


def to_images(pixels: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def to_bytes(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [0, 1] -> (B, H, W, 3) uint8, truncated."""
    return grey_levels(images).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def not_idle(trigger: Stamp) -> Stamp:
    """The trigger. UserError if it leaves black, white and noise as they are: nobody could tell it from a defence."""
    noise = np.random.default_rng(0).integers(0, 256, (*trigger.image_size, 3), dtype=np.uint8)
    images = np.stack([np.zeros_like(noise), np.full_like(noise, 255), noise])
    if (to_bytes(trigger(to_images(images))) == images).all():
        raise UserError("key 'trigger' changes no pixel of any image: give it an alpha, amplitude or strength above 0")
    return trigger


def _draw(
    labels: np.ndarray, rows: np.ndarray, config: PoisonConfig, num_classes: int, seed: int, cross_ratio: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to stamp and rows to cross, each ascending; all of one permutation, so they are disjoint."""
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
