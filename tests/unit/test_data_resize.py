"""``resize`` in a data section: images at another size, the same for every back end, attack and rank."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_defend.attacks.attack import AttackConfig
from dist_defend.attacks.patterns import BadNets
from dist_defend.attacks.poison import triggered
from dist_defend.data.augment import SIMCLR, AugmentConfig, View
from dist_defend.data.ffcv_presence import ffcv_installed
from dist_defend.data.loader import BackendName, DatasetConfig, LoaderConfig, make_loader
from dist_defend.data.sources import ArraySource
from dist_defend.data.store import open_dataset, write_dataset
from dist_defend.errors import UserError

needs_ffcv = pytest.mark.skipif(not ffcv_installed(), reason="ffcv is not installed")
VIEWS = [(View(),), (View(AugmentConfig(crop="pad", pad=2, flip=0.5)), View(SIMCLR))]


class Oblong:
    """Seventy noisy images of several sizes."""

    classes = ("any",)

    def __len__(self) -> int:
        return 70

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        shape = (5 + row % 7, 12 - row % 5, 3)
        return np.random.default_rng(row).integers(0, 256, shape, dtype=np.uint8), 0


def pillow(row: int, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(Oblong()[row][0]).resize((side, side), Image.Resampling.BILINEAR))


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty noisy images of 8 pixels, as npy."""
    folder = tmp_path_factory.mktemp("data") / "tiles"
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    write_dataset(ArraySource(images, np.zeros(40, int), ("any",)), folder, name="x", split="s", storage="npy")
    return folder


@needs_ffcv
@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_images_of_several_sizes_become_squares(tmp_path: Path, mode: str) -> None:
    write_dataset(Oblong(), tmp_path / "d", name="x", split="s", write_mode=mode)
    made, plain = open_dataset(tmp_path / "d", resize=9), open_dataset(tmp_path / "d")
    rows = np.array([69, 3, 3, *range(68)])  # more than are decoded at once
    images = made.images(rows)
    assert images.shape == (71, 9, 9, 3) and made.image_shape == (9, 9, 3) and made.beton is None
    for image, row in zip(images, rows, strict=True):
        stored = Image.fromarray(plain.image(row))  # after JPEG
        assert np.array_equal(image, np.asarray(stored.resize((9, 9), Image.Resampling.BILINEAR)))
        assert np.array_equal(image, made.image(row))
        assert mode == "jpg" or np.array_equal(image, pillow(row, 9))
    with pytest.raises(UserError, match="say resize in its section of the configuration"):
        plain.images(rows)


def test_it_is_what_prepare_makes_at_that_size(tiles: Path, tmp_path: Path) -> None:
    images = open_dataset(tiles).images(np.arange(40))
    prepared = write_dataset(
        ArraySource(images, np.zeros(40, int), ("any",)), tmp_path / "p", name="x", split="s", image_size=13
    )
    resized = open_dataset(tiles, resize=13)
    assert np.array_equal(resized.images(np.arange(40)), prepared.images(np.arange(40)))
    assert resized.images(np.arange(0)).shape == (0, 13, 13, 3)


def test_the_digest_tells_and_the_own_size_changes_nothing(tiles: Path) -> None:
    plain, same = open_dataset(tiles), open_dataset(tiles, resize=8)
    digests = {open_dataset(tiles, resize=side).digest for side in (None, 4, 16)}
    assert len(digests) == 3 and same.digest == plain.digest and same.resize is None
    assert open_dataset(tiles, resize=4).digest == open_dataset(tiles, resize=4).digest


@pytest.mark.parametrize("views", VIEWS)
def test_back_ends_and_ranks_give_the_same_batches(tiles: Path, views: tuple[View, ...]) -> None:
    dataset = open_dataset(tiles, resize=12)

    def batches(backend: BackendName, rank: int = 0, world_size: int = 1, **options: Any) -> list[torch.Tensor]:
        loader = make_loader(
            dataset,
            config=LoaderConfig(backend=backend),
            batch_size=10, views=views, shuffle=True, drop_last=True, seed=3, rank=rank, world_size=world_size,
            **options,
        )  # fmt: skip
        assert loader.backend == ("resident" if backend == "auto" else backend)
        return [torch.stack(batch.views) if len(batch.views) > 1 else batch.views[0] for batch in loader.epoch(1)]

    resident = batches("resident")
    assert resident[0].shape[-2:] == (12, 12)
    exact = not any(view.augment.recolours for view in views)
    for other in (batches("torch"), batches("auto")):
        for mine, theirs in zip(resident, other, strict=True):
            assert torch.equal(mine, theirs) if exact else torch.allclose(mine, theirs, atol=2e-4)
    axis = 0 if len(views) == 1 else 1
    halves = zip(batches("resident", 0, 2), batches("resident", 1, 2), strict=True)
    for whole, (left, right) in zip(resident, halves, strict=True):
        assert torch.equal(whole, torch.cat([left, right], dim=axis))


def test_a_trigger_is_stamped_at_the_resized_size(tiles: Path) -> None:
    dataset = open_dataset(tiles, resize=32)
    attacked = triggered(dataset, AttackConfig(BadNets(pattern="square", size=3)))
    assert attacked.image_shape == (32, 32, 3) and attacked.digest == dataset.digest
    clean, stamped = dataset.images(np.arange(5)), attacked.images(np.arange(5))
    changed = np.flatnonzero((clean != stamped).any(axis=(0, 3)))
    assert 1 <= len(changed) <= 9  # pixels of the 32x32, not of the 8x8


def test_what_cannot_be_is_told(tiles: Path) -> None:
    with pytest.raises(ValueError, match="key 'resize' is 0; it must be at least 1 pixel"):
        DatasetConfig("data", resize=0)
    if ffcv_installed():
        with pytest.raises(UserError, match="resized to 12 px when they are read; prepare them with --image-size"):
            make_loader(open_dataset(tiles, resize=12), config=LoaderConfig("ffcv"), batch_size=2)
