"""Gaussian blur and solarisation against torchvision's functions, and what they leave as it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from dist_defend.config import load_experiment
from dist_defend.data.augment import (
    BLUR,
    IDENTITY,
    SIGMA,
    SIMCLR,
    SOLARIZE,
    AugmentConfig,
    BlurConfig,
    SolarizeConfig,
    View,
    apply_augment,
    blurred,
    solarized,
)
from dist_defend.data.draws import draw
from dist_defend.data.loader import LoaderConfig, make_loader
from dist_defend.data.sources import ArraySource
from dist_defend.data.store import write_dataset
from dist_defend.errors import UserError
from dist_defend.methods.defend.cmi.options import SynthesisConfig
from tests.unit.test_config import MINIMAL, write
from tests.unit.test_data_augment import GREY_LEVEL, fused, pictures

ROWS = np.arange(4000)
BOTH = AugmentConfig(blur=BlurConfig(0.7), solarize=SolarizeConfig(0.6))


@pytest.mark.parametrize("shape", [(40, 40), (60, 33), (21, 5)])
def test_blur_is_torchvisions_in_double_precision(shape: tuple[int, int]) -> None:
    images = torch.rand(24, 3, *shape, dtype=torch.float64)
    images[0], images[1] = 1, 0
    params = torch.from_numpy(draw(3, 1, np.arange(24), 0, BOTH, *shape)).double()
    radius = BlurConfig().radius(shape[0])
    found = blurred(images, params, radius)
    assert 8 < params[:, BLUR].sum() < 24
    for image, row, view in zip(images, params, found, strict=True):
        expected = tv.gaussian_blur(image, [2 * radius + 1] * 2, [float(row[SIGMA])] * 2) if row[BLUR] else image
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-14)
    assert found.max() <= 1


@pytest.mark.parametrize("threshold", [0.0, 0.3, 128 / 255, 1.0])
def test_solarisation_is_torchvisions_in_double_precision(threshold: float) -> None:
    images = torch.rand(24, 3, 9, 7, dtype=torch.float64)
    images[:, 0, 0, 0] = threshold
    params = torch.from_numpy(draw(3, 1, np.arange(24), 0, BOTH, 9, 7)).double()
    found = solarized(images, params, threshold)
    assert 8 < params[:, SOLARIZE].sum() < 24
    for image, row, view in zip(images, params, found, strict=True):
        assert torch.equal(view, tv.solarize(image, threshold) if row[SOLARIZE] else image)


@pytest.mark.parametrize(
    "config",
    [
        BOTH,
        AugmentConfig(size=100, blur=BlurConfig(1.0)),
        AugmentConfig(blur=BlurConfig(1.0, kernel=1.0, sigma=(5.0, 5.0))),
        replace(SIMCLR, size=48, blur=BlurConfig(), solarize=SolarizeConfig(0.5, threshold=0.5)),
    ],
    ids=str,
)
def test_both_implementations_do_it_after_the_colours(config: AugmentConfig) -> None:
    images, rows = pictures(40, 40, 29), np.arange(300, 340)
    params = draw(5, 1, rows, 0, config, 40, 29)
    before = apply_augment(
        torch.from_numpy(images), torch.from_numpy(params), replace(config, blur=None, solarize=None)
    )
    radius = config.blur.radius(before.shape[2]) if config.blur else 0
    expected = []
    for image, row in zip(before, params, strict=True):
        if row[BLUR]:
            image = tv.gaussian_blur(image, [2 * radius + 1] * 2, [float(row[SIGMA])] * 2)
        expected.append(tv.solarize(image, config.solarize.threshold) if config.solarize and row[SOLARIZE] else image)
    for made in (
        apply_augment(torch.from_numpy(images), torch.from_numpy(params), config),
        fused(images, config, rows),
    ):
        assert (made - torch.stack(expected)).abs().max() < 0.01 * GREY_LEVEL
        assert made.min() >= 0 and made.max() <= 1


def test_bytes_are_solarised_from_128_on_as_pillow_does() -> None:
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    config = AugmentConfig(solarize=SolarizeConfig(1.0))
    params = torch.from_numpy(draw(0, 0, np.zeros(1, np.int64), 0, config, 16, 16))
    levels = torch.where(torch.arange(256) < 128, torch.arange(256), 255 - torch.arange(256)).float()
    for made in (apply_augment(torch.from_numpy(images), params, config), fused(images, config, np.zeros(1, np.int64))):
        assert torch.equal((made[0, 0].reshape(-1) * 255).round(), levels)


@pytest.mark.parametrize(("height", "width"), [(224, 23), (160, 17), (96, 9), (64, 7), (32, 3), (19, 1)])
def test_kernels_are_as_wide_as_published(height: int, width: int) -> None:
    """google-research/simclr, data_util.py: kernel_size = height // 10, radius = int(kernel_size / 2)."""
    assert 2 * BlurConfig().radius(height) + 1 == width


def test_draws_are_uniform_and_shift_no_others() -> None:
    plain = draw(3, 0, ROWS, 0, SIMCLR, 32, 32)
    params = draw(3, 0, ROWS, 0, replace(SIMCLR, blur=BlurConfig(), solarize=SolarizeConfig()), 32, 32)
    kept = [column for column in range(params.shape[1]) if column not in (BLUR, SIGMA, SOLARIZE)]
    assert (plain[:, kept] == params[:, kept]).all() and (plain[:, [BLUR, SOLARIZE]] == 0).all()
    for column, probability in ((BLUR, 0.5), (SOLARIZE, 0.2)):
        assert abs(params[:, column].mean() - probability) < 4 * np.sqrt(0.25 / len(ROWS))
    sigma = params[:, SIGMA]
    assert 0.1 <= sigma.min() < 0.11 and 1.99 < sigma.max() <= 2.0
    assert abs(sigma.mean() - 1.05) < 4 * 1.9 / np.sqrt(12 * len(ROWS))
    assert abs(np.corrcoef(params[:, [BLUR, SIGMA, SOLARIZE]].T) - np.eye(3)).max() < 0.08


def test_what_is_off_is_not_written(tmp_path: Path) -> None:
    """The digest is that of the version before the keys were there."""
    off = load_experiment(write(tmp_path, MINIMAL))
    assert not {"blur", "solarize"} & off.resolved()["simclr"]["augment"].keys()
    assert off.digest() == "366137b08ef308849c8e97121690fd2f88a8e174971615d5e67e52e62d007971"
    null = load_experiment(write(tmp_path, MINIMAL), ["simclr.augment.blur=null"])
    on = load_experiment(write(tmp_path, MINIMAL), ["simclr.augment.blur={}"])
    assert null.digest() == off.digest() != on.digest()
    assert on.resolved()["simclr"]["augment"]["blur"] == {"probability": 0.5, "kernel": 0.1, "sigma": [0.1, 2.0]}


def test_views_that_no_kernel_fits_are_refused(tmp_path: Path) -> None:
    images = np.zeros((4, 16, 16, 3), np.uint8)
    data = write_dataset(ArraySource(images, np.zeros(4), ["any"]), tmp_path / "d", name="n", split="train")
    views = (View(IDENTITY), View(AugmentConfig(blur=BlurConfig())))
    with pytest.raises(UserError, match=r"key 'blur.kernel' is 0.1, which for views of 16x16 pixels is 1 wide"):
        make_loader(data, config=LoaderConfig(), batch_size=2, views=views)
    wide = np.zeros((100, 4, 3), np.uint8)
    with pytest.raises(UserError, match="views of 100x4 pixels is 11 wide"):
        make_loader(data, config=LoaderConfig(), batch_size=2, views=(View(views[1].augment, wide),))


@pytest.mark.parametrize(
    ("section", "change"),
    [
        (BlurConfig, {"probability": 1.1}),
        (BlurConfig, {"kernel": 0.0}),
        (BlurConfig, {"sigma": (0.0, 1.0)}),
        (BlurConfig, {"sigma": (2.0, 1.0)}),
        (BlurConfig, {"sigma": (1.0, float("inf"))}),
        (SolarizeConfig, {"probability": -0.1}),
        (SolarizeConfig, {"threshold": 128.0}),
    ],
)
def test_values_that_mean_nothing_are_refused(section: Any, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"key '{next(iter(change))}' is"):
        section(**change)


@pytest.mark.parametrize("section", [{"blur": BlurConfig()}, {"solarize": SolarizeConfig()}])
def test_synthesised_images_are_cropped_and_flipped_only(section: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a crop and a flip only"):
        SynthesisConfig(global_view=AugmentConfig(**section))
