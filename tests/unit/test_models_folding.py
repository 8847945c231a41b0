"""Frozen batch norms in convolutions: the same features and gradients, fewer keys."""

import copy

import pytest
import torch
from torch import Tensor, nn

from dist_defend.methods.attack.badencoder import freeze_norms
from dist_defend.models import folding
from dist_defend.models.encoder import build_encoder
from dist_defend.models.folding import FoldedConv2d, fold_frozen_norms
from dist_defend.models.pixel_space import Encoder


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
