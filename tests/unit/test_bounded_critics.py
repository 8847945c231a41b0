"""Critics of MIMIC's phase 1 keep to their budget at 224 px and are untouched at 32 px."""

import pytest
import torch

from dist_defend.methods.defend.mimic.information import InformationConfig, bounded


@pytest.mark.parametrize("shape", [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)])
def test_published_sizes_are_left_alone(shape: tuple[int, int, int]) -> None:
    maps = torch.rand(2, *shape)
    assert bounded(maps, InformationConfig().max_inputs) is maps


@pytest.mark.parametrize(
    ("shape", "side"), [((256, 56, 56), 16), ((512, 28, 28), 11), ((1024, 14, 14), 8), ((2048, 7, 7), 5)]
)
def test_resnet50_at_224_pixels_fits(shape: tuple[int, int, int], side: int) -> None:
    pooled = bounded(torch.ones(1, *shape), 65536)
    assert pooled.shape == (1, shape[0], side, side)
    assert pooled.numel() <= 65536
    assert pooled.unique().tolist() == [1.0]


def test_more_channels_than_inputs_leave_their_means() -> None:
    maps = torch.rand(2, 8, 3, 3)
    torch.testing.assert_close(bounded(maps, 4).flatten(1), maps.mean((2, 3)))
