"""Fair pairs: the same work, first shown to give the same loss, then timed in turns in one process."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_defend.batch import Batch
from dist_defend.data.augment import View
from dist_defend.data.loader import Loader, LoaderConfig, make_loader
from dist_defend.data.sources import ArraySource
from dist_defend.data.store import PreparedDataset, write_dataset
from dist_defend.engine import dist
from dist_defend.engine.dist import Ranks
from dist_defend.errors import UserError
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.models.encoder import SimCLR, build_simclr
from dist_defend.models.pixel_space import NORMALIZATIONS

NORMALIZATION = "cifar10"
MEAN, STD = NORMALIZATIONS[NORMALIZATION]
IMAGE_SIZE = 32  # pixels


@dataclass(frozen=True)
class Settings:
    """What the command line asks for; None leaves the choice to each bench."""

    encoder: str | None = None
    batch_size: int | None = None
    num_images: int | None = None
    repeats: int = 5
    method: str | None = None  # of bench scaling


@dataclass(frozen=True)
class Case:
    """One row to be: which encoder, how many images per step and per epoch."""

    name: str
    encoder: str
    batch_size: int
    num_images: int


def cases(settings: Settings, name: str, *defaults: tuple[str, str, int, int]) -> list[Case]:
    """Default cases (suffix, encoder, batch size, images), or the one encoder that the settings name.

    UserError for fewer images than make a batch.
    """
    if settings.encoder is not None:
        defaults = (("", settings.encoder, *defaults[0][2:]),)
    wanted = [
        Case(name + suffix, encoder, settings.batch_size or batch_size, settings.num_images or num_images)
        for suffix, encoder, batch_size, num_images in defaults
    ]
    for case in wanted:
        if case.num_images < case.batch_size:
            raise UserError(
                f"{case.name}: {case.num_images} images are less than a batch of {case.batch_size}; "
                "raise --num-images or lower --batch-size"
            )
    return wanted


def start() -> Ranks:
    """One process in float32. UserError under a launcher: the baselines know no ranks."""
    return dist.start("fp32", world_size=1)


def random_images(count: int, seed: int = 0) -> np.ndarray:
    """(count, 32, 32, 3) uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)


def prepare(images: np.ndarray, folder: Path, split: str = "train", classes: int = 1, **how: Any) -> PreparedDataset:
    """Images (N, H, W, 3) uint8 as a prepared data set in ``folder / split``, of classes 0, 1, ... in turn."""
    source = ArraySource(images, np.arange(len(images)) % classes, [str(number) for number in range(classes)])
    return write_dataset(source, folder / split, name="noise", split=split, **how)


def train_loader(
    dataset: PreparedDataset, views: Sequence[View], batch_size: int, config: LoaderConfig, device: torch.device | str
) -> Loader:
    """Shuffled whole batches, as a training script takes them."""
    how: dict[str, Any] = {"shuffle": True, "drop_last": True, "device": device}
    return make_loader(dataset, config=config, batch_size=batch_size, views=views, **how)


def seasoned(arch: str, classes: int, normalization: str) -> Classifier:
    """Fresh weights, the same at each call, with batch-norm statistics of some noise; in train mode, on the CPU."""
    torch.manual_seed(0)
    model = build_classifier(arch, classes, normalization, IMAGE_SIZE)
    with torch.no_grad():
        model.train()(to_pixels(random_images(64, seed=2), torch.device("cpu")))
    return model


def to_pixels(images: np.ndarray, device: torch.device) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1], channels_last."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255


def normalised(pixels: Tensor) -> Tensor:
    """What the published code's transforms give: contiguous and with the mean and deviation taken out."""
    mean, std = (torch.tensor(values, device=pixels.device).view(1, 3, 1, 1) for values in (MEAN, STD))
    return ((pixels - mean) / std).contiguous()


def twin_models(encoder: str, seed: int, device: torch.device) -> tuple[SimCLR, SimCLR]:
    """Equal weights as published (normalised images in, contiguous) and as ours (pixels in, channels_last)."""
    torch.manual_seed(seed)
    theirs = build_simclr(encoder, "none", IMAGE_SIZE).to(device)
    ours = build_simclr(encoder, NORMALIZATION, IMAGE_SIZE).to(device)
    ours.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def on_device(batch: Batch, ranks: Ranks) -> Batch:
    """As the trainer gives it to a step."""
    images = batch.images.to(ranks.device, ranks.dtype)
    return Batch((images,), batch.labels.to(ranks.device), batch.index.to(ranks.device))


@contextmanager
def without_tf32() -> Iterator[None]:
    """float32 in full where a GPU would round what it multiplies, as it does for convolutions, to ten bits."""
    settings: Any = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [setting.allow_tf32 for setting in settings]
    for setting in settings:
        setting.allow_tf32 = False
    try:
        yield
    finally:
        for setting, is_allowed in zip(settings, before, strict=True):
            setting.allow_tf32 = is_allowed


def show_equal(name: str, their_side: Callable[[], float], our_side: Callable[[], float], limit: float = 1e-4) -> None:
    """Print both sides' loss on one batch, computed without TF32; RuntimeError unless they agree.

    limit: of their difference, relatively.
    """
    with without_tf32():
        theirs, ours = their_side(), our_side()
    difference = abs(theirs - ours) / max(abs(theirs), 1e-12)
    print(f"{name}: loss {theirs:.7g} as published, {ours:.7g} ours: apart by {difference:.1e} (limit {limit:.0e})")
    if not difference <= limit:
        raise RuntimeError(f"{name}: the two sides do not compute the same; their times cannot be compared")


def compare(
    case: Case,
    baseline: Callable[[], object],
    ours: Callable[[], object],
    settings: Settings,
    *,
    images: int,
    note: str,
    heads: int = 1,
) -> dict[str, Any]:
    """A row: medians of ``settings.repeats`` alternating pairs after one to warm up; ratio = baseline / ours.

    images: how many go through one call of ours. heads: of how many units of the baseline's work one call of ours does;
    ours_ms is per unit.
    """
    pairs = [(seconds(baseline), seconds(ours) / heads) for _ in range(settings.repeats + 1)][1:]
    ratios = [theirs / mine for theirs, mine in pairs]
    baseline_seconds, our_seconds = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "name": case.name,
        "ratio": statistics.median(ratios),
        "min_ratio": min(ratios),
        "max_ratio": max(ratios),
        "ours_ms": 1e3 * our_seconds,
        "baseline_ms": 1e3 * baseline_seconds,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "dtype": "float32",
        "batch_size": case.batch_size,
        "ranks": 1,
        "images_per_second": images / (our_seconds * heads),
        "encoder": case.encoder,
        "note": note,
    }


def seconds(run: Callable[[], object]) -> float:
    """What a call takes, until the device is done."""
    _wait()
    started = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
