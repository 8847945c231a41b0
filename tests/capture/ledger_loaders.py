"""The ledger's calls of loaders."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dist_defend.data.augment import SIMCLR, AugmentConfig, BlurConfig, SolarizeConfig, View
from dist_defend.data.loader import BackendName, LoaderConfig, make_loader
from dist_defend.data.store import open_dataset, write_dataset
from tests.capture.ledger import DEVICE
from tests.capture.ledger_parts import (
    SIZE,
    Call,
)


def loaded(backend: BackendName, kind: str, batch_size: int = 8, **options: Any) -> Call:
    """An epoch of one batch, by all threads. kind: images of one size as arrays or JPEGs, or JPEGs of several sizes."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_dataset(
            Pictures(kind == "of several sizes"), Path(folder) / "data", name="p", split="train",
            storage="npy" if kind == "arrays" else "beton", write_mode="raw" if kind == "arrays" else "jpg",
        )  # fmt: skip
        data = open_dataset(data.path, options.pop("resize", None))
        loader = make_loader(
            data, config=LoaderConfig(backend, 1), batch_size=batch_size, rows=np.arange(batch_size), device=DEVICE,
            shuffle=True, **options,
        )  # fmt: skip
        list(loader.epoch(0))  # files are mapped from now on
    return lambda: list(loader.epoch(0))


class Pictures:
    """Noise."""

    classes = ("only",)

    def __init__(self, differ: bool) -> None:
        self.differ = differ

    def __len__(self) -> int:
        return 32

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        height, width = (40 + row, 72 - row) if self.differ else (SIZE, SIZE)
        return np.random.default_rng(row).integers(0, 256, (height, width, 3), np.uint8), 0


_PAD = (View(AugmentConfig("pad", flip=0.5)),)
_TWO_VIEWS = (View(replace(SIMCLR, size=SIZE)), View(replace(SIMCLR, size=SIZE), np.zeros((SIZE, SIZE, 3), np.uint8)))
_BLURRED = (View(replace(SIMCLR, size=SIZE, blur=BlurConfig(), solarize=SolarizeConfig())),)
LOADERS: dict[str, Callable[[], Call]] = {
    "loader, resident, as they are: batch": lambda: loaded("resident", "arrays"),
    "loader, resident, blurred: batch": lambda: loaded("resident", "arrays", views=_BLURRED),
    "loader, resident, padded crop: batch": lambda: loaded("resident", "arrays", views=_PAD),
    "loader, resident, two views: batch": lambda: loaded("resident", "arrays", views=_TWO_VIEWS),
    "loader, torch, raw: batch": lambda: loaded("torch", "arrays", raw=True),
    "loader, torch, padded crop: batch": lambda: loaded("torch", "arrays", views=_PAD),
    "loader, torch, two views: batch": lambda: loaded("torch", "arrays", views=_TWO_VIEWS),
}
OF_JPEGS: dict[str, Callable[[], Call]] = {
    "loader, torch, resized at read: batch": lambda: loaded("torch", "of several sizes", resize=SIZE),
    "loader, torch, sizes differ: batch": lambda: loaded("torch", "of several sizes", views=_TWO_VIEWS),
    "loader, ffcv, sizes differ: batch": lambda: loaded("ffcv", "of several sizes", views=_TWO_VIEWS),
    "loader, ffcv, two views: batch": lambda: loaded("ffcv", "jpegs", views=_TWO_VIEWS),
}
