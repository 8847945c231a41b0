"""The network inside of others' checkpoints: any wrapper, any prefix, what stands beside it, and what does not fit."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from dist_defend.errors import UserError
from dist_defend.models.classifier import build_classifier
from dist_defend.models.encoder import build_encoder
from dist_defend.models.foreign import import_encoder
from dist_defend.models.foreign_classifier import holds_classifier, import_classifier
from dist_defend.models.foreign_file import Unordered
from dist_defend.models.foreign_folder import read_weights
from dist_defend.models.mappings import Choice

State = dict[str, Tensor]


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def linear(prefix: str, features: int, width: int) -> State:
    return prefixed(prefix, nn.Linear(features, width).state_dict())


def small_resnet(seed: int = 0, num_classes: int = 10) -> State:
    torch.manual_seed(seed)
    return build_classifier("small_resnet", num_classes).net.state_dict()


def saved(tmp_path: Path, content: Any, name: str = "model.pth") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def values_are(found: State, expected: State) -> bool:
    """Whether the same values are there, in the order of the network, whatever their names."""
    return len(found) == len(expected) and all(
        a.equal(b) for a, b in zip(found.values(), expected.values(), strict=True)
    )


@pytest.fixture(scope="module")
def resnet18() -> State:
    """torchvision's, without its last layer."""
    torch.manual_seed(0)
    return {k: v for k, v in torchvision.models.resnet18().state_dict().items() if not k.startswith("fc.")}


@pytest.fixture(scope="module")
def cifar18(resnet18: State) -> State:
    return {**resnet18, "conv1.weight": torch.randn(64, 3, 3, 3)}


@pytest.fixture(scope="module")
def small_cifar() -> State:
    """Our small encoder under torchvision's names."""
    torch.manual_seed(0)
    names = {"0": "conv1", "1": "bn1", **{str(stage + 2): f"layer{stage}" for stage in range(1, 5)}}
    state = build_encoder("small_cifar").state_dict()
    pairs = ((key.removeprefix("f.").partition("."), value) for key, value in state.items())
    return {f"{names[top]}.{rest}": value for (top, _, rest), value in pairs}


def numbered(state: State, first: int) -> State:
    """As nn.Sequential of a ResNet's children names them, its first stage being child ``first``."""
    names = {"conv1": "0", "bn1": "1", **{f"layer{stage}": str(first + stage - 1) for stage in range(1, 5)}}
    return {f"{names[key.split('.')[0]]}.{key.partition('.')[2]}": value for key, value in state.items()}


WRAPPERS = ["", "netC", "model_state_dict", "model", "net", "student", "state.network.weights"]
PREFIXES = ["", "module.", "_orig_mod.", "model.", "1.", "module._orig_mod.", "_orig_mod.module.backbone.0.", "a.b.c."]


def test_a_classifier_is_found_under_every_key_and_prefix(tmp_path: Path) -> None:
    state = small_resnet()
    for number in range(max(len(WRAPPERS), len(PREFIXES))):
        wrapper, prefix = WRAPPERS[number % len(WRAPPERS)], PREFIXES[number % len(PREFIXES)]
        content: Any = prefixed(prefix, state)
        for key in reversed(wrapper.split(".") if wrapper else []):
            content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}
        model, report = import_classifier(saved(tmp_path, content))
        assert report.arch == "small_resnet" and values_are(model.net.state_dict(), state), (wrapper, prefix)
        places = [f"in '{key}'" for key in wrapper.split(".") if key] + ([f"prefix '{prefix}'"] if prefix else [])
        assert report.layout == ", ".join(["state dict", *places])
        assert report.facts == ({"epoch": 3} if wrapper else {})


def test_wrappers_inside_of_names_are_taken_off(tmp_path: Path) -> None:
    state = small_resnet()
    inside = {
        key.replace("layer2.0.", "layer2.0._orig_mod.").replace("layer3.", "_fsdp_wrapped_module.layer3."): value
        for key, value in state.items()
    }
    assert values_are(import_classifier(saved(tmp_path, inside))[0].net.state_dict(), state)


def test_torchvisions_names_on_a_small_stem_are_the_cifar_networks(tmp_path: Path, cifar18: State) -> None:
    state = {**cifar18, "fc.weight": torch.randn(7, 512), "fc.bias": torch.randn(7)}
    model, report = import_classifier(saved(tmp_path, {"state_dict": prefixed("model.", state), "epoch": 1}))
    assert (report.arch, report.num_classes) == ("resnet18", 7)
    published = torchvision.models.resnet18(num_classes=7)
    published.conv1, published.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    published.load_state_dict(state)
    images = torch.rand(2, 3, 32, 32)
    expected = published.eval()(model.normalize(images))
    torch.testing.assert_close(model.eval()(images), expected)


ENCODERS: dict[str, Callable[[State, int], Any]] = {  # as each project saves a ResNet with torchvision's names
    "solo-learn": lambda s, d: {
        "epoch": 9,
        "state_dict": {
            **prefixed("backbone.", s), **linear("projector.0.", d, 64), **linear("classifier.", d, 10),
            **prefixed("momentum_backbone.", {k: v + 1 for k, v in s.items()}), 
            **linear("momentum_projector.0.", d, 64),
        },
    },
    "MoCo v1 and v2": lambda s, d: {
        "arch": "resnet18",
        "state_dict": {
            **prefixed("module.encoder_q.", s), **linear("module.encoder_q.fc.0.", d, d),
            **linear("module.encoder_q.fc.2.", d, 128),
            **prefixed("module.encoder_k.", {k: v + 1 for k, v in s.items()}),
            "module.queue": torch.rand(128, 64), "module.queue_ptr": torch.zeros(1, dtype=torch.long),
        },
    },
    "MoCo v1 with one linear layer": lambda s, d: {
        "state_dict": {
            **prefixed("module.encoder_q.", s), **linear("module.encoder_q.fc.", d, 128),
            **prefixed("module.encoder_k.", {k: v + 1 for k, v in s.items()}),
            **linear("module.encoder_k.fc.", d, 128), "module.queue": torch.rand(128, 64),
        },
    },
    "MoCo v3": lambda s, d: {
        "state_dict": {
            **prefixed("module.base_encoder.", s), **linear("module.base_encoder.fc.0.", d, 64),
            **prefixed("module.momentum_encoder.", {k: v + 1 for k, v in s.items()}),
            **linear("module.predictor.0.", 64, 64),
        },
    },
    "BYOL": lambda s, d: {
        **prefixed("net.", s), **prefixed("online_encoder.net.", s), **linear("online_encoder.projector.0.", d, 64),
        **prefixed("target_encoder.net.", {k: v + 1 for k, v in s.items()}), **linear("online_predictor.0.", 64, 64),
    },
    "SimSiam": lambda s, d: {
        "state_dict": {
            **prefixed("module.encoder.", s), **linear("module.encoder.fc.0.", d, d),
            **linear("module.predictor.0.", d, 64),
        },
    },
    "SwAV": lambda s, d: {
        **prefixed("module.", s), **linear("module.projection_head.0.", d, 64),
        "module.prototypes.weight": torch.rand(30, 64),
    },
    "Barlow Twins": lambda s, d: {
        "epoch": 1, "model": {
            **prefixed("module.backbone.", s), "module.projector.0.weight": torch.rand(64, d), "module.bn.running_mean":
            torch.rand(64), "module.bn.running_var": torch.rand(64), "module.bn.num_batches_tracked": torch.tensor(1),
        },
    },
    "VICReg's backbone": lambda s, d: s,
    "lightly": lambda s, d: {
        "state_dict": {
            **prefixed("backbone.", numbered(s, 4)), **linear("projection_head.layers.0.", d, 64),
            **prefixed("backbone_momentum.", numbered({k: v + 1 for k, v in s.items()}, 4)),
        },
        "pytorch-lightning_version": "2.1.0", "loops": {"fit_loop": {"state_dict": {}}}, "callbacks": {},
    },
    "numbered without the pool": lambda s, d: numbered(s, 3),
    "numbered stages alone": lambda s, d: prefixed("backbone.", numbered(s, 2)),
    "other names of the shortcut": lambda s, d: {
        "model": {**prefixed("encoder.", {k.replace("downsample", "shortcut"): v for k, v in s.items()}),
                  **linear("head.0.", d, 128)},
    },
    "a profiler beside": lambda s, d: {**s, "total_ops": torch.zeros(1), "layer1.total_params": torch.zeros(1),
                                    "layer1.0.conv1.total_ops": torch.zeros(1),
                                       "layer1.0.conv1.weight_mask": torch.ones(1)},
    "timm's checkpoint": lambda s, d: {
        "epoch": 2, "arch": "resnet18", "state_dict": {**s, **linear("projector.", d, 8)},
        "state_dict_ema": {k: v + 1 for k, v in s.items()}, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
        "metric": 71.5, "version": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "is_small"),
    [
        *((name, True) for name in ENCODERS),
        ("MoCo v1 and v2", False),
        ("lightly", False),
        ("numbered stages alone", False),
    ],
)
def test_the_backbones_of_self_supervised_projects(
    tmp_path: Path, name: str, is_small: bool, resnet18: State, small_cifar: State
) -> None:
    """Without a hint: the network that is trained, not its momentum copy (all values + 1)."""
    state = small_cifar if is_small else resnet18
    features = 256 if is_small else 512
    source = saved(tmp_path, ENCODERS[name](state, features))
    assert not holds_classifier(read_weights(source)[0], source)
    model, report = import_encoder(source)
    assert report.arch == ("small_cifar" if is_small else "timm:resnet18") and not report.has_projector
    assert values_are(model.state_dict(), state)
    assert report.guessed == ("normalization", "image_size")
    has_copy = name in ("solo-learn", "MoCo v1 and v2", "MoCo v1 with one linear layer", "MoCo v3", "BYOL", "lightly")
    assert bool(report.others) is (has_copy or name == "timm's checkpoint")
    if name == "timm's checkpoint":
        assert report.facts == {"arch": "resnet18", "epoch": 2, "metric": 71.5, "version": 2}


def test_a_projector_of_another_width_is_left_out_and_ours_comes_along(tmp_path: Path, small_cifar: State) -> None:
    f = prefixed("f.", numbered(small_cifar, 3))
    g = nn.Sequential(nn.Linear(256, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 128)).state_dict()
    model, report = import_encoder(saved(tmp_path, {**f, **prefixed("g.", g)}))
    assert (report.layout, report.arch, report.has_projector, report.dropped) == ("SimCLR", "small_cifar", True, ())
    assert values_are(model.g.state_dict(), g) and values_are(model.f.state_dict(), small_cifar)
    wide = prefixed("g.", nn.Sequential(nn.Linear(256, 64)).state_dict())
    report = import_encoder(saved(tmp_path, {**f, **wide}))[1]
    assert not report.has_projector and report.dropped == ("g.0.bias", "g.0.weight")


@pytest.mark.parametrize("name", ["DINO", "MAE", "MoCo v3"])
def test_vits_of_self_supervised_projects(tmp_path: Path, name: str) -> None:
    import timm

    torch.manual_seed(0)
    state = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0).state_dict()
    other = {key: value + 1 for key, value in state.items()}
    content: Any = {
        "DINO": {"student": prefixed("module.backbone.", other), "teacher": prefixed("backbone.", state), "epoch": 100},
        "MAE": {"model": {**state, "mask_token": torch.zeros(1, 1, 192), "decoder_pos_embed": torch.rand(1, 17, 8),
                          **linear("decoder_embed.", 192, 8), **linear("decoder_blocks.0.attn.qkv.", 8, 24)}},
        "MoCo v3": {"state_dict": {**prefixed("module.base_encoder.", state),
                                   **linear("module.base_encoder.head.0.", 192, 8),
                                   **prefixed("module.momentum_encoder.", other)}},
    }[name]  # fmt: skip
    model, report = import_encoder(saved(tmp_path, content))
    assert (report.arch, report.image_size, report.normalization) == ("timm:vit_tiny_patch16_224", 64, "imagenet")
    assert report.guessed == ("normalization",)  # the position embeddings say the size
    assert values_are(model.f.get_submodule("f").state_dict(), state)
    if name == "DINO":
        assert report.others == ("in 'student', prefix 'module.backbone.'",)
        chosen = import_encoder(tmp_path / "model.pth", choice=Choice(key="student"))[0]
        assert values_are(chosen.f.get_submodule("f").state_dict(), other)


def test_mocos_small_vit_which_has_other_heads_is_refused(tmp_path: Path) -> None:
    import timm

    state = timm.create_model("vit_small_patch16_224", img_size=32, num_classes=0).state_dict()
    path = saved(tmp_path, {"state_dict": prefixed("module.base_encoder.", state)})
    for arch in (None, "timm:vit_small_patch16_224"):
        assert "12 heads" in refused(path, import_encoder, arch=arch)
    assert import_encoder(saved(tmp_path, {"teacher": prefixed("backbone.", state)}))[1].arch.endswith(
        "vit_small_patch16_224"
    )


def test_a_backbone_with_a_linear_probe_comes_in_as_a_classifier_too(tmp_path: Path, cifar18: State) -> None:
    head = linear("classifier.", 512, 5)
    content = {"state_dict": {**prefixed("backbone.", cifar18), **head, **linear("projector.0.", 512, 64)}}
    model, report = import_classifier(saved(tmp_path, content))
    assert (report.arch, report.num_classes) == ("resnet18", 5)
    assert model.get_parameter("net.linear.weight").equal(head["classifier.weight"])
    assert report.dropped == ("projector.0.bias", "projector.0.weight")


def refused(path: Path, make: Callable[..., Any] = import_classifier, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        make(path, **options)
    told = str(error.value)
    assert str(path) in told and "\n" not in told and told.isprintable()
    return told


def test_two_equal_fits_are_an_error_that_lists_them(tmp_path: Path) -> None:
    one, two = small_resnet(1), small_resnet(2)
    path = saved(tmp_path, {"netA": one, "netB": two})
    told = refused(path)
    assert "small_resnet (in 'netA') and small_resnet (in 'netB'); choose one with --key" in told
    assert values_are(import_classifier(path, choice=Choice(key="netB"))[0].net.state_dict(), two)
    path = saved(tmp_path, {"state_dict": {**prefixed("first.", one), **prefixed("second.", two)}})
    assert "choose one with --prefix" in refused(path)
    assert values_are(import_classifier(path, choice=Choice(prefix="first."))[0].net.state_dict(), one)
    for copy in ("netA", "best"):  # the same tensors twice are one network
        assert import_classifier(saved(tmp_path, {"netB": one, copy: dict(one)}))[1].others
    assert "--key nets" in refused(saved(tmp_path, {"netA": one, "netB": two}), choice=Choice(key="nets"))
    assert "choose from netA, netB" in refused(tmp_path / "model.pth", choice=Choice(key="nets"))
    same_name = saved(tmp_path, {"a": {"net": one}, "b": {"net": two}})
    assert "--key net names 2 mappings" in refused(same_name, choice=Choice(key="net"))
    assert values_are(import_classifier(same_name, choice=Choice(key="b.net"))[0].net.state_dict(), two)


@pytest.mark.parametrize(
    "copy", ["state_dict_ema", "model_ema", "ema", "momentum", "target_net", "swa_model", "teacher"]
)
def test_copies_of_a_classifier_are_second_choice(tmp_path: Path, copy: str) -> None:
    one, two = small_resnet(1), small_resnet(2)
    path = saved(tmp_path, {copy: two, "model": one})
    model, report = import_classifier(path)
    assert values_are(model.net.state_dict(), one) and report.others == (f"in '{copy}'",)
    assert values_are(import_classifier(path, choice=Choice(key=copy))[0].net.state_dict(), two)


def test_a_wrong_prefix_a_missing_tensor_and_a_deeper_network_do_not_fit(tmp_path: Path, small_cifar: State) -> None:
    state = small_resnet()
    path = saved(tmp_path, prefixed("net.", state))
    assert "--prefix nets. begins no tensor of" in refused(path, choice=Choice(prefix="nets."))
    assert "layout that is not known" in refused(path, choice=Choice(prefix="net.layer1."))
    less = {key: value for key, value in state.items() if key != "layer3.0.bn1.weight"}
    told = refused(saved(tmp_path, prefixed("net.", less)))
    total = sum(not key.endswith("num_batches_tracked") for key in state)
    assert (
        f"nearest: small_resnet ({total - 1} of {total} tensors agree" in told
        and "1 missing (net.layer3.0.bn1.weight)" in told
    )
    deeper = {**state, "layer4.1.conv1.weight": torch.ones(128, 128, 3, 3)}
    assert "1 unexpected (layer4.1.conv1.weight)" in refused(saved(tmp_path, deeper))
    model, report = import_classifier(tmp_path / "model.pth", choice=Choice(ignore=("layer4.1.*",)))
    assert values_are(model.net.state_dict(), state) and report.dropped == ("layer4.1.conv1.weight",)
    assert "--ignore *_mask matches no tensor" in refused(tmp_path / "model.pth", choice=Choice(ignore=("*_mask",)))
    token = {**small_cifar, "reg_token": torch.ones(1)}  # a parameter beside them that may change what is computed
    assert "1 unexpected (reg_token)" in refused(saved(tmp_path, token), import_encoder)


def test_an_unknown_layout_names_the_nearest_networks(tmp_path: Path) -> None:
    narrow = {key: torch.zeros([max(1, n // 8) if n > 8 else n for n in value.shape]) if value.dim() else value
              for key, value in build_classifier("vgg16_bn", 10).net.state_dict().items()}  # fmt: skip
    narrow["features.0.weight"] = torch.zeros(8, 3, 3, 3)
    told = refused(saved(tmp_path, {"net": narrow}))
    assert "in 'net'" in told and "nearest: vgg16_bn (" in told and "misshapen" in told
    assert "features.0.weight (8, 3, 3, 3) instead of (64, 3, 3, 3)" in told
    for option in ("--arch", "--key", "--prefix", "cannot be imported yet"):
        assert option in told
    told = refused(saved(tmp_path, {"odd.weight": torch.ones(2, 2), "more.bias": torch.ones(2)}))
    assert "nearest" not in told and "keys more.bias, odd.weight" in told


def test_a_network_known_as_a_classifier_alone_is_said(tmp_path: Path) -> None:
    state = torchvision.models.mobilenet_v3_small(num_classes=4).state_dict()
    told = refused(saved(tmp_path, state), import_encoder)
    assert "torchvision:mobilenet_v3_small, which can be had as a classifier only" in told
    with pytest.raises(UserError, match="torchvision:vgg19 is no encoder"):
        import_encoder(tmp_path / "model.pth", "torchvision:vgg19")


def test_the_answer_follows_neither_a_dicts_nor_a_files_order(tmp_path: Path) -> None:
    """A network with two linear layers whose last one's place in the file is by chance."""
    state = torchvision.models.mobilenet_v3_small(num_classes=10).state_dict()
    rng = random.Random(0)
    for _ in range(5):
        keys = rng.sample(sorted(state), len(state))
        report = import_classifier(saved(tmp_path, {key: state[key] for key in keys}))[1]
        assert (report.arch, report.num_classes) == ("torchvision:mobilenet_v3_small", 10)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    told = refused(tmp_path / "model.safetensors", by_position=True)
    assert "safetensors, which keeps no order" in told
    content = read_weights(tmp_path / "model.safetensors")[0]
    for _ in range(5):
        turned = Unordered((key, content[key]) for key in rng.sample(sorted(content), len(content)))
        report = import_classifier(tmp_path / "model.safetensors", content=turned)[1]
        assert (report.arch, report.num_classes) == ("torchvision:mobilenet_v3_small", 10)


def test_an_encoder_is_matched_by_order_on_demand(tmp_path: Path, small_cifar: State) -> None:
    odd = {f"t{number:03}.{key.split('.')[-1]}": value for number, (key, value) in enumerate(small_cifar.items())}
    path = saved(tmp_path, {**odd, "zz.weight": torch.ones(10, 512)})
    assert "layout that is not known" in refused(path, import_encoder)
    model, report = import_encoder(path, "small_cifar", by_position=True)
    assert values_are(model.f.state_dict(), small_cifar) and report.dropped == ("zz.weight",)
    assert len(report.renamed) == len(small_cifar)
