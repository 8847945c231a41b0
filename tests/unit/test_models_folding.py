"""Frozen batch norms in convolutions: the same features and gradients, fewer keys."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_defend.methods.attack.badencoder import freeze_norms
from dist_defend.models import folding
from dist_defend.models.classifier import build_classifier
from dist_defend.models.encoder import build_encoder
from dist_defend.models.folding import FoldedConv2d, fold_frozen_norms
from dist_defend.models.pixel_space import Encoder
from tests.capture.emulator import accumulator_is_alive


def frozen(arch: str) -> Encoder:
    torch.manual_seed(0)
    encoder = build_encoder(arch, image_size=32).double()
    with torch.no_grad():
        encoder.train()(torch.rand(8, 3, 32, 32).double())
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    freeze_norms(encoder, "bn")
    return encoder


def features_and_gradients(encoder: Encoder, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    encoder.zero_grad()
    features = encoder(images)
    features.square().sum().backward()
    return features, {key: p.grad for key, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("arch", "count"),
    [("small_cifar", 13), ("resnet18_cifar", 20), ("timm:resnet10t", 14), ("timm:vit_tiny_patch16_224", 0)],
)
def test_features_and_gradients_stay(arch: str, count: int) -> None:
    plain = frozen(arch)
    folded, images = copy.deepcopy(plain), torch.rand(4, 3, 32, 32).double()
    assert fold_frozen_norms(folded, images[:1]) == count
    assert sum(isinstance(m, FoldedConv2d) for m in folded.modules()) == count
    (expected, gradients), (found, own) = (features_and_gradients(model, images) for model in (plain, folded))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert own.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(own[key], gradient, rtol=1e-8, atol=1e-9 * gradient.abs().max().item())
    state = {**plain.state_dict(), **folded.state_dict()}
    assert state.keys() == plain.state_dict().keys()  # what is left fits the unfolded model


def test_a_norm_that_learns_or_is_fed_by_a_shared_convolution_is_left_alone() -> None:
    learns = frozen("small_cifar")
    for module in learns.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.requires_grad_(True)
    assert fold_frozen_norms(learns, torch.rand(1, 3, 32, 32).double()) == 0

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.conv(self.conv(x)))
            return x

    twice = Twice()
    freeze_norms(twice, "bn")
    assert fold_frozen_norms(twice, torch.rand(1, 3, 8, 8)) == 0


def test_a_wrong_fold_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: a shift that forgets the running mean."""

    class Wrong(FoldedConv2d):
        def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
            super().__init__(conv, norm)
            self.shift = norm.bias.detach()

    monkeypatch.setattr(folding, "FoldedConv2d", Wrong)
    with pytest.raises(AssertionError):
        fold_frozen_norms(frozen("small_cifar"), torch.rand(1, 3, 32, 32).double())


class Twice(nn.Module):
    """A convolution whose output is read by a norm and by a sum; another that alone feeds one; a norm of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(self.norms[0](x).relu())
        y = self.norms[2](self.norms[1](y).relu() + x)
        means: Tensor = y.mean((2, 3))
        return means


def in_use(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics and weights that are not those of the start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.double().modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low in ((module.weight, 0.5), (module.running_var, 0.5), (module.running_mean, -1.0)):
                    assert tensor is not None
                    tensor.uniform_(low, 1.5)
                module.bias.normal_()
    return model.eval()


def slopes(network: nn.Module, parameters: list[nn.Parameter], images: Tensor) -> list[Tensor]:
    outputs = network(images)
    return [outputs, *torch.autograd.grad(outputs.square().sum(), parameters)]


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (Twice, 1),
        (lambda: build_classifier("ibau_vgg", 5, "none"), 6),
        (lambda: build_classifier("small_resnet", 5, "none"), 13),
        (lambda: build_classifier("wrn_10_1", 5, "none"), 3),  # their bn1 read what a sum or a shortcut reads too
        (lambda: build_classifier("torchvision:mobilenet_v3_small", 5, "none"), 34),
        (lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()), 0),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_folded_network_is_the_same_function_of_the_same_weights(
    make: Callable[[], nn.Module], count: int, layout: torch.memory_format
) -> None:
    model: Any = in_use(make()).to(memory_format=layout)  # type: ignore[call-overload]
    images, parameters = torch.rand(3, 3, 32, 32).double(), list(model.parameters())
    folded = folding.FoldedNetwork(model, images[:1])
    for _ in range(2):
        expected = slopes(model, parameters, images)
        with folded() as network:
            found = slopes(network, parameters, images)
            left = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        total = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        assert len(left) == total - count
        largest = max(value.abs().max().item() for value in expected)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12 * largest)
        with torch.no_grad():  # weights that learn, and statistics that are loaded, are read anew
            for tensor in (*parameters, *(b for b in model.buffers() if b.is_floating_point())):
                tensor.mul_(1.1)


def test_a_fold_that_forgets_the_mean_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: beta without the mean."""
    monkeypatch.setattr(torch, "_foreach_neg", lambda tensors: [torch.zeros_like(tensor) for tensor in tensors])
    model = in_use(Twice())
    images = torch.rand(3, 3, 8, 8).double()
    with folding.FoldedNetwork(model, images[:1])() as network:
        assert not torch.allclose(network(images), model(images))


def test_nothing_of_a_folded_pass_stays() -> None:
    """A graph that is captured later must find no node of a parameter alive."""
    model = in_use(Twice())
    folded = folding.FoldedNetwork(model, torch.rand(1, 3, 8, 8).double())
    keys = list(model.state_dict())
    with folded() as network:
        network(torch.rand(1, 3, 8, 8).double()).sum().backward()
    assert not any(accumulator_is_alive(parameter) for parameter in model.parameters())
    assert list(model.state_dict()) == keys
