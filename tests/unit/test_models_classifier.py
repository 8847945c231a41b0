"""Classifiers have their upstreams' sizes and keys, and images of any reasonable size go through them."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from dist_defend.errors import UserError
from dist_defend.models import encoder
from dist_defend.models.architectures import CLASSIFIERS, ENCODERS, ClassifierArchitecture, EncoderArchitecture
from dist_defend.models.classifier import ARCHITECTURES, build_classifier
from dist_defend.models.resnet import ResNet
from dist_defend.models.resnet_cifar import PaddedShortcut
from dist_defend.models.wide_resnet import WideResNet

PARAMETERS = {  # 10 classes, 32 px
    "resnet18": 11_173_962,
    "resnet34": 21_282_122,
    "resnet50": 23_520_842,
    "resnet18_half": 2724 * 32**2 + 257 * 32 + 10,  # 11,173,962 at 64: convolutions, norms and head by hand
    "resnet18_quarter": 2724 * 16**2 + 257 * 16 + 10,
    "preact_resnet18": 11_171_146,
    "resnet20_cifar": 269_722,
    "resnet32_cifar": 464_154,
    "resnet44_cifar": 658_586,
    "resnet56_cifar": 853_018,
    "resnet110_cifar": 1_727_962,
    "vgg11_bn": 9_231_114,
    "vgg13_bn": 9_416_010,
    "vgg16_bn": 14_728_266,
    "vgg19_bn": 20_040_522,
    "vgg11": 9_225_610,  # two per channel of a norm fewer
    "vgg13": 9_410_122,
    "vgg16": 14_719_818,
    "vgg19": 20_029_514,
    "ibau_vgg": 308_394,
    "mobilenet_v2": 2_296_922,
    "wrn_16_1": 175_066,
    "wrn_16_2": 691_674,
    "wrn_40_1": 563_930,
    "wrn_40_2": 2_243_546,
}
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def norm_channels(model: nn.Module) -> int:
    return sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def modules_with_keys(model: nn.Module) -> list[str]:
    """Names of the modules that own tensors, in the state dict's order."""
    return list(dict.fromkeys(key.rpartition(".")[0] for key in model.state_dict()))


@pytest.mark.parametrize("arch", PARAMETERS)
def test_published_number_of_parameters(arch: str) -> None:
    with torch.device("meta"):
        assert num_parameters(build_classifier(arch, 10, "none")) == PARAMETERS[arch]


def test_more_classes_widen_the_last_layer_alone() -> None:
    assert num_parameters(build_classifier("ibau_vgg", 43)) == 376_011
    assert num_parameters(build_classifier("wrn_16_1", 43)) == 177_211
    assert num_parameters(build_classifier("wrn_16_2", 43)) == 695_931


def test_resnet18_has_rnps_layout() -> None:
    net = build_classifier("resnet18", 10).net
    expected = ["conv1", "bn1"]
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            shortcut = ["shortcut.0", "shortcut.1"] if layer > 1 and block == 0 else []
            expected += [f"layer{layer}.{block}.{name}" for name in ("conv1", "bn1", "conv2", "bn2", *shortcut)]
    assert modules_with_keys(net) == [*expected, "linear"]
    assert norm_channels(net) == 4800


def test_preact_resnet18_has_backdoorbenchs_layout() -> None:
    net = build_classifier("preact_resnet18", 10).net
    assert modules_with_keys(net)[:6] == [
        "conv1",
        *(f"layer1.0.{x}" for x in ("bn1", "conv1", "bn2", "conv2")),
        "layer1.1.bn1",
    ]
    assert [key for key in net.state_dict() if "shortcut" in key] == [
        f"layer{n}.0.shortcut.0.weight" for n in (2, 3, 4)
    ]
    assert list(net.state_dict())[-2:] == ["linear.weight", "linear.bias"]
    channels = {name: norm_channels(layer) for name, layer in net.named_children() if name.startswith("layer")}
    assert channels == {"layer1": 256, "layer2": 448, "layer3": 896, "layer4": 1792}
    assert norm_channels(net) == 3392


def test_ibau_vgg_has_its_layout() -> None:
    net = build_classifier("ibau_vgg", 10).net
    expected = []
    for conv, norm in ((0, 1), (3, 4), (8, 9), (11, 12), (16, 17), (19, 20)):
        expected += [f"features.{conv}.weight", f"features.{conv}.bias", *(f"features.{norm}.{key}" for key in NORM)]
    assert list(net.state_dict()) == [*expected, "classifier.weight", "classifier.bias"]
    assert len(list(net.parameters())) == 26
    kinds = {place: type(module).__name__ for place, module in net.get_submodule("features").named_children()}
    assert [place for place, kind in kinds.items() if kind == "Dropout"] == ["7", "15", "23"]
    assert [net.get_submodule(f"features.{place}").p for place in ("7", "15", "23")] == [0.3, 0.4, 0.4]
    assert [place for place, kind in kinds.items() if kind == "ELU"] == ["2", "5", "10", "13", "18", "21"]


@pytest.mark.parametrize(
    ("arch", "convolutions"), [("wrn_16_1", 15), ("wrn_16_2", 16), ("wrn_40_1", 39), ("wrn_40_2", 40)]
)
def test_wide_resnets_have_the_zero_shot_layout(arch: str, convolutions: int) -> None:
    net = build_classifier(arch, 10).net
    assert sum("conv" in key for key in net.state_dict()) == convolutions
    block = [f"block3.layer.0.{name}" for name in ("bn1", "conv1", "bn2", "conv2", "convShortcut")]
    names = modules_with_keys(net)
    assert names[0] == "conv1" and names[-2:] == ["bn1", "fc"]
    assert names[names.index(block[0]) :][:5] == block
    assert isinstance(net, WideResNet)
    maps, logits = net.layers(torch.rand(2, 3, 32, 32))
    assert [m.shape[2] for m in maps] == [32, 16, 8] and logits.shape == (2, 10)


def test_vgg19_and_mobilenet_have_rnps_layout() -> None:
    vgg = build_classifier("vgg19_bn", 10).net
    assert list(vgg.state_dict())[:3] == ["features.0.weight", "features.0.bias", "features.1.weight"]
    assert list(vgg.state_dict())[-2:] == ["classifier.weight", "classifier.bias"] and norm_channels(vgg) == 5504
    mobile = build_classifier("mobilenet_v2", 10).net
    first = ["layers.0.conv1", "layers.0.bn1", "layers.0.conv2", "layers.0.bn2", "layers.0.conv3", "layers.0.bn3"]
    names = modules_with_keys(mobile)
    assert names[:10] == ["conv1", "bn1", *first, "layers.0.shortcut.0", "layers.0.shortcut.1"]
    assert names[-3:] == ["conv2", "bn2", "linear"]


def test_resnet20_has_akamasters_layout() -> None:
    net = build_classifier("resnet20_cifar", 10).net
    names = ["conv1", "bn1", "conv2", "bn2"]
    blocks = [f"layer{layer}.{block}.{name}" for layer in (1, 2, 3) for block in (0, 1, 2) for name in names]
    assert modules_with_keys(net) == ["conv1", "bn1", *blocks, "linear"]
    assert norm_channels(net) == 688


def test_a_shortcut_without_parameters_takes_every_second_pixel_and_pads_channels() -> None:
    shortcut = PaddedShortcut(added_channels=2, stride=2)
    found = shortcut(torch.arange(16.0).view(1, 1, 4, 4))
    assert found.shape == (1, 3, 2, 2) and not list(shortcut.parameters())
    assert found[0].tolist() == [[[0, 0], [0, 0]], [[0, 2], [8, 10]], [[0, 0], [0, 0]]]


@pytest.mark.parametrize(
    ("arch", "layers"),
    [
        ("vgg11_bn", "CBRM CBRM CBRCBRM CBRCBRM CBRCBRM A"),
        ("vgg16_bn", "CBRCBRM CBRCBRM CBRCBRCBRM CBRCBRCBRM CBRCBRCBRM A"),
        ("vgg13", "CRCRM CRCRM CRCRM CRCRM CRCRM A"),
    ],
)
def test_vgg_has_pytorch_cifars_layout(arch: str, layers: str) -> None:
    net = build_classifier(arch, 10).net
    kinds = {"Conv2d": "C", "BatchNorm2d": "B", "ReLU": "R", "MaxPool2d": "M", "AdaptiveAvgPool2d": "A"}
    features = list(net.get_submodule("features").children())
    assert "".join(kinds[type(module).__name__] for module in features) == layers.replace(" ", "")
    widths = [module.out_channels for module in features if isinstance(module, nn.Conv2d)]
    assert sorted(set(widths)) == [64, 128, 256, 512] and widths == sorted(widths)
    assert list(net.state_dict())[-2:] == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_torchvisions_networks_with_auxiliary_heads_give_logits_in_train_mode(name: str) -> None:
    model = build_classifier(f"torchvision:{name}", 7, "none", image_size=96).train()
    assert not any("aux" in key.lower() for key in model.state_dict())
    logits = model(torch.rand(2, 3, 96, 96))
    assert isinstance(logits, torch.Tensor) and logits.shape == (2, 7)


@pytest.mark.parametrize(
    ("heading", "architectures"), [("Encoders", encoder.ARCHITECTURES), ("Classifiers", ARCHITECTURES)]
)
def test_the_page_lists_every_architecture(heading: str, architectures: tuple[str, ...]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    section = page.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall("`([^`]+)`", row)]
    assert sorted(names) == sorted(architectures)


def test_the_table_says_where_each_networks_keys_are_from() -> None:
    assert set(CLASSIFIERS) | {"timm:NAME", "torchvision:NAME"} == set(ARCHITECTURES)
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    every: dict[str, ClassifierArchitecture | EncoderArchitecture] = {**CLASSIFIERS, **ENCODERS}
    for name, made_here in every.items():
        assert made_here.keys and made_here.image_size == 32, name
        repositories = re.findall(r"[\w-]+/[\w-]+", made_here.source)
        assert all(repository in page for repository in repositories), name


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if ":" not in arch] + ["timm:resnet10t"])
def test_images_become_logits_and_are_not_changed(arch: str) -> None:
    torch.manual_seed(0)
    model = build_classifier(arch, 7, "none", image_size=32).eval()
    images = torch.rand(2, 3, 32, 32)
    before = images.clone()
    with torch.no_grad():
        logits = model(images)
    assert logits.shape == (2, 7) and logits.isfinite().all()
    assert images.equal(before)
    assert not logits[0].allclose(logits[1])


@pytest.mark.parametrize(
    "arch", ["resnet18", "preact_resnet18", "small_resnet", "ibau_vgg", "wrn_16_1", "mobilenet_v2", "resnet20_cifar"]
)
def test_fashion_mnists_28_pixels_are_enough(arch: str) -> None:
    assert build_classifier(arch, 10, image_size=28).eval()(torch.rand(1, 3, 28, 28)).shape == (1, 10)


def test_normalisation_comes_first_and_adds_no_key() -> None:
    model = build_classifier("small_resnet", 10, "cifar10_backdoorbench").eval()
    assert all(key.startswith("net.") for key in model.state_dict())
    images = torch.rand(2, 3, 32, 32)
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
    std = torch.tensor([0.247, 0.243, 0.261]).view(1, 3, 1, 1)
    torch.testing.assert_close(model(images), model.net((images - mean) / std))


@pytest.mark.parametrize("arch", ["ibau_vgg", "small_resnet", "preact_resnet18"])
def test_second_derivatives_exist(arch: str) -> None:
    model = build_classifier(arch, 4, "none", image_size=16).double().eval()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(images).logsumexp(1).sum(), images, create_graph=True)
    (second,) = torch.autograd.grad((gradient * torch.ones_like(gradient)).sum(), images)
    assert second.isfinite().all() and second.abs().max() > 0


def test_small_resnet_has_a_block_per_stage() -> None:
    net = build_classifier("small_resnet", 10).net
    assert isinstance(net, ResNet)
    assert [len(stage) for stage in (net.layer1, net.layer2, net.layer3, net.layer4)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("arch", "size", "told"),
    [
        ("resnet81", 32, "unknown arch 'resnet81': did you mean 'resnet18'"),
        ("timm:resnet1o1", 32, "timm has no model 'resnet1o1': did you mean"),
        ("vgg19_bn", 28, "images of 28 px are too small for this VGG: prepare them at 32 px or more"),
        ("ibau_vgg", 7, "images of 7 px are too small"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(arch: str, size: int, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        build_classifier(arch, 10, image_size=size)
    assert "\n" not in str(error.value)


def test_an_unknown_normalization_is_told() -> None:
    with pytest.raises(UserError, match="unknown normalization 'cifar11'"):
        build_classifier("ibau_vgg", 10, "cifar11")
