"""PatchSearch's windows and pasted images against the published code's, and planted images whose answer is known."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.data.loader import DatasetConfig
from dist_defend.engine import dist
from dist_defend.methods.measure.patch_search import (
    Config,
    Scorer,
    cluster,
    cut,
    largest_windows,
    nearest,
    paste,
    search,
)
from dist_defend.models.pixel_space import Encoder
from tests.numerics.det import assert_fingerprint, golden

SIZE, PATCH = 16, 4


def uniform(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_windows_and_pasted_images_are_the_published_ones() -> None:
    case: dict[str, Any] = golden("encoder_attacks")["rest"]["patch_search"]
    count, size, window, seed = (case[key] for key in ("batch", "size", "window", "seed"))
    images, heat = uniform((count, 3, size, size), seed), uniform((count, size, size), seed + 1).float()
    corners = largest_windows(heat, window)
    assert corners.tolist() == case["corners_row_col"]
    windows = cut(images, corners, window)
    assert_fingerprint(windows, case["windows"])
    places = torch.randint(0, size - window, (count, 2), generator=torch.Generator().manual_seed(seed + 2))
    assert places.tolist() == case["paste_row_col"]
    assert_fingerprint(paste(images, windows[0], places), case["pasted"])


def test_of_equal_windows_the_first_counts() -> None:
    heat = torch.zeros(2, 8, 8)
    heat[0, 1, 5] = heat[0, 6, 2] = 0.1
    assert largest_windows(heat, 3).tolist() == [[0, 3], [0, 0]]


class Planted(Encoder):
    """Maps and features: how much more than 0.9 a pixel's red is, times 1000, then green and blue."""

    feature_dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.normalize = nn.Identity()

    def layers(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        maps = torch.cat([functional.relu(x[:, :1] - 0.9) * 1000, x[:, 1:]], 1)
        return [maps], maps.mean((2, 3))


def planted() -> tuple[Tensor, np.ndarray]:
    """60 images (N, 3, H, W) uint8: 24 green, 24 blue, 12 green with one red square at places (12, 2) of their own."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 20, (60, 3, SIZE, SIZE))
    images[:24, 1] += 200
    images[24:48, 2] += 200
    images[48:, 1] += 200
    corners = generator.integers(0, SIZE - PATCH, (12, 2))
    for image, (row, column) in zip(images[48:], corners, strict=True):
        image[:, row : row + PATCH, column : column + PATCH] = np.array([255, 0, 0])[:, None, None]
    return torch.from_numpy(images.astype(np.uint8)), corners


def test_the_cluster_that_shares_a_patch_wins() -> None:
    """Its patch moves every test image of the other clusters, so its score is T minus its own; clean ones move none."""
    images, corners = planted()
    ranks, encoder = dist.start("fp64", None), Planted()
    features = functional.normalize(encoder(images.double() / 255), dim=1)
    means, assigned = cluster(features, 3, seed=5)  # k-means from a random start: not every seed finds them
    groups = [assigned[:24], assigned[24:48], assigned[48:]]
    assert all(len(group.unique()) == 1 for group in groups) and len(assigned.unique()) == 3
    tests = nearest(features, means, assigned, 5)
    assert len(tests) == 15 and assigned[tests].bincount().tolist() == [5, 5, 5]
    scorer = Scorer(encoder, means, images[tests], assigned[tests], ranks)
    found: dict[int, list[int]] = {}

    def rate(places: np.ndarray) -> np.ndarray:
        scores = []
        for place in places.tolist():
            pasted = torch.from_numpy(np.random.default_rng(place).integers(0, SIZE - PATCH, (15, 2)))
            score, found[place] = scorer(images[place], int(assigned[place]), pasted, PATCH, 4)
            scores.append(score)
        return np.array(scores, float)

    config = Config("e", DatasetConfig("d"), per_round=12)
    scores = search(assigned.numpy(), config, 0, rate)
    assert set(scores[48:]) == {10.0} and set(scores[~np.isnan(scores)][:24]) == {0.0}
    assert [found[place] for place in range(48, 60)] == corners.tolist()  # Grad-CAM's window is the square


def test_the_most_similar_images_of_each_cluster_are_the_test_images() -> None:
    angles = torch.tensor([0.0, 0.3, -0.1, 1.5, 1.6, 1.9], dtype=torch.float64)
    features = torch.stack([angles.cos(), angles.sin()], 1)
    means = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assigned = torch.tensor([0, 0, 0, 1, 1, 1])
    assert nearest(features, means, assigned, 2).tolist() == [0, 2, 4, 3]


@pytest.mark.parametrize(
    ("clusters", "drop", "rounds"), [(8, 0.25, [8, 6, 5, 4, 3]), (3, 0.25, [3]), (4, 0.5, [4, 2, 1])]
)
def test_a_round_leaves_the_lowest_clusters_behind(clusters: int, drop: float, rounds: list[int]) -> None:
    """Cluster k's images score k. As published, the search ends where the share is no cluster."""
    assigned = np.arange(20 * clusters) % clusters
    seen: list[list[int]] = []

    def rate(places: np.ndarray) -> np.ndarray:
        seen.append(sorted(assigned[places].tolist()))
        own: np.ndarray = assigned[places] * 1.0
        return own

    scores = search(assigned, Config("e", DatasetConfig("d"), drop=drop), 5, rate)
    assert seen == [sorted(2 * list(range(clusters - count, clusters))) for count in rounds]
    scored = ~np.isnan(scores)
    assert scored.sum() == 2 * sum(rounds) and (scores[scored] == assigned[scored]).all()


def test_a_cluster_counts_by_its_best_image_and_ends_with_its_last() -> None:
    """Cluster 0 has one good image among bad ones: it stays. All images are scored once where none is left."""
    assigned = np.arange(40) % 4
    good = 0

    def rate(places: np.ndarray) -> np.ndarray:
        return np.where(places == good, 5.0, np.where(assigned[places] == 0, -9.0, 1.0))

    scores = search(assigned, Config("e", DatasetConfig("d"), per_round=10), 0, rate)
    assert not np.isnan(scores).any() and scores[0] == 5
