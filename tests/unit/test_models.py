"""Encoders: layouts, shapes, one pass for all taps, normalisation, initial weights."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dist_defend.errors import UserError
from dist_defend.models.encoder import build_encoder, build_simclr
from dist_defend.models.pixel_space import NORMALIZATIONS, Encoder, Normalize

ENCODERS = [
    ("resnet18_cifar", 32, 512, [(64, 32), (128, 16), (256, 8), (512, 4)]),
    ("resnet50_cifar", 16, 2048, [(256, 16), (512, 8), (1024, 4), (2048, 2)]),
    ("small_cifar", 32, 256, [(32, 16), (64, 8), (128, 4), (256, 2)]),
    ("timm:resnet18", 64, 512, [(64, 16), (128, 8), (256, 4), (512, 2)]),
    ("timm:vit_tiny_patch16_224", 64, 192, [(192, 4)] * 4),
    ("timm:vit_small_patch16_dinov3", 32, 384, [(384, 2)] * 4),  # with registers
    ("timm:efficientnet_b0", 64, 1280, [(24, 16), (40, 8), (112, 4), (320, 2)]),
    ("clip_resnet50", 64, 1024, [(256, 16), (512, 8), (1024, 4), (2048, 2)]),
]


def count_calls(encoder: Encoder) -> list[int]:
    """How often each convolution and linear layer is run, counted from here on."""
    layers = [m for m in encoder.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    counts = [0] * len(layers)

    def counter(number: int) -> Callable[..., None]:
        def count(*_: object) -> None:
            counts[number] += 1

        return count

    for number, layer in enumerate(layers):
        layer.register_forward_hook(counter(number))
    return counts


@pytest.mark.parametrize(("arch", "size", "width", "maps"), ENCODERS, ids=[e[0] for e in ENCODERS])
def test_one_pass_gives_four_maps_and_the_features_of_forward(
    arch: str, size: int, width: int, maps: list[tuple[int, int]]
) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(arch, "imagenet", size).eval()
    images = torch.rand(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = encoder(images)
        counts = count_calls(encoder)
        found, features = encoder.layers(images)
    assert features.shape == (2, width) and encoder.feature_dim == width
    assert [(m.shape[1], m.shape[2]) for m in found] == maps
    assert all(m.shape[2] == m.shape[3] for m in found)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
    assert max(counts) == 1


def test_taps_are_the_very_tensors_of_the_pass() -> None:
    encoder = build_encoder("small_cifar").eval()
    outputs: list[Tensor] = []
    for stage in list(encoder.get_submodule("f").children())[3:7]:
        stage.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    maps, _ = encoder.layers(torch.rand(1, 3, 32, 32))
    assert all(tap is output for tap, output in zip(maps, outputs, strict=True))


def test_a_vit_is_tapped_at_the_quarters_of_its_depth_without_its_class_token() -> None:
    torch.manual_seed(0)
    encoder = build_encoder("timm:vit_tiny_patch16_224", "none", 64).eval()
    tokens: list[Tensor] = []
    for number in (2, 5, 8, 11):  # of 12 blocks
        block = encoder.get_submodule(f"f.blocks.{number}")
        block.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    maps, _ = encoder.layers(torch.rand(2, 3, 64, 64))
    for tap, token in zip(maps, tokens, strict=True):
        assert tap.flatten(2).transpose(1, 2).equal(token[:, 1:])


def test_resnet18_has_the_published_key_layout() -> None:
    state = build_simclr("resnet18_cifar").state_dict()
    keys = list(state)
    assert len(keys) == 128 and sum(p.numel() for p in build_simclr("resnet18_cifar").parameters()) == 11497664
    assert keys[:3] == ["f.f.0.weight", "f.f.1.weight", "f.f.1.bias"]
    assert keys[-8:] == [
        "g.0.weight", "g.1.weight", "g.1.bias", "g.1.running_mean", "g.1.running_var", "g.1.num_batches_tracked",
        "g.3.weight", "g.3.bias",
    ]  # fmt: skip
    assert state["f.f.0.weight"].shape == (64, 3, 3, 3)
    assert state["f.f.6.0.downsample.0.weight"].shape == (512, 256, 1, 1)


def test_initial_weights_are_the_published_ones() -> None:
    torch.manual_seed(0)
    encoder = build_encoder("resnet18_cifar")
    stem, conv = encoder.get_parameter("f.0.weight"), encoder.get_parameter("f.6.1.conv2.weight")
    assert stem.abs().max().item() <= 1 / math.sqrt(27)  # torch's default: uniform in 1 / sqrt(fan in)
    assert stem.std().item() == pytest.approx(1 / math.sqrt(3 * 27), rel=0.05)
    assert conv.std().item() == pytest.approx(math.sqrt(2 / (9 * 512)), rel=0.01)  # He's normal, fan out
    assert conv.abs().max() > 3 * conv.std()


def test_small_cifar_keeps_to_its_budget() -> None:
    encoder = build_encoder("small_cifar").eval()
    products = 0

    def add(module: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal products
        products += output[0].numel() * module.weight[0].numel()

    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(add)
    encoder(torch.rand(1, 3, 32, 32))
    assert products < 15.5e6
    assert sum(p.numel() for p in encoder.parameters()) < 1.5e6


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_normalisation_is_per_channel_and_not_in_the_state(name: str) -> None:
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALIZATIONS[name])
    images = torch.rand(2, 3, 4, 4)
    layer = Normalize(name)
    torch.testing.assert_close(layer(images), (images - mean) / std)
    assert not layer.state_dict()


def test_simclr_returns_unit_features_and_projections() -> None:
    torch.manual_seed(0)
    model = build_simclr("small_cifar").eval()
    images = torch.rand(4, 3, 32, 32)
    h, z = model(images)
    maps, h_again, z_again = model.layers(images)
    assert h.shape == (4, 256) and z.shape == (4, 128) and len(maps) == 4
    assert h.equal(h_again) and z.equal(z_again)
    for unit in (h, z):
        torch.testing.assert_close(unit.norm(dim=1), torch.ones(4))
    raw = model.f(images)
    torch.testing.assert_close(h, raw / raw.norm(dim=1, keepdim=True))
    alone = build_simclr("small_cifar", projector=False)
    assert all(key.startswith("f.") for key in alone.state_dict())


def test_maps_stay_channels_last() -> None:
    encoder = build_encoder("small_cifar").eval()
    maps, _ = encoder.layers(torch.rand(2, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)


@pytest.mark.parametrize(
    ("arch", "normalization", "told"),
    [
        ("resnet18_cfar", "none", "did you mean 'resnet18_cifar'"),
        ("something", "none", "choose from resnet18_cifar, resnet34_cifar"),
        ("timm:resnet_18", "none", "did you mean .*resnet18"),
        ("timm:efficientvit_m0", "none", "timm:efficientvit_m0 has no four feature maps"),
        ("small_cifar", "cifar", r"unknown normalization 'cifar': did you mean 'cifar10'\? choose from none, cifar10"),
    ],
)
def test_what_cannot_be_built_is_a_user_error(arch: str, normalization: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        build_encoder(arch, normalization)
