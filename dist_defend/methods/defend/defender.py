"""The defender's data: a few clean labelled images, and their loader."""

import re
from array import array
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np

from dist_defend.bounds import at_least_one
from dist_defend.data.augment import AugmentConfig, View
from dist_defend.data.loader import DatasetConfig, Loader
from dist_defend.data.store import PreparedDataset
from dist_defend.engine.context import Context
from dist_defend.errors import UserError
from dist_defend.files import read_regular
from dist_defend.screen import printable
from dist_defend.trial import Trial

_MOST_BYTES = 16 << 20  # of a file of row numbers


@dataclass(frozen=True, kw_only=True)
class DefenderConfig:
    """The defender's images.

    Keys:
        data: clean labelled images; the defender has ``ratio`` of them, or the rows that ``index`` names
        ratio: share of ``data``, drawn at random; null: the method's default (anp and rnp 0.01, others 0.05), unless
            ``data`` sets fraction or max_samples
        index: text file of row numbers of the source, counted from 0, as BackdoorBench's log/index.txt; null: drawn by
            ``ratio``
        augment: augmentation of the images that the method trains on
        batch_size: images of an update over all ranks; the last batch may be smaller
    """

    usual_ratio: ClassVar[float] = 0.05

    data: DatasetConfig
    ratio: float | None = None
    index: str | None = None
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(crop="pad", pad=4, flip=0.5))
    batch_size: int = 256

    def __post_init__(self) -> None:
        takes_part = self.data.fraction < 1 or self.data.max_samples is not None
        choices = [("ratio", self.ratio is not None), ("index", self.index is not None), ("data", takes_part)]
        chosen = [name for name, is_chosen in choices if is_chosen]
        if len(chosen) > 1:
            raise ValueError(f"key '{chosen[0]}' is set, but '{chosen[1]}' chooses the images already: leave one out")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"key 'ratio' is {self.ratio}; it must be in (0, 1]")
        at_least_one(self, "batch_size")


def defence_data(config: DefenderConfig, trial: Trial) -> tuple[PreparedDataset, np.ndarray]:
    """The defender's data set and rows (M,), ascending. UserError for an index that does not fit it."""
    data = config.data
    if config.ratio is not None or (data.fraction == 1 and data.max_samples is None and config.index is None):
        subset: Literal["random", "balanced"] = "balanced" if data.subset == "balanced" else "random"
        data = replace(data, fraction=config.ratio or config.usual_ratio, subset=subset)
    dataset, rows = trial.dataset("defence", data)
    if config.index is not None:
        numbers = read_index(config.index, dataset.num_source_rows, f"{trial.context.method}.index")
        rows = dataset.rows_of(numbers)
    return dataset, rows


def defence_loader(config: DefenderConfig, context: Context, dataset: PreparedDataset, rows: np.ndarray) -> Loader:
    """The defender's images, shuffled and augmented; the last batch may be smaller. UserError as check_last_batch."""
    check_last_batch(len(rows), config.batch_size, context.ranks.world_size, context.method)
    return context.train_loader(dataset, rows, config.batch_size, (View(config.augment),), drop_last=False)


def read_index(path: str, count: int, key: str) -> np.ndarray:
    """Rows (M,) int64, ascending, of a text file of the source's row numbers, as BackdoorBench's log/index.txt is.

    UserError that names the key unless all of them are from 0 to count - 1.
    """
    numbers = array("q")
    try:
        for word in re.finditer(rb"\S+", read_regular(path, _MOST_BYTES)):
            numbers.append(int(word[0]))
    except (OSError, ValueError, OverflowError) as error:
        told = printable(str(error), 100)
        raise UserError(f"key '{key}': {path} is no text file of row numbers ({told}); write one a line") from error
    rows = np.unique(np.frombuffer(numbers, np.int64)) if numbers else np.empty(0, np.int64)
    if not len(rows) or rows[0] < 0 or rows[-1] >= count:
        raise UserError(f"key '{key}': {path} must name rows 0 to {count - 1} of the data, at least one")
    return rows


def check_last_batch(count: int, batch_size: int, world_size: int, method: str) -> None:
    """UserError if the last batch of ``count`` images has fewer images than ranks, or less than 2 (for batch norm)."""
    rest = count % batch_size
    if 0 < rest < max(2, world_size):
        raise UserError(
            f"key '{method}.batch_size' is {batch_size}: of {count} images {rest} are left for the last batch, too few "
            f"for batch norm on {world_size} rank(s); choose another batch size or number of images"
        )
