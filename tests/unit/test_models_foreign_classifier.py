"""Others' classifiers: each published layout is recognised, every tensor is matched by name, and nothing by chance."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor

from dist_defend.cli import main
from dist_defend.errors import UserError
from dist_defend.models.artifact import load_classifier
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.models.foreign_classifier import holds_classifier, import_classifier
from dist_defend.models.foreign_file import read_checkpoint

State = dict[str, Tensor]


def state_of(arch: str, num_classes: int = 10) -> State:
    torch.manual_seed(0)
    return build_classifier(arch, num_classes).net.state_dict()


def same(model: Classifier, expected: State) -> bool:
    found = model.net.state_dict()
    return list(found) == list(expected) and all(found[key].equal(value) for key, value in expected.items())


@pytest.mark.parametrize(("num_classes", "num_parameters"), [(10, 308_394), (43, 376_011)])
def test_ibau_checkpoints(tmp_path: Path, num_classes: int, num_parameters: int) -> None:
    state = state_of("ibau_vgg", num_classes)
    torch.save({"net": state, "acc": 84.46, "epoch": 48}, tmp_path / "badnets_8_02_ckpt.pth")
    model, report = import_classifier(tmp_path / "badnets_8_02_ckpt.pth")
    assert same(model, state)
    assert (report.layout, report.arch, report.num_classes) == ("I-BAU, in 'net'", "ibau_vgg", num_classes)
    assert (report.normalization, report.image_size, report.num_parameters) == ("none", 32, num_parameters)
    assert report.facts == {"acc": 84.46, "epoch": 48} and not report.renamed and not report.filled


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2"])
def test_rnp_checkpoints(tmp_path: Path, arch: str) -> None:
    state = OrderedDict((f"module.{key}", value) for key, value in state_of(arch).items())
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    scores = {"clean_acc": torch.tensor(0.5), "bad_acc": 1.0}
    torch.save({"epoch": 80, "state_dict": state, **scores, "optimizer": optimizer}, tmp_path / "model.tar")
    model, report = import_classifier(tmp_path / "model.tar")
    assert same(model, {key.removeprefix("module."): value for key, value in state.items()})
    assert (report.layout, report.arch) == ("RNP, in 'state_dict', prefix 'module.'", arch)
    assert (report.normalization, report.image_size) == ("cifar10", 32)
    assert report.facts == {"epoch": 80, "clean_acc": 0.5, "bad_acc": 1.0}


@pytest.mark.parametrize("arch", ["preact_resnet18", "small_resnet", "wrn_16_1", "wrn_40_2"])
def test_bare_state_dicts_are_told_apart_by_names_and_shapes(tmp_path: Path, arch: str) -> None:
    state = state_of(arch, 7)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    model, report = import_classifier(tmp_path / "model.safetensors")
    assert same(model, state) and (report.arch, report.num_classes) == (arch, 7)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_torchvision_classifiers_compute_what_torchvision_does(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    published = torchvision.models.get_model(name, num_classes=5).eval()
    torch.save(published.state_dict(), tmp_path / "model.pth")
    model, report = import_classifier(tmp_path / "model.pth")
    assert (report.arch, report.normalization, report.image_size) == (f"torchvision:{name}", "imagenet", 224)
    images = torch.rand(2, 3, 64, 64)
    expected = published(
        torchvision.transforms.functional.normalize(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    torch.testing.assert_close(model.eval()(images), expected)


def test_timm_classifiers_come_in_by_name(tmp_path: Path) -> None:
    import timm

    published = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7).eval()
    torch.save({"state_dict": published.state_dict()}, tmp_path / "vit.pth")
    model, report = import_classifier(tmp_path / "vit.pth", "timm:vit_tiny_patch16_224", "none", image_size=32)
    assert report.num_classes == 7
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(images), published(images))


def test_counters_that_old_files_lack_start_at_zero(tmp_path: Path) -> None:
    state = {key: value for key, value in state_of("resnet18").items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    model, report = import_classifier(tmp_path / "old.pth")
    assert report.arch == "resnet18" and len(report.filled) == 20 and model.net.get_buffer(report.filled[0]) == 0
    assert all(model.net.state_dict()[key].equal(value) for key, value in state.items())


def test_which_checkpoints_are_classifiers(tmp_path: Path) -> None:
    resnet = torchvision.models.resnet18().state_dict()
    linear = {"conv1.weight": torch.ones(1, 1, 1, 1), "linear.weight": torch.ones(2, 3)}
    for content, expected in (
        ({"net": linear, "acc": 1.0, "epoch": 1}, True),
        (resnet, True),
        ({"state_dict": linear}, True),
        ({"state_dict": resnet, "epoch": 3}, True),
        ({"state_dict": resnet}, False),  # BadEncoder's ImageNet encoder
        ({"state_dict": {f"module.{key}": value for key, value in resnet.items()}}, False),
        ({f"visual.{key}": value for key, value in resnet.items()}, False),
        ({"f.f.0.weight": torch.ones(1), "g.0.weight": torch.ones(2, 3)}, False),
        ({"conv1.weight": torch.ones(1, 1, 1, 1)}, False),
        ([1], False),
        ({1: torch.ones(2, 3)}, False),
    ):
        torch.save(content, tmp_path / "model.pth")
        assert holds_classifier(read_checkpoint(tmp_path / "model.pth")) is expected


def renamed(state: State) -> State:
    """Under names that say nothing of the network's."""
    return {f"tensor{number:03}.{key.split('.')[-1]}": value for number, (key, value) in enumerate(state.items())}


def test_other_names_are_matched_by_order_only_on_demand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = state_of("small_resnet")
    source, out = tmp_path / "model.pth", tmp_path / "model"
    torch.save(renamed(state), source)
    command = ["import", str(source), "--out", str(out), "--arch", "small_resnet"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "missing (conv1.weight, " in error and "match them by order with --by-position" in error
    assert not out.exists()
    assert main([*command, "--by-position"]) == 0
    told = capsys.readouterr().out
    assert f"{len(state)} matched by order:" in told
    for theirs, ours in zip(renamed(state), state, strict=True):
        assert f"  {theirs} -> {ours}\n" in told
    assert same(load_classifier(out)[0], state)
    assert import_classifier(source, by_position=True)[1].arch == "small_resnet"


def test_a_different_order_of_shapes_is_refused(tmp_path: Path) -> None:
    state = renamed(state_of("small_resnet"))
    first, second, *others = state
    torch.save({key: state[key] for key in (second, first, *others)}, tmp_path / "turned.pth")
    assert "does not fit by order: tensor001.weight and conv1.weight" in refused(
        tmp_path / "turned.pth", by_position=True
    )
    assert "--by-position" not in refused(tmp_path / "turned.pth", arch="small_resnet")
    torch.save({key: state[key] for key in list(state)[1:]}, tmp_path / "short.pth")
    told = refused(tmp_path / "short.pth", by_position=True, arch="small_resnet")
    assert f"has {len(state) - 1} tensors and the network {len(state)}" in told


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        import_classifier(path, **options)
    told = str(error.value)
    assert told.startswith(str(path)) and "\n" not in told and told.isprintable()
    return told


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    state = state_of("ibau_vgg")
    fine: dict[str, Any] = {"net": state, "acc": 84.46, "epoch": 48}
    less = {key: value for key, value in state.items() if key != "features.1.bias"}
    whole_numbers = {**state, "features.0.weight": state["features.0.weight"].long()}
    for content, told in (
        ({**fine, "net": less}, "1 missing (features.1.bias)"),
        ({**fine, "net": {**state, "extra": torch.ones(1)}}, "1 unexpected (extra)"),
        ({**fine, "net": {**state, "features.0.bias": torch.ones(31)}}, "1 misshapen (features.0.bias (31,) instead"),
        ({**fine, "net": whole_numbers}, "features.0.weight is of type torch.int64, not torch.float32"),
        ({**fine, "epoch": "48"}, "epoch is a str"),
        ({**fine, "acc": [1.0]}, "acc is a list"),
        ({**fine, "net": [1]}, "holds no state dict of named tensors"),
        ({**fine, "net": {**state, "a\nb": torch.ones(1)}}, "a tensor with no proper name ('a\\nb')"),
        ({**fine, "net": {"features.0.weight": torch.ones(1, 1, 3, 3)}}, "has a layout that is not known (in 'net', "),
        ({"model_name": "x", "num_classes": 3, "model": state}, "says num_classes 3, but its last layer has 10"),
        ({"model_name": "x", "num_classes": True, "model": state}, "num_classes is a bool"),
        ({"model_name": ["x"], "num_classes": 10, "model": state}, "model_name is a list"),
    ):
        torch.save(content, path)
        assert told in refused(path)
    torch.save({"model_name": "preactresnet18", "num_classes": 3, "model": state_of("preact_resnet18", 3)}, path)
    assert "no constants are known for 3 classes: give --normalization" in refused(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    state = state_of("ibau_vgg")
    state["classifier.bias"][0] = value
    state["features.0.weight"][0] = value
    torch.save({"net": state, "acc": float("nan"), "epoch": 1}, tmp_path / "model.pth")
    assert main(["import", str(tmp_path / "model.pth"), "--out", str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert "2 tensors hold NaN or infinite values (features.0.weight, classifier.bias)" in error
    assert not (tmp_path / "model").exists()


def test_figures_that_are_no_numbers_come_to_the_card_as_text(tmp_path: Path) -> None:
    torch.save({"net": state_of("ibau_vgg"), "acc": float("nan"), "epoch": 1}, tmp_path / "model.pth")
    assert main(["import", str(tmp_path / "model.pth"), "--out", str(tmp_path / "model")]) == 0
    assert load_classifier(tmp_path / "model")[1].provenance["acc"] == "nan"


def test_the_command_says_what_it_found_and_an_encoder_can_be_had_instead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"net": state_of("ibau_vgg", 43), "acc": 97.68, "epoch": 35}, tmp_path / "gtsrb.pth")
    assert main(["import", str(tmp_path / "gtsrb.pth"), "--out", str(tmp_path / "model"), "--backdoored"]) == 0
    told = capsys.readouterr().out
    assert "I-BAU, in 'net'; ibau_vgg, 43 classes" in told and "376011 parameters, matched by name" in told
    assert "it says: epoch 35, acc 97.68" in told and "marked BACKDOORED" in told
    _, card = load_classifier(tmp_path / "model")
    assert (card.kind, card.arch, card.num_classes, card.backdoored) == ("classifier", "ibau_vgg", 43, True)
    assert card.provenance["layout"] == "I-BAU, in 'net'" and card.provenance["epoch"] == 35
    torch.save(torchvision.models.resnet18(num_classes=5).state_dict(), tmp_path / "resnet.pth")
    command = ["import", str(tmp_path / "resnet.pth"), "--out", str(tmp_path / "encoder"), "--kind", "encoder"]
    assert main(command) == 0
    assert "left out: fc (fc.bias, fc.weight)" in capsys.readouterr().out
