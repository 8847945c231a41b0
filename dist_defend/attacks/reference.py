"""Reference images of BadEncoder, as an experiment names them."""

import logging
from dataclasses import dataclass

import numpy as np

from dist_defend.attacks.badencoder_npz import load_references
from dist_defend.bounds import at_least_one, not_negative
from dist_defend.data.classes import check_class
from dist_defend.data.pictures import is_picture, open_picture
from dist_defend.data.store import open_dataset
from dist_defend.errors import UserError
from dist_defend.files import read_regular

_MOST_BYTES = 64 << 20  # of a picture
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReferenceConfig:
    """Reference images of BadEncoder, from a file or a data set.

    Keys:
        file: an npz file in BadEncoder's layout, or a picture of target_class; null: from a data set
        dataset: prepared data set to take the image from
        target_class: the class of the image
        number: which image of that class, counted from 0 in the order of the data set's source, as the lines of `data
            info`'s contact sheet have it
        count: number of images of that class, from ``number`` on
    """

    file: str | None = None
    dataset: str | None = None
    target_class: int = 0
    number: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        not_negative(self, "target_class", "number")
        at_least_one(self, "count")
        if (self.file is None) == (self.dataset is None):
            raise ValueError("key 'reference' needs either 'file' or 'dataset'")
        if self.file is not None and self.count > 1:
            raise ValueError(f"key 'count' is {self.count}, but all references of 'file' are taken: leave it out")


def references_from(config: ReferenceConfig, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Reference images (K, H, W, 3) uint8 and their classes (K,) int64 in the downstream task."""
    if config.file is not None and is_picture(config.file):
        picture, told = _read_picture(config.file)
        for line in told:
            log.info("reference %s: %s", config.file, line)
        images, classes = picture[None].copy(), np.array([config.target_class])
    elif config.file is not None:
        images, classes = load_references(config.file)
    else:
        assert config.dataset is not None
        dataset = open_dataset(config.dataset)
        check_class("reference.target_class", config.target_class, dataset.num_classes, config.dataset)
        rows = dataset.rows_of_class(config.target_class)[config.number : config.number + config.count]
        if len(rows) < config.count:
            keys = f"key 'reference.number' is {config.number}" + (f" and 'count' {config.count}" * (config.count > 1))
            raise UserError(f"{keys}; {config.dataset} has fewer images of that class")
        images, classes = dataset.images(rows), dataset.labels[rows]
    if images.shape[1:3] != (image_size, image_size):
        raise UserError(
            f"{config.file or config.dataset}: reference images have {images.shape[1]}x{images.shape[2]} pixels, "
            f"the shadow images {image_size}x{image_size}; prepare both at one size"
        )
    return images, classes


def _read_picture(file: str) -> tuple[np.ndarray, tuple[str, ...]]:
    try:
        return open_picture(read_regular(file, _MOST_BYTES), file)
    except OSError as error:
        raise UserError(f"reference {file} cannot be read ({error.strerror}): give a picture or an npz file") from error
