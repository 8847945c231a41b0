"""A model with ``resize`` takes small images and gives its network large ones; perturbations stay small."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from dist_defend.cli import main
from dist_defend.errors import UserError
from dist_defend.methods.attack.badencoder import freeze_norms
from dist_defend.models.artifact import ModelCard, load_artifact, save_artifact
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.models.encoder import build_encoder, build_simclr
from dist_defend.models.folding import fold_frozen_norms
from dist_defend.models.pixel_space import Encoder, Normalize
from dist_defend.models.wide_resnet import WideResNet
from tests.runs import CLASSES, SIZE, make_data, make_experiment, options_of


def images(size: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("size", "resize"), [(16, 32), (32, 16), (28, 32)])
def test_it_resizes_as_torchvision_does_with_tensors(size: int, resize: int) -> None:
    torch.manual_seed(0)
    model = build_classifier("small_resnet", 5, "imagenet", size, resize=resize).eval()
    plain = build_classifier("small_resnet", 5, "imagenet", resize).eval()
    plain.load_state_dict(model.state_dict())
    x = images(size)
    expected = plain(v2.functional.resize(x, [resize, resize], antialias=True))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x), plain(x), rtol=1e-2) and (model.image_size, model.resize) == (size, resize)


@pytest.mark.parametrize(
    "arch", ["timm:vit_tiny_patch16_224", "torchvision:vit_b_32", "timm:swin_tiny_patch4_window7_224", "wrn_16_1"]
)
def test_the_network_inside_is_made_for_the_resized_images(arch: str) -> None:
    with torch.device("meta"):
        model = build_classifier(arch, 5, "half", 32, resize=64).eval()
        plain = build_classifier(arch, 5, "half", 64)
        assert model(torch.rand(2, 3, 32, 32)).shape == (2, 5)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}


def test_it_holds_where_the_network_or_its_feature_maps_are_asked_for_alone() -> None:
    model = build_classifier("wrn_10_1", 5, "cifar10", 16, resize=32).eval()
    x = model.normalize(images(16))
    twin = copy.deepcopy(model.net)
    assert isinstance(model.net, WideResNet) and isinstance(twin, WideResNet)
    maps, logits = twin.layers(x)
    assert [m.shape[-1] for m in maps] == [32, 16, 8]
    assert logits.equal(model.net(x)) and logits.equal(model(images(16)))


@pytest.mark.parametrize("arch", ["small_cifar", "timm:resnet10t", "timm:vit_tiny_patch16_224", "open_clip:RN50"])
def test_encoders_resize_in_both_kinds_of_pass(arch: str) -> None:
    if arch.startswith("open_clip"):
        pytest.importorskip("open_clip")
    encoder = build_encoder(arch, "clip", 32, resize=64).eval()
    with torch.no_grad():
        maps, features = encoder.layers(images(32))
        torch.testing.assert_close(features, encoder(images(32)), rtol=1e-4, atol=1e-5)
        plain = build_encoder(arch, "clip", 64).eval()
        plain.load_state_dict(encoder.state_dict())
        assert [m.shape for m in maps] == [m.shape for m in plain.layers(images(64))[0]]


def test_an_encoder_keeps_it_when_its_norms_are_folded_and_its_constants_exchanged() -> None:
    """As BadEncoder does."""
    encoder = build_simclr("small_cifar", "cifar10", 16, resize=32).f
    encoder.normalize = Normalize("imagenet")
    freeze_norms(encoder, "bn")
    expected = encoder(images(16))
    assert fold_frozen_norms(encoder, images(16)) > 0
    torch.testing.assert_close(encoder(images(16)), expected, rtol=1e-4, atol=1e-4)
    assert encoder.prepared(images(16)).shape[-1] == 32


@pytest.mark.parametrize("kind", ["classifier", "simclr", "encoder"])
def test_a_model_folder_brings_it_back(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    card = ModelCard(kind, "small_cifar", "none", 16, feature_dim=256)
    model: nn.Module = build_simclr("small_cifar", "none", 16, projector=kind == "simclr", resize=32)
    if kind == "classifier":
        model = build_classifier("small_resnet", 4, "none", 16, resize=32)
        card = ModelCard(kind, "small_resnet", "none", 16, num_classes=4)  # which forgot it
    save_artifact(tmp_path / "m", model, card)  # type: ignore[arg-type]
    loaded, found = load_artifact(tmp_path / "m")
    assert (found.resize, found.image_size, loaded.resize) == (32, 16, 32)
    for expected, value in zip(_outputs(model.eval()), _outputs(loaded.eval()), strict=True):
        torch.testing.assert_close(value, expected)


def _outputs(model: nn.Module) -> tuple[torch.Tensor, ...]:
    found = model(images(16))
    return found if isinstance(found, tuple) else (found,)


def test_second_derivatives_go_through_it() -> None:
    model = build_classifier("small_resnet", 4, "none", 8, resize=16).double().eval()
    delta = torch.zeros(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    x = images(8).double()

    def slope(at: torch.Tensor) -> torch.Tensor:
        (found,) = torch.autograd.grad(model(x + at).logsumexp(1).sum(), at, create_graph=True)
        return found

    direction = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (product,) = torch.autograd.grad(slope(delta), delta, direction)
    step = 1e-6
    by_differences = (slope(delta + step * direction) - slope(delta - step * direction)) / (2 * step)
    torch.testing.assert_close(product, by_differences.detach(), rtol=1e-4, atol=1e-7)
    assert product.abs().max() > 0


def test_backdoorbench_gets_its_own_form_of_a_network_behind_a_resize(tmp_path: Path) -> None:
    model = build_classifier("torchvision:mobilenet_v3_small", 4, "imagenet", 32, resize=64)
    save_artifact(tmp_path / "m", model, ModelCard("classifier", model.arch, "imagenet", 32, num_classes=4))
    assert main(["export", str(tmp_path / "m"), "--out", str(tmp_path / "out.pt")]) == 0
    written = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    theirs = nn.Sequential(v2.Resize((64, 64)), copy.deepcopy(model.net))
    assert list(written) == list(theirs.state_dict())


def test_no_side_is_no_size() -> None:
    for build in (lambda: build_classifier("wrn_10_1", 4, resize=-1), lambda: build_encoder("small_cifar", resize=-1)):
        with pytest.raises(UserError, match="key 'resize' is -1"):
            build()


def test_without_it_nothing_is_different() -> None:
    model, encoder = build_classifier("small_resnet", 4), build_encoder("small_cifar")
    assert isinstance(model, Classifier) and isinstance(encoder, Encoder)
    assert model.resize is None and encoder.resize is None
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("student", "resize"), [("wrn_16_1", 32), ("small_resnet", None)])
def test_a_student_of_the_teachers_family_resizes_as_it_does(student: str, resize: int | None, tmp_path: Path) -> None:
    options = options_of("kd", tmp_path) | {"student": student}
    torch.manual_seed(0)
    model = build_classifier("wrn_10_1", CLASSES, "none", SIZE, resize=32)
    save_artifact(options["teacher"], model, ModelCard("classifier", model.arch, "none", SIZE, num_classes=CLASSES))
    assert main(["run", str(make_experiment(tmp_path, "kd", options))]) == 0
    learned, card = load_artifact(tmp_path / "run" / "model")
    assert (learned.resize, card.resize, card.image_size) == (resize, resize, SIZE)


@pytest.mark.parametrize(("method", "role"), [("mimic", "teacher"), ("badencoder", "clean_encoder")])
def test_encoders_that_methods_make_resize_as_their_parents_do(method: str, role: str, tmp_path: Path) -> None:
    options = options_of(method, tmp_path)
    size = 32 if method == "mimic" else SIZE
    model = build_simclr("small_cifar", "cifar10", size, resize=48)
    save_artifact(options[role], model, ModelCard("simclr", "small_cifar", "cifar10", size, feature_dim=256))
    assert main(["run", str(make_experiment(tmp_path, method, options))]) == 0
    made, card = load_artifact(tmp_path / "run" / "model")
    assert (made.resize, card.resize, card.image_size) == (48, 48, size)


@pytest.mark.parametrize("space", ["normalized", "pixels"])
def test_ibaus_perturbation_keeps_the_images_size(space: str, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    model = build_classifier("timm:vit_tiny_patch16_224", CLASSES, "half", SIZE, resize=32)
    save_artifact(tmp_path / "m", model, ModelCard("classifier", model.arch, "half", SIZE, num_classes=CLASSES))
    options = {
        "model": str(tmp_path / "m"),
        "data": {"path": data, "max_samples": 8},
        "test": {"path": data},
        "rounds": 1,
        "batch_size": 4,
        "min_patched": 1,
        "space": space,
    }
    assert main(["run", str(make_experiment(tmp_path, "ibau", options))]) == 0
    assert load_artifact(tmp_path / "run" / "model")[1].resize == 32
