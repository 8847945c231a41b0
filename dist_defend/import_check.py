"""``import --check``: which constants a foreign network was trained with, measured on labelled images.

Every plausible normalisation and size is tried on the same images; nothing is chosen here. A classifier is scored by
its accuracy, an encoder by the nearest neighbours of its features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dist_defend.counts import Count, knn_predict
from dist_defend.data.store import PreparedDataset
from dist_defend.errors import UserError
from dist_defend.models.classifier import Classifier
from dist_defend.models.encoder import SimCLR
from dist_defend.models.pixel_space import NORMALIZATIONS, Normalize, normalization_constants

MOST_IMAGES = 2000
_BATCH, _NEIGHBOURS = 100, 20
_SEED = 0


@dataclass(frozen=True)
class Trial:
    """One pair of constants. size: the side in pixels at which the network saw the images. hits: (n,) bool."""

    normalization: str
    size: int
    hits: Tensor
    is_used: bool

    @property
    def count(self) -> Count:
        """How many images were right."""
        return Count(int(self.hits.sum()), len(self.hits))

    def plain(self) -> dict[str, Any]:
        """For the model card."""
        return {"normalization": self.normalization, "size": self.size, **self.count.plain()}


def check_data(model: Classifier | SimCLR, data: PreparedDataset) -> None:
    """UserError for images that differ in size or have no label, and for labels that the model does not know."""
    if data.image_shape is None or data.image_shape[0] != data.image_shape[1]:
        raise UserError(f"--check {data.path}: its images are not squares of one size: prepare them with --image-size")
    if len(data) < 2 or (data.labels < 0).any():
        raise UserError(f"--check {data.path}: needs two or more images, each with a label")
    if isinstance(model, Classifier) and int(data.labels.max()) >= model.num_classes:
        raise UserError(
            f"--check {data.path}: has labels up to {int(data.labels.max())}, the model {model.num_classes} classes: "
            "take data of its own task"
        )


def measure(model: Classifier | SimCLR, data: PreparedDataset) -> list[Trial]:
    """Trials with the most hits first, on a fixed random choice of at most MOST_IMAGES images.

    Sizes: the data's own where the network takes it, and the model's. An encoder is asked for every other image, whose
    nearest neighbours are among the rest. UserError as check_data.
    """
    check_data(model, data)
    rows = np.sort(np.random.default_rng(_SEED).permutation(len(data))[:MOST_IMAGES])
    images, labels = data.images(rows), torch.from_numpy(data.labels[rows])
    was_training = model.training
    model.eval()
    own = images.shape[1]
    sizes = {model.image_size} | ({own} if _takes(model, own) else set())
    trials = []
    for size in sorted(sizes):
        for name in _names(model.normalization):
            is_used = name == model.normalization and size == model.image_size
            trials.append(Trial(name, size, _hits(model, images, labels, name, size), is_used))
    model.train(was_training)
    return sorted(trials, key=lambda trial: (-trial.count.correct, not trial.is_used, trial.normalization, trial.size))


def differ(better: Trial, other: Trial) -> bool:
    """Whether one trial beats another by more than counting explains: two standard errors of the difference."""
    only_one = int((better.hits & ~other.hits).sum())
    only_other = int((~better.hits & other.hits).sum())
    return bool(only_one - only_other > 2 * (only_one + only_other) ** 0.5)


def _names(used: str) -> list[str]:
    """The constants to try, each once, those in use by the name that they have."""
    names: dict[Any, str] = {normalization_constants(used): used}
    for name in NORMALIZATIONS:
        names.setdefault(NORMALIZATIONS[name], name)
    return list(names.values())


def _takes(model: Classifier | SimCLR, size: int) -> bool:
    try:
        _outputs(model, torch.zeros(2, 3, size, size), model.normalization)
    except (RuntimeError, ValueError, AssertionError, UserError):
        return False
    return True


@torch.no_grad()
def _outputs(model: Classifier | SimCLR, images: Tensor, normalization: str) -> Tensor:
    """Logits, or unit features, of images in [0, 1] under other constants than the model's."""
    holder: Any = model if isinstance(model, Classifier) else model.f
    own, holder.normalize = holder.normalize, Normalize(normalization)
    try:
        return model(images) if isinstance(model, Classifier) else functional.normalize(holder(images), dim=1)
    finally:
        holder.normalize = own


def _hits(model: Classifier | SimCLR, images: np.ndarray, labels: Tensor, normalization: str, size: int) -> Tensor:
    outputs = []
    for part in torch.from_numpy(images).split(_BATCH):
        pixels = part.permute(0, 3, 1, 2).float() / 255
        if pixels.shape[-1] != size:
            pixels = functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
        outputs.append(_outputs(model, pixels, normalization))
    found = torch.cat(outputs)
    if isinstance(model, Classifier):
        return found.argmax(1) == labels
    queries, bank, bank_labels = found[1::2], found[::2], labels[::2]  # rows come sorted, so every other one of a class
    classes = knn_predict(queries, bank, bank_labels, int(labels.max()) + 1, _NEIGHBOURS)
    return classes[:, 0] == labels[1::2]


def lines(trials: Sequence[Trial], model: Classifier | SimCLR, data: PreparedDataset) -> list[str]:
    """The table and what it says, for the terminal."""
    best = trials[0]
    used = next(trial for trial in trials if trial.is_used)
    measure_name = "ACC" if isinstance(model, Classifier) else f"{_NEIGHBOURS}-NN accuracy"
    head = (
        f"check: {best.count.n} of {len(data)} images of {data.path}, chosen at random (seed {_SEED}); {measure_name}"
    )
    width = max(len(trial.normalization) for trial in trials)
    table = [
        f"  {trial.normalization:<{width}}  {trial.size:>4} px  {trial.count.correct:>6} of {trial.count.n}"
        f"  {trial.count.percent:5.1f} %{'  (in use)' if trial.is_used else ''}"
        for trial in trials
    ]
    if differ(best, used):
        size = f" at {best.size} px" if best.size != used.size else ""
        said = (
            f"--normalization {best.normalization}{size} fits best: {best.count.percent:.1f} % against "
            f"{used.count.percent:.1f} % under {used.normalization}; import again with it"
        )
    else:
        said = f"normalization {used.normalization} fits: no other is better by more than counting explains"
    return [head, *table, said]
