"""The random parameters: where they may come from, and how they are distributed."""

from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from dist_defend.data.augment import (
    BRIGHTNESS,
    CONTRAST,
    FLIP,
    GRAYSCALE,
    HEIGHT,
    HUE,
    IDENTITY,
    JITTER,
    LEFT,
    ORDER,
    SATURATION,
    SIMCLR,
    TOP,
    WIDTH,
    AugmentConfig,
)
from dist_defend.data.draws import draw

ROWS = np.arange(4000)


def test_a_draw_depends_on_seed_epoch_row_and_view_alone() -> None:
    alone = draw(1, 2, np.array([77]), 1, SIMCLR, 32, 32)
    among = draw(1, 2, np.array([5, 77, 9]), 1, SIMCLR, 32, np.array([40, 32, 24]))
    assert (alone[0] == among[1]).all()
    others = [
        draw(seed, epoch, np.array([row]), view, SIMCLR, 32, 32)
        for seed, epoch, row, view in ((0, 2, 77, 1), (1, 3, 77, 1), (1, 2, 78, 1), (1, 2, 77, 0))
    ]
    rows = [alone, *others]
    assert len({row.tobytes() for row in rows}) == len(rows)


def test_one_option_does_not_shift_the_draws_of_another() -> None:
    full = draw(0, 0, ROWS, 0, SIMCLR, 32, 32)
    no_crop = draw(0, 0, ROWS, 0, AugmentConfig(flip=0.5, jitter=0.8, grayscale=0.2), 32, 32)
    assert (full[:, FLIP:] == no_crop[:, FLIP:]).all()
    assert (no_crop[:, [TOP, LEFT]] == 0).all() and (no_crop[:, [HEIGHT, WIDTH]] == 32).all()


def test_probabilities_and_ranges_are_those_of_the_configuration() -> None:
    params = draw(3, 0, ROWS, 0, SIMCLR, 32, 32)
    deviation = 4 * np.sqrt(0.25 / len(ROWS))
    for column, probability in ((FLIP, 0.5), (JITTER, 0.8), (GRAYSCALE, 0.2)):
        assert abs(params[:, column].mean() - probability) < deviation
    for column, low, high in ((BRIGHTNESS, 0.6, 1.4), (CONTRAST, 0.6, 1.4), (SATURATION, 0.6, 1.4), (HUE, -0.1, 0.1)):
        values = params[:, column]
        assert low <= values.min() and values.max() <= high and np.ptp(values) > 0.99 * (high - low)
        assert abs(values.mean() - (low + high) / 2) < 4 * (high - low) / np.sqrt(12 * len(ROWS))
    orders, counts = np.unique(params[:, ORDER:], axis=0, return_counts=True)
    assert len(orders) == 24 and (np.sort(orders, axis=1) == [0, 1, 2, 3]).all()
    assert (abs(counts - len(ROWS) / 24) < 5 * np.sqrt(len(ROWS) / 24)).all()
    assert (
        abs(
            np.corrcoef(params[:, [FLIP, JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAYSCALE]].T) - np.eye(7)
        ).max()
        < 0.08
    )


def test_nothing_is_drawn_for_the_identity() -> None:
    params = draw(3, 0, ROWS, 0, IDENTITY, 20, 30)
    assert (params[:, [TOP, LEFT, FLIP, JITTER, GRAYSCALE]] == 0).all()
    assert (params[:, HEIGHT] == 20).all() and (params[:, WIDTH] == 30).all()


@pytest.mark.parametrize("shape", [(32, 32), (20, 60), (60, 20)])  # the last two often fall back to a central crop
def test_resized_crops_are_distributed_like_torchvisions(shape: tuple[int, int]) -> None:
    scale, ratio = (0.5, 1.0), (3 / 4, 4 / 3)
    mine = draw(0, 0, ROWS, 0, AugmentConfig("random_resized", scale=scale, ratio=ratio), *shape)[
        :, [TOP, LEFT, HEIGHT, WIDTH]
    ]
    torch.manual_seed(0)
    image = torch.zeros(3, *shape, dtype=torch.uint8)
    crop = v2.RandomResizedCrop(8, scale, ratio)
    theirs = np.array([[crop.make_params([image])[k] for k in ("top", "left", "height", "width")] for _ in ROWS])
    assert (mine[:, 0] + mine[:, 2] <= shape[0]).all() and (mine[:, 1] + mine[:, 3] <= shape[1]).all()
    assert (mine[:, :2] >= 0).all() and (mine[:, 2:] > 0).all()
    deviation = np.maximum(theirs.std(0), 0.02) * np.sqrt(2 / len(ROWS))
    assert (abs(mine.mean(0) - theirs.mean(0)) < 5 * deviation).all()
    assert (abs(mine.std(0) - theirs.std(0)) < 5 * deviation).all()


def test_padded_crops_reach_every_place_and_no_further() -> None:
    params = draw(0, 0, ROWS, 0, AugmentConfig("pad", pad=4), 32, 32)
    assert set(params[:, TOP]) == set(range(-4, 5)) == set(params[:, LEFT])
    smaller = draw(0, 0, ROWS, 0, AugmentConfig("pad", pad=1, size=30), 32, 32)
    assert set(smaller[:, TOP]) == set(range(-1, 4)) and (smaller[:, HEIGHT] == 30).all()


@pytest.mark.parametrize(
    "change",
    [
        {"flip": 1.5},
        {"hue": 0.6},
        {"scale": (0.0, 1.0)},
        {"ratio": (2.0, 1.0)},
        {"size": 0},
        {"pad": -1},
        {"contrast": -1.0},
    ],
)
def test_values_that_mean_nothing_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"key '{next(iter(change))}' is"):
        AugmentConfig(**change)
