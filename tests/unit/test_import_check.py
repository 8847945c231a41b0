"""Constants of foreign models: known, told or guessed; and ``import --check``, which measures them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from dist_defend.cli import main
from dist_defend.data.sources import ArraySource
from dist_defend.data.store import write_dataset
from dist_defend.import_check import Trial, differ
from dist_defend.models.artifact import load_artifact, load_classifier
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.models.encoder import build_encoder
from dist_defend.models.foreign import import_encoder
from dist_defend.models.foreign_classifier import import_classifier
from dist_defend.models.pixel_space import NORMALIZATIONS


def colours(count: int, size: int) -> np.ndarray:
    """Images of one colour each, with a little noise."""
    rng = np.random.default_rng(0)
    return (rng.integers(0, 236, (count, 1, 1, 3)) + rng.integers(0, 20, (count, size, size, 3))).astype(np.uint8)


def make_data(folder: Path, labels: np.ndarray, num_classes: int, size: int = 32) -> Path:
    source = ArraySource(
        colours(len(labels), size), labels.astype(np.int64), [str(label) for label in range(num_classes)]
    )
    write_dataset(source, folder, name="noise", split="test", storage="npy")
    return folder


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Path]:
    """A file of a network, and data with the labels that it gives the raw pixels, as if trained without constants."""
    torch.manual_seed(0)
    model = build_classifier("wrn_10_1", 10, "none").eval()
    images = torch.from_numpy(colours(300, 32)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        logits = model(images)
        model.net.get_parameter("fc.bias").sub_(logits.mean(0))  # so that all classes occur
        labels = model(images).argmax(1).numpy()
    assert len(np.unique(labels)) > 2
    torch.save({"state_dict": model.net.state_dict(), "epoch": 5}, tmp_path / "x.pth")
    return tmp_path / "x.pth", make_data(tmp_path / "data", labels, 10)


def test_check_says_what_fits_and_takes_none_silently(
    tmp_path: Path, trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, data = trained
    command = ["import", str(source), "--check", str(data), "--out"]
    assert main([*command, str(tmp_path / "guessed")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert "check: 300 of 300 images of " in "\n".join(told)
    first = next(number for number, line in enumerate(told) if line.startswith("  none"))
    assert "300 of 300  100.0 %" in told[first] and told[first - 1].startswith("check: ")  # the table opens with it
    assert any("--normalization none fits best: 100.0 % against" in line and "import again" in line for line in told)
    card = load_classifier(tmp_path / "guessed")[1]
    assert (card.normalization, card.guessed) == ("cifar10", ("normalization", "image_size"))
    assert main([*command, str(tmp_path / "told"), "--normalization", "none"]) == 0
    assert "normalization none fits" in capsys.readouterr().out
    card = load_classifier(tmp_path / "told")[1]
    assert card.guessed == () and card.normalization == "none"
    trials = card.provenance["check"]["trials"]
    assert {trial["normalization"] for trial in trials} == set(NORMALIZATIONS)
    assert trials[0] == {"normalization": "none", "size": 32, "correct": 300, "n": 300}


def test_check_asks_an_encoders_neighbours_and_tries_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    torch.save(build_encoder("small_cifar").get_submodule("f").state_dict(), tmp_path / "x.pth")
    data = make_data(tmp_path / "data", np.arange(60) % 3, 3, size=48)
    assert main(["import", str(tmp_path / "x.pth"), "--check", str(data), "--out", str(tmp_path / "model")]) == 0
    trials = load_artifact(tmp_path / "model")[1].provenance["check"]["trials"]
    assert {trial["size"] for trial in trials} == {32, 48} and {trial["n"] for trial in trials} == {30}
    assert "20-NN accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labels", "num_classes", "told"),
    [([0, 1, 11], 12, "has labels up to 11, the model 10 classes"), ([0, -1, 1], 10, "each with a label")],
)
def test_data_of_another_task_is_refused_before_anything_is_written(
    tmp_path: Path, labels: list[int], num_classes: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(build_classifier("wrn_10_1", 10).net.state_dict(), tmp_path / "x.pth")
    data = make_data(tmp_path / "data", np.array(labels), num_classes)
    assert main(["import", str(tmp_path / "x.pth"), "--check", str(data), "--out", str(tmp_path / "model")]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "model").exists()


def test_a_difference_counts_from_two_standard_errors_on() -> None:
    none = torch.zeros(100, dtype=torch.bool)
    for num_more, expected in ((4, False), (5, True)):  # 4 > 2 sqrt(4) does not hold, 5 > 2 sqrt(5) does
        more = none.clone()
        more[:num_more] = True
        assert differ(Trial("a", 32, more, False), Trial("b", 32, none, True)) is expected


@pytest.mark.parametrize(
    ("arch", "num_classes", "normalization", "size"),
    [
        ("wrn_10_1", 10, "cifar10", 32),
        ("wrn_10_1", 43, "none", 32),
        ("wrn_10_1", 100, "cifar100", 32),
        ("wrn_10_1", 200, "tiny", 64),
        ("wrn_10_1", 7, "none", 32),
        ("torchvision:squeezenet1_0", 1000, "imagenet", 224),
    ],
)
def test_guesses_follow_the_classes_and_are_marked(
    tmp_path: Path, arch: str, num_classes: int, normalization: str, size: int
) -> None:
    state = build_classifier(arch, num_classes).net.state_dict()
    for content in (state, {"net": {f"module.{key}": v for key, v in state.items()}, "acc": 92.1, "epoch": 199}):
        torch.save(content, tmp_path / "x.pth")
        report = import_classifier(tmp_path / "x.pth")[1]
        assert (report.arch, report.normalization, report.image_size) == (arch, normalization, size)
        assert report.guessed == ("normalization", "image_size") and not report.layout.startswith("I-BAU")
    report = import_classifier(tmp_path / "x.pth", normalization="0.5,0.25", image_size=48)[1]
    assert report.guessed == () and (report.normalization, report.image_size) == ("0.5,0.25", 48)


def test_what_is_known_is_not_marked(tmp_path: Path) -> None:
    import timm

    state = build_classifier("ibau_vgg", 10).net.state_dict()
    torch.save({"net": state, "acc": 1.0, "epoch": 1}, tmp_path / "x.pth")
    assert import_classifier(tmp_path / "x.pth")[1].guessed == ()
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64)
    torch.save(vit.state_dict(), tmp_path / "x.pth")
    report = import_encoder(tmp_path / "x.pth", "timm:vit_tiny_patch16_224")[1]
    assert (report.normalization, report.image_size, report.guessed) == ("half", 64, ())  # timm's 0.5; its shapes
    assert import_encoder(tmp_path / "x.pth")[1].guessed == ("normalization",)


def test_a_guess_is_in_the_card(tmp_path: Path) -> None:
    torch.save(build_classifier("wrn_10_1", 43).net.state_dict(), tmp_path / "x.pth")
    assert main(["import", str(tmp_path / "x.pth"), "--out", str(tmp_path / "model")]) == 0
    card = json.loads((tmp_path / "model" / "model.json").read_text())
    assert card["guessed"] == ["normalization", "image_size"] and card["normalization"] == "none"


@pytest.mark.parametrize(("name", "resize"), [("vit_b_16", 224), ("inception_v3", 299)])
def test_backdoorbenchs_networks_behind_a_resize_keep_their_images_size(
    tmp_path: Path, name: str, resize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequential(Resize, network), so every name begins with "1."; one narrow block stands for the large ViT."""
    published = torchvision.models
    if name == "vit_b_16":

        def small(num_classes: int, image_size: int = 224, **options: Any) -> Any:
            narrow = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}
            return published.VisionTransformer(image_size, patch_size=16, num_classes=num_classes, **narrow)

        get = published.get_model
        monkeypatch.setattr(
            published,
            "get_model",
            lambda n, weights=None, **o: small(**o) if n == name else get(n, weights=weights, **o),
        )
        net: nn.Module = small(num_classes=10)
    else:
        net = published.inception_v3(num_classes=10, init_weights=False)  # with AuxLogits
    state = {f"1.{key}": value for key, value in net.state_dict().items()}
    content = {"model_name": name, "num_classes": 10, "model": state, "img_size": (32, 32, 3), "clean_data": "cifar10"}
    torch.save(content, tmp_path / "attack_result.pt")
    model, report = import_classifier(tmp_path / "attack_result.pt")
    assert (report.image_size, report.resize, report.guessed) == (32, resize, ())
    assert report.arch == f"torchvision:{name}" and isinstance(model, Classifier)
    assert model.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    if name == "vit_b_16":  # also where the user alone says what images come in
        torch.save(state, tmp_path / "bare.pth")
        report = import_classifier(tmp_path / "bare.pth", f"torchvision:{name}", image_size=32)[1]
        assert (report.image_size, report.resize, report.guessed) == (32, 224, ("normalization",))
        return
    assert all(key.startswith("AuxLogits") for key in report.dropped) and report.dropped
