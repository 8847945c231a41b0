"""Both implementations of the augmentation against Pillow and torchvision, sample by sample, same parameters."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from dist_defend.data.augment import (
    BRIGHTNESS,
    FLIP,
    GRAYSCALE,
    HEIGHT,
    IDENTITY,
    JITTER,
    LEFT,
    ORDER,
    REFERENCE,
    SIMCLR,
    TOP,
    WIDTH,
    AugmentConfig,
    View,
    apply_augment,
    crop_and_flip,
)
from dist_defend.data.draws import draw
from dist_defend.data.fused import empty_views, fill_views
from dist_defend.data.pixels import Pixels

GREY_LEVEL = 1 / 255
CROP_FLIP = AugmentConfig("random_resized", flip=0.5)
EXACT = [IDENTITY, CROP_FLIP, replace(CROP_FLIP, size=24), replace(CROP_FLIP, size=47), AugmentConfig(size=16),
         AugmentConfig("pad", flip=0.5), AugmentConfig("pad", pad=6, size=30, flip=1.0)]  # fmt: skip
COLOUR = [SIMCLR, REFERENCE, replace(SIMCLR, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.5, jitter=1.0),
          AugmentConfig(jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.5),
          AugmentConfig(jitter=1.0, hue=0.0), AugmentConfig(grayscale=1.0)]  # fmt: skip


def pictures(count: int, height: int, width: int) -> np.ndarray:
    """Noise over smooth colour, with some grey, black and white images among them."""
    random = np.random.default_rng(0)
    ramps = np.linspace(0, 255, height)[:, None, None] * random.random((count, 1, 1, 3))
    images = (ramps + random.normal(0, 30, (count, height, width, 3))).clip(0, 255).astype(np.uint8)
    images[0], images[1], images[2] = 0, 255, images[2, :, :, :1]
    return images


def one_by_one(image: np.ndarray, params: np.ndarray, config: AugmentConfig) -> Tensor:
    """The published pipeline on one PIL image, with given parameters; colour on the float tensor."""
    top, left, height, width = (int(params[column]) for column in (TOP, LEFT, HEIGHT, WIDTH))
    size = config.output_shape(*image.shape[:2])
    picture: Image.Image = Image.fromarray(image)
    if config.crop == "random_resized" and height <= size[0]:
        picture = tv.resized_crop(picture, top, left, height, width, size)
    elif config.crop == "random_resized" or (config.size and config.crop == "none"):  # Pillow 13 may do rows first
        picture = tv.resize(tv.crop(picture, top, left, height, width), [height, size[1]])
        picture = tv.resize(picture, list(size))
    elif config.crop == "pad":
        picture = tv.pad(picture, [config.pad] * 4)
        picture = tv.crop(picture, top + config.pad, left + config.pad, height, width)
    if params[FLIP]:
        picture = tv.horizontal_flip(picture)
    x: torch.Tensor = tv.pil_to_tensor(picture).float() / 255  # as ToTensor; v2.ToDtype multiplies by 1 / 255
    if params[JITTER]:
        steps = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
        for step in params[ORDER:].astype(int):
            x = steps[step](x, float(params[BRIGHTNESS + step]))
    if params[GRAYSCALE]:
        x = tv.rgb_to_grayscale(x, num_output_channels=3)
    return x


def fused(images: np.ndarray, config: AugmentConfig, rows: np.ndarray) -> Tensor:
    outs = empty_views([View(config)], len(images), *images.shape[1:3])
    fill_views(outs, [View(config)], Pixels.of(images), rows, 5, 1)
    return torch.from_numpy(outs[0]).permute(0, 3, 1, 2)


@pytest.mark.parametrize("shape", [(32, 32), (40, 29)])
@pytest.mark.parametrize("config", EXACT, ids=str)
def test_geometry_is_pillows_to_the_last_bit(config: AugmentConfig, shape: tuple[int, int]) -> None:
    images, rows = pictures(40, *shape), np.arange(100, 140)
    params = draw(5, 1, rows, 0, config, *shape)
    expected = torch.stack([one_by_one(image, p, config) for image, p in zip(images, params, strict=True)])
    batched = apply_augment(torch.from_numpy(images), torch.from_numpy(params), config)
    assert torch.equal(batched, expected)
    assert torch.equal(fused(images, config, rows), expected)
    assert batched.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("config", COLOUR, ids=str)
def test_colour_is_torchvisions(config: AugmentConfig) -> None:
    images, rows = pictures(60, 32, 32), np.arange(200, 260)
    params = draw(5, 1, rows, 0, config, 32, 32)
    expected = torch.stack([one_by_one(image, p, config) for image, p in zip(images, params, strict=True)])
    batched = apply_augment(torch.from_numpy(images), torch.from_numpy(params), config)
    assert (batched - expected).abs().max() < 0.01 * GREY_LEVEL
    assert (fused(images, config, rows) - expected).abs().max() < 0.01 * GREY_LEVEL


def test_every_colour_step_was_exercised() -> None:
    params = draw(5, 1, np.arange(200, 260), 0, SIMCLR, 32, 32)
    on = params[:, JITTER] > 0
    assert 30 < on.sum() < 60 and len(np.unique(params[on, ORDER:], axis=0)) > 15
    assert 2 < params[:, GRAYSCALE].sum() < 30 and 15 < params[:, FLIP].sum() < 45


def test_a_constant_image_takes_the_draws_of_the_samples() -> None:
    reference = pictures(5, 32, 32)[4]
    images, rows = pictures(6, 20, 20), np.array([3, 1, 4, 15, 9, 2])
    views = [View(), View(REFERENCE, image=reference)]
    outs = empty_views(views, len(images), 20, 20)
    fill_views(outs, views, Pixels.of(images), rows, 5, 1)
    assert [out.shape for out in outs] == [(6, 20, 20, 3), (6, 32, 32, 3)]
    params = draw(5, 1, rows, 1, REFERENCE, 32, 32)
    expected = torch.stack([one_by_one(reference, p, REFERENCE) for p in params])
    assert (torch.from_numpy(outs[1]).permute(0, 3, 1, 2) - expected).abs().max() < 0.01 * GREY_LEVEL
    assert np.array_equal(outs[0], images / np.float32(255))


def test_images_of_several_sizes_make_one_batch() -> None:
    images = [pictures(4, 30 + 7 * n, 50 - 6 * n)[3] for n in range(4)]
    heights, widths = np.array([i.shape[0] for i in images]), np.array([i.shape[1] for i in images])
    lengths = 3 * heights * widths
    pixels = Pixels(np.concatenate([i.reshape(-1) for i in images]), np.cumsum(lengths) - lengths, heights, widths)
    view, rows = View(replace(CROP_FLIP, size=24)), np.arange(4)
    outs = empty_views([view], 4, 1, 1)
    fill_views(outs, [view], pixels, rows, 5, 1)
    params = draw(5, 1, rows, 0, view.augment, heights, widths)
    expected = torch.stack([one_by_one(image, p, view.augment) for image, p in zip(images, params, strict=True)])
    assert torch.equal(torch.from_numpy(outs[0]).permute(0, 3, 1, 2), expected)


def test_a_constant_image_of_another_kind_is_refused() -> None:
    for image in (np.zeros((8, 8, 3), np.float32), np.zeros((1, 8, 8, 3), np.uint8), np.zeros((3, 8, 8), np.uint8)):
        with pytest.raises(ValueError, match="it must be uint8"):
            View(image=image)


@pytest.mark.parametrize("config", [AugmentConfig("pad", flip=0.5), AugmentConfig("pad", pad=6, size=20, flip=0.5)])
def test_padded_crops_of_float_images_are_those_of_bytes(config: AugmentConfig) -> None:
    images = pictures(12, 24, 20)
    params = torch.from_numpy(draw(3, 1, np.arange(12), 0, config, 24, 20))
    expected = apply_augment(torch.from_numpy(images), params, config).double()
    found = crop_and_flip(torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255, params.double(), config)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_enlarged_crops_of_float_images_are_torchs() -> None:
    config = AugmentConfig("random_resized", scale=(0.25, 1.0), flip=0.5)
    images = torch.rand(12, 3, 24, 20, dtype=torch.float64)
    params = draw(3, 1, np.arange(12), 0, config, 24, 20)
    found = crop_and_flip(images, torch.from_numpy(params).double(), config)
    for image, row, view in zip(images, params, found, strict=True):
        top, left, height, width = (int(row[column]) for column in (TOP, LEFT, HEIGHT, WIDTH))
        part = image[None, :, top : top + height, left : left + width]
        expected = torch.nn.functional.interpolate(part, (24, 20), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(view, expected.flip(2) if row[FLIP] else expected, rtol=0, atol=1e-12)


def test_crops_of_float_images_can_be_differentiated() -> None:
    for config in (AugmentConfig("pad", pad=1, flip=0.5), AugmentConfig("random_resized", flip=0.5)):
        params = torch.from_numpy(draw(3, 1, np.arange(2), 0, config, 5, 5)).double()
        images = torch.rand(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, p=params, c=config: crop_and_flip(x, p, c), images)
