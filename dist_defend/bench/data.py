"""Loading speed: every back end against torch's DataLoader with PIL images and torchvision's v2 transforms.

Rows: plain-32px (crop with 4 pixels of padding, flip), twoview-32px (SimCLR's two views) and jpeg-224px (random resized
crop and flip of photographs of 500x375 pixels). The baseline reads its images the usual way, from memory at 32 pixels
and from JPEG files at 224, with as many persistent worker processes as our back ends have threads. Ours reads prepared
data sets, the photographs re-encoded to 256 pixels on the longer side, as docs/data.md recommends.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from dist_defend.bench.runner import Settings, prepare, train_loader
from dist_defend.data.augment import SIMCLR, AugmentConfig, View
from dist_defend.data.ffcv_presence import ffcv_installed
from dist_defend.data.loader import BackendName, Loader, LoaderConfig
from dist_defend.data.sources import open_source
from dist_defend.data.store import PreparedDataset, write_dataset
from dist_defend.errors import UserError

_FLOAT = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
_PLAIN = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), _FLOAT])
_TWO_VIEW = v2.Compose(
    [
        v2.RandomResizedCrop(32),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
        _FLOAT,
    ]
)
_PHOTO = v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip(), _FLOAT])
_NUM_TINY, _NUM_PHOTOS = 2048, 384
_TORCH_BATCHES = 4  # enough to time the torch back end, which is slow on a CPU


@dataclass(frozen=True)
class _Case:
    """One row: what the baseline does per image, and the same for us."""

    name: str
    open_image: Callable[[int], Image.Image]
    transform: Callable[[Image.Image], torch.Tensor]
    dataset: PreparedDataset
    views: tuple[View, ...]
    batch_size: int
    passes: int  # over the data per measurement of a fast back end, so that it is long enough to be measured


class _PilDataset(Dataset[tuple[tuple[torch.Tensor, ...], int]]):
    """Samples as a training script makes them: one view per entry of ``case.views``."""

    def __init__(self, case: _Case) -> None:
        self._case = case

    def __len__(self) -> int:
        return len(self._case.dataset)

    def __getitem__(self, row: int) -> tuple[tuple[torch.Tensor, ...], int]:
        image = self._case.open_image(row)
        return tuple(self._case.transform(image) for _ in self._case.views), 0


def rows(settings: Settings, workers: int = 2) -> Iterator[dict[str, object]]:
    """Measure the three cases: back ends and baseline take turns, medians of the repeats after one pass to warm up.

    ours_ms and baseline_ms are per batch; ours is ffcv, or resident where ffcv is not installed (key ``backend``).
    UserError for fewer images than make a batch.
    """
    with tempfile.TemporaryDirectory() as folder:
        cases = [*_tiny_cases(Path(folder), settings), _photo_case(Path(folder), settings)]
        for case in cases:
            if len(case.dataset) < case.batch_size:
                raise UserError(f"--num-images {len(case.dataset)} is less than a batch of {case.batch_size}; raise it")
        baselines = [
            DataLoader(
                _PilDataset(case),
                batch_size=case.batch_size,
                shuffle=True,
                drop_last=True,
                num_workers=workers,
                persistent_workers=True,
            )
            for case in cases
        ]
        for baseline in baselines:  # their processes start before our threads do
            _seconds_per_batch(baseline)
        for case, baseline in zip(cases, baselines, strict=True):
            yield _measure(case, baseline, settings.repeats, workers)


def _measure(case: _Case, baseline: Iterable[object], repeats: int, workers: int) -> dict[str, object]:
    names: list[BackendName] = ["ffcv", "resident", "torch"] if ffcv_installed() else ["resident", "torch"]
    loaders: dict[str, Loader] = {
        name: train_loader(case.dataset, case.views, case.batch_size, LoaderConfig(name, workers), "cpu")
        for name in names
    }

    def batches(name: str, repeat: int) -> Iterator[object]:
        if name == "pil":
            yield from baseline
        elif name == "torch":
            yield from itertools.islice(loaders[name].epoch(repeat), _TORCH_BATCHES)
        else:
            for epoch in range(case.passes):
                yield from loaders[name].epoch(repeat * case.passes + epoch)

    times: dict[str, list[float]] = {name: [] for name in ("pil", *names)}
    for repeat in range(repeats + 1):
        for name, taken in times.items():
            taken.append(_seconds_per_batch(batches(name, repeat)))
    median = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    ratios = [theirs / ours for theirs, ours in zip(times["pil"][1:], times[names[0]][1:], strict=True)]
    return {
        "name": case.name,
        "ratio": median["pil"] / median[names[0]],
        "min_ratio": min(ratios),
        "max_ratio": max(ratios),
        "ours_ms": 1e3 * median[names[0]],
        "baseline_ms": 1e3 * median["pil"],
        "device": "cpu",
        "dtype": "float32",
        "batch_size": case.batch_size,
        "ranks": 1,
        "workers": workers,
        "backend": names[0],
        "images_per_second": {name: round(case.batch_size / seconds) for name, seconds in median.items()},
    }


def _seconds_per_batch(batches: Iterable[object]) -> float:
    started = time.perf_counter()
    count = sum(1 for _ in batches)
    return (time.perf_counter() - started) / count


def _tiny_cases(folder: Path, settings: Settings) -> list[_Case]:
    images = np.random.default_rng(0).integers(0, 256, (settings.num_images or _NUM_TINY, 32, 32, 3), dtype=np.uint8)
    dataset = prepare(images, folder)

    def open_image(row: int) -> Image.Image:
        return Image.fromarray(images[row])

    plain = (View(AugmentConfig(crop="pad", flip=0.5)),)
    size = settings.batch_size or 256
    return [
        _Case("plain-32px", open_image, _PLAIN, dataset, plain, size, passes=40),
        _Case("twoview-32px", open_image, _TWO_VIEW, dataset, (View(SIMCLR), View(SIMCLR)), size, passes=10),
    ]


def _photo_case(folder: Path, settings: Settings) -> _Case:
    """Random 500x375 cuts of scikit-learn's two sample photographs as JPEG files of quality 90."""
    random = np.random.default_rng(0)
    photographs = load_sample_images().images
    (folder / "photos" / "cut").mkdir(parents=True)
    files = [folder / "photos" / "cut" / f"{number:04d}.jpg" for number in range(settings.num_images or _NUM_PHOTOS)]
    for number, file in enumerate(files):
        photograph = photographs[number % 2]
        top, left = (
            random.integers(0, have - want + 1) for have, want in zip(photograph.shape, (375, 500), strict=False)
        )
        Image.fromarray(photograph[top : top + 375, left : left + 500]).save(file, quality=90)
    dataset = write_dataset(
        open_source("imagefolder", str(folder / "photos"), "train"),
        folder / "prepared",
        name="photos",
        split="bench",
        write_mode="jpg" if ffcv_installed() else "raw",
        max_resolution=256,
    )

    def open_image(row: int) -> Image.Image:
        return Image.open(files[row]).convert("RGB")

    views = (View(AugmentConfig(crop="random_resized", size=224, flip=0.5)),)
    return _Case("jpeg-224px", open_image, _PHOTO, dataset, views, settings.batch_size or 64, passes=1)
