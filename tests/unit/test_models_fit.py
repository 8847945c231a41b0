"""Image size against model size, and what a card only guesses: told before a run starts."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_defend.cli import main
from dist_defend.errors import UserError
from dist_defend.models.artifact import load_artifact, save_artifact
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.models.encoder import SimCLR, build_simclr
from dist_defend.models.fit import check_image_size
from tests.runs import SIZE, make_classifier, make_data, make_experiment, make_model, options_of

VIT = "timm:vit_tiny_patch16_224"


def encoder(arch: str, size: int, **options: Any) -> SimCLR:
    return build_simclr(arch, "none", size, projector=False, **options)


@pytest.mark.parametrize(
    "build",
    [
        lambda: encoder(VIT, 64),
        lambda: build_classifier(VIT, 3, "none", 64),
        lambda: build_classifier("torchvision:vit_b_32", 3, "none", 64),
        lambda: build_classifier("timm:mixer_s32_224", 3, "none", 64),
        lambda: build_classifier("timm:swin_tiny_patch4_window7_224", 3, "none", 64),
        lambda: build_classifier("ibau_vgg", 3, "none", 64),  # its linear layer counts pixels
    ],
)
def test_a_network_of_one_size_refuses_others(build: Callable[[], SimCLR | Classifier]) -> None:
    model = build().train()
    with pytest.raises(UserError) as error:
        check_image_size(model, "models/m", (32, 32, 3), "data/d")
    told = str(error.value)
    assert told.startswith(f"models/m ({model.arch}) takes images of 64 px, but those of data/d have 32x32 px")
    assert told.endswith("say `resize: 64` beside its `path`") and "\n" not in told
    check_image_size(model, "models/m", (64, 64, 3), "data/d")
    assert model.training


def test_a_network_of_open_clip_too() -> None:
    pytest.importorskip("open_clip")
    with pytest.raises(UserError, match=r"takes images of 64 px, but those of d have 32x48 px"):
        check_image_size(encoder("open_clip:RN50", 64), "m", (32, 48, 3), "d")


@pytest.mark.parametrize("arch", ["resnet20_cifar", "torchvision:mobilenet_v3_small"])
def test_a_network_of_any_size_is_told_of(arch: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build_classifier(arch, 3, "none", 32)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    check_image_size(model, "models/m", (32, 32, 3), "data/d")
    check_image_size(model, "models/m", None, "data/d")
    assert not caplog.messages
    check_image_size(model, "models/m", (64, 48, 3), "data/d", "do this")
    (told,) = caplog.messages
    assert f"models/m ({arch}) was made for images of 32 px" in told and "64x48 px" in told and "do this" in told
    assert all(value.equal(state[key]) for key, value in model.state_dict().items())


def test_a_card_that_tells_of_a_size_which_the_network_has_not() -> None:
    model = build_classifier("torchvision:inception_v3", 3, "none", 32)
    with pytest.raises(UserError, match="does not take images of 32 px, although its card says so") as error:
        check_image_size(model, "models/m", (32, 32, 3), "data/d")
    assert "\n" not in str(error.value)
    check_image_size(build_classifier("torchvision:inception_v3", 3, "none", 32, resize=96), "m", (32, 32, 3), "d")


def _vit(folder: Path) -> str:
    return make_model(folder, size=64, arch=VIT)


def _probe(folder: Path) -> tuple[str, dict[str, Any]]:
    options = options_of("probe", folder)
    return "probe", options | {"encoders": {"suspect": _vit(folder / "vit")}}


def _badencoder(folder: Path) -> tuple[str, dict[str, Any]]:
    return "badencoder", options_of("badencoder", folder) | {"clean_encoder": _vit(folder / "vit")}


def _mimic(folder: Path) -> tuple[str, dict[str, Any]]:
    return "mimic", options_of("mimic", folder) | {"teacher": _vit(folder / "vit")}


def _mimic_student(folder: Path) -> tuple[str, dict[str, Any]]:
    return "mimic", options_of("mimic", folder) | {"student": _vit(folder / "vit")}


def _warm_start(folder: Path) -> tuple[str, dict[str, Any]]:
    return "simclr", options_of("simclr", folder) | {"warm_start": _vit(folder / "vit")}


def _views(folder: Path) -> tuple[str, dict[str, Any]]:
    options = options_of("simclr", folder) | {"warm_start": _vit(folder / "vit"), "augment": {"size": 48}}
    return "simclr", options | {"data": {"path": make_data(folder / "large", size=64), "max_samples": 8}}


def _monitor(folder: Path) -> tuple[str, dict[str, Any]]:
    small = {"path": make_data(folder / "small")}
    data = {"path": make_data(folder / "large", size=64), "max_samples": 8}
    options = options_of("simclr", folder) | {"data": data, "arch": VIT, "monitor": {"memory": small, "test": small}}
    return "simclr", options


@pytest.mark.parametrize(
    ("case", "told"),
    [
        (_probe, "say `resize: 64` beside its `path`"),
        (_badencoder, "say `resize: 64` beside its `path`"),
        (_mimic, "say `resize: 64` beside its `path`"),
        (_mimic_student, "say `resize: 64` beside its `path`"),
        (_warm_start, "say `resize: 64` beside its `path`"),
        (_views, "set 'simclr.augment.size' to 64"),
        (_monitor, "the model to train (timm:vit_tiny_patch16_224) takes images of 64 px"),
    ],
)
def test_a_dry_run_says_so_in_one_line(
    case: Callable[[Path], tuple[str, dict[str, Any]]],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    method, options = case(tmp_path)
    config = make_experiment(tmp_path, method, options)
    assert main(["run", str(config), "--dry-run"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "takes images of 64 px" in line]
    assert len(lines) == 1 and told in lines[0]


def test_views_that_fit_are_enough(tmp_path: Path) -> None:
    """A model of 64 px learns from 16 px images that the augmentation enlarges."""
    options = options_of("simclr", tmp_path) | {"warm_start": _vit(tmp_path / "vit")}
    options["augment"] = {"crop": "random_resized", "size": 64}
    assert main(["run", str(make_experiment(tmp_path, "simclr", options)), "--dry-run"]) == 0


def test_badencoders_views_have_the_images_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = options_of("badencoder", tmp_path) | {"augment": {"crop": "random_resized", "size": 32}}
    assert main(["run", str(make_experiment(tmp_path, "badencoder", options)), "--dry-run"]) == 2
    assert "key 'badencoder.augment.size' is 32, but the shadow images have 16 px" in capsys.readouterr().err


def test_mimic_measures_a_cnn_on_images_of_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = options_of("mimic", tmp_path)
    options["teacher"] = make_model(tmp_path / "other", size=64)
    assert main(["run", str(make_experiment(tmp_path, "mimic", options))]) == 0
    assert "was made for images of 64 px, but those of" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["badencoder", "ibau"])
def test_guesses_of_a_card_are_told_once(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(tmp_path / "data")
    if method == "badencoder":  # which loads the folder twice
        options = options_of(method, tmp_path)
        folder = Path(options["clean_encoder"])
    else:
        folder = Path(make_classifier(tmp_path / "model"))
        options = {"model": str(folder), "data": {"path": data, "max_samples": 8}, "test": {"path": data}}
    model, card = load_artifact(folder)
    save_artifact(folder, model, dataclasses.replace(card, guessed=("normalization", "image_size")))
    assert main(["run", str(make_experiment(tmp_path, method, options)), "--dry-run"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "guessed" in line]
    assert len(told) == 1 and str(folder) in told[0] and f"image_size {SIZE}" in told[0]
    assert f"normalization {card.normalization}" in told[0] and "--check" in told[0]
    assert "--normalization and --image-size" in told[0]


def test_what_is_known_needs_no_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = make_experiment(tmp_path, "probe", options_of("probe", tmp_path))
    assert main(["run", str(config), "--dry-run"]) == 0
    told = capsys.readouterr().err
    assert "guessed" not in told and "px" not in told
