"""BackdoorBench's attack_result.pt with its images, in the file and beside it; and defense_result.pt, out and back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_defend.cli import main
from dist_defend.data.sources import load_image_npz
from dist_defend.models.artifact import load_artifact, load_classifier, save_artifact
from dist_defend.models.classifier import build_classifier
from dist_defend.models.encoder import build_simclr

TRAIN, TEST = (2, 5, 6), (0, 1, 3)  # poisoned rows


def pixels(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 256, (32, 32, 3), np.uint8)


def split_state(rows: tuple[int, ...], order: Any, folder: Path | None, told: str | None) -> dict[str, Any]:
    """A split of 8 images as upstream keeps it; folder: where PNGs go, told: where they were on upstream's machine."""
    stored: dict[Any, Any] = {}
    for row in rows:
        image = Image.fromarray(pixels(row))
        if folder is None:
            stored[np.int64(row)] = (image, 0, np.int64(row % 4))
        else:
            (folder / str(row % 4)).mkdir(parents=True, exist_ok=True)
            image.save(folder / str(row % 4) / f"{row}.png")
            stored[np.int64(row)] = {"path": f"{told}/{row % 4}/{row}.png", "other_info": [0, row % 4]}
    indicator = np.zeros(8)
    indicator[list(rows)] = 1
    container = {"save_folder_path": told, "data_dict": stored, "save_file_format": ".png"}
    return {
        "bd_data_container": container,
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": order,
        "poison_indicator": indicator,
        "save_folder_path": told,
    }


def attack_result(record: Path, on_disk: bool, arch: str = "small_resnet") -> dict[str, Any]:
    """As upstream saves it, from BadNets to class 0 with four classes."""
    torch.manual_seed(0)
    model = {f"module.{k}": v for k, v in build_classifier(arch, 4).net.state_dict().items()}
    splits = {}
    for name, rows, order in (("bd_train", TRAIN, np.arange(8)), ("bd_test", TEST, np.array([3, 0, 1]))):
        folder = record / f"{name}_dataset" if on_disk else None
        splits[name] = split_state(rows, order, folder, f"./record/badnet_0_1/{name}_dataset" if on_disk else None)
    return {
        "model_name": "preactresnet18",
        "num_classes": 4,
        "model": model,
        "data_path": "./data/cifar10",
        "img_size": (32, 32, 3),
        "clean_data": "cifar10",
        **splits,
    }


@pytest.mark.parametrize("on_disk", [True, False])
def test_an_attack_result_gives_a_model_and_its_images(
    tmp_path: Path, on_disk: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    content = attack_result(tmp_path / "moved", on_disk, "preact_resnet18")
    source, out = tmp_path / "moved" / "attack_result.pt", tmp_path / "model"
    source.parent.mkdir(exist_ok=True)
    torch.save(content, source)
    assert main(["import", str(source), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "BackdoorBench attack_result, in 'model', prefix 'module.'; preact_resnet18, 4 classes" in told
    assert "bd_test: 3 images of 32x32 px, all to 0, in " in told and "marked BACKDOORED" in told
    model, card = load_classifier(out)
    assert all(model.net.state_dict()[k.removeprefix("module.")].equal(v) for k, v in content["model"].items())
    assert (card.normalization, card.image_size, card.backdoored) == ("cifar10_backdoorbench", 32, True)
    assert card.provenance["clean_data"] == "cifar10"
    assert card.provenance["labels"] == {"bd_train": "all to 0", "bd_test": "all to 0"}
    for split, rows in (("bd_train", (2, 5, 6)), ("bd_test", (3, 0, 1))):  # upstream's order
        with np.load(out / f"{split}.npz", allow_pickle=False) as arrays:
            assert np.array_equal(arrays["x"], np.stack([pixels(row) for row in rows]))
            assert arrays["x"].dtype == np.uint8 and arrays["y"].dtype == np.int64
            assert arrays["index"].tolist() == list(rows) and arrays["flag"].tolist() == [True] * 3
            assert arrays["y"].tolist() == [row % 4 for row in rows] and arrays["y_bd"].tolist() == [0] * 3
        assert load_image_npz(out / f"{split}.npz")[0].shape == (3, 32, 32, 3)  # which `data prepare npz` reads


def test_label_rules_are_recognised(tmp_path: Path) -> None:
    for shift, told in ((0, "clean label"), (1, "all to all, shift 1"), (3, "all to all, shift 3")):
        content = attack_result(tmp_path, on_disk=False)
        content["bd_train"] = None
        stored = content["bd_test"]["bd_data_container"]["data_dict"]
        for row, (image, _, true) in stored.items():
            stored[row] = (image, (int(true) + shift) % 4, true)
        torch.save(content, tmp_path / "attack_result.pt")
        out = tmp_path / f"model{shift}"
        assert main(["import", str(tmp_path / "attack_result.pt"), "--out", str(out)]) == 0
        assert load_artifact(out)[1].provenance["labels"] == {"bd_test": told}
        assert not (out / "bd_train.npz").exists()


def with_path(path: str) -> Callable[[dict[str, Any], Path], None]:
    def change(content: dict[str, Any], record: Path) -> None:
        content["bd_test"]["bd_data_container"]["data_dict"][1]["path"] = path

    return change


def with_key(*keys: str, value: Any) -> Callable[[dict[str, Any], Path], None]:
    def change(content: dict[str, Any], record: Path) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def link_image(content: dict[str, Any], record: Path) -> None:
    (record / "bd_test_dataset" / "1" / "1.png").unlink()
    Image.fromarray(pixels(9)).save(record.parent / "secret.png")
    (record / "bd_test_dataset" / "1" / "1.png").symlink_to(record.parent / "secret.png")


def link_folder(content: dict[str, Any], record: Path) -> None:
    (record / "bd_test_dataset").rename(record.parent / "elsewhere")
    (record / "bd_test_dataset").symlink_to(record.parent / "elsewhere")


def write_image(size: int, keep: int | None = None) -> Callable[[dict[str, Any], Path], None]:
    def change(content: dict[str, Any], record: Path) -> None:
        place = record / "bd_test_dataset" / "1" / "1.png"
        Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(place)
        place.write_bytes(place.read_bytes()[:keep])

    return change


def other_format(content: dict[str, Any], record: Path) -> None:
    Image.fromarray(pixels(1)).save(record / "bd_test_dataset" / "1" / "1.png", format="GIF")


HARM: dict[str, tuple[Callable[[dict[str, Any], Path], None], str]] = {
    "upwards": (with_path("../../etc/passwd"), "not below a bd_*_dataset folder"),
    "upwards, below the folder": (with_path("record/bd_test_dataset/../../../secret.png"), "not below a bd_*_dataset"),
    "upwards with backslashes": (
        with_path("record\\bd_test_dataset\\..\\..\\..\\secret.png"),
        "not below a bd_*_dataset",
    ),
    "absolute": (with_path("/etc/passwd"), "not below a bd_*_dataset folder"),
    "absolute, below the folder": (with_path("/bd_test_dataset//etc/passwd"), "which is not beside the file"),
    "zero byte": (with_path("bd_test_dataset/1/1.png\0"), "not below a bd_*_dataset folder"),
    "line break": (with_path("a\nb"), "names 'a\\nb' for row 1"),
    "no text": (with_key("bd_test", "bd_data_container", "data_dict", value={1: {"path": 7}}), "names '7' for row 1"),
    "missing": (with_path("bd_test_dataset/1/77.png"), "which is not beside the file"),
    "a folder": (with_path("bd_test_dataset/1"), "which is not beside the file"),
    "linked image": (link_image, "which leads out of the file's folder"),
    "linked folder": (link_folder, "which leads out of the file's folder"),
    "another size": (write_image(33), "has an image of 33x33 px for row 1"),
    "cut": (write_image(32, keep=60), "has a damaged PNG for row 1 (1.png)"),
    "no PNG": (other_format, "has a damaged PNG for row 1 (1.png)"),
    "huge": (with_key("img_size", value=[10**9, 10**9, 3]), "img_size is [1000000000, 1000000000, 3]"),
    "no size": (with_key("img_size", value=None), "img_size is missing"),
    "no data set of theirs": (with_key("clean_data", value="food"), "no constants are known for food"),
    "an older version": (
        with_key("bd_test", value={"x": torch.ones(1), "y": torch.ones(1)}),
        "is no state of a poisoned",
    ),
    "no dictionary": (with_key("bd_test", value=[1]), "is no state of a poisoned"),
    "short indicator": (with_key("bd_test", "poison_indicator", value=np.ones(2)), "is no state of a poisoned"),
    "indicator of text": (with_key("bd_test", "poison_indicator", value=["a"] * 8), "is no state of a poisoned"),
    "indicator with NaN": (
        with_key("bd_test", "poison_indicator", value=np.full(8, np.nan)),
        "is no state of a poisoned",
    ),
    "rows below 0": (with_key("bd_test", "original_index_array", value=[-1]), "is no state of a poisoned"),
    "rows without image": (with_key("bd_test", "poison_indicator", value=[1] * 8), "marks 1 rows as poisoned"),
    "labels": (with_key("bd_test", "bd_data_container", "data_dict", value={}), "marks 3 rows as poisoned"),
}


@pytest.mark.parametrize("name", HARM)
def test_what_leads_astray_is_one_line_and_nothing_is_written(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "record"
    content = attack_result(record, on_disk=True)
    content["bd_train"] = None
    if name == "rows without image":
        content["bd_test"]["original_index_array"] = np.array([3, 0, 1, 4])
    if name == "no text":
        content["bd_test"]["original_index_array"] = np.array([1])
    change, expected = HARM[name]
    change(content, record)
    torch.save(content, record / "attack_result.pt")
    assert main(["import", str(record / "attack_result.pt"), "--out", str(tmp_path / "model")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {record / 'attack_result.pt'}") and expected in captured.err
    assert captured.err.count("\n") == 1 and captured.err[:-1].isprintable() and not captured.out
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ((Image.fromarray(pixels(1)), 4, 1), "has labels [4, 1] for row 1 of 4 classes"),
        ((Image.fromarray(pixels(1)), 0, "1"), "has labels [0, '1'] for row 1"),
        ((Image.fromarray(pixels(1)), 0), "has no image with two labels for row 1"),
        ((Image.fromarray(pixels(1)[:8]), 0, 1), "has no image of 32x32 px for row 1"),
        ((torch.ones(3, 32, 32), 0, 1), "has no image with two labels for row 1"),
        ((), "has no image with two labels for row 1"),
        (7, "has no image with two labels for row 1"),
    ],
)
def test_entries_in_the_file_are_checked(
    tmp_path: Path, entry: Any, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = attack_result(tmp_path, on_disk=False)
    content["bd_test"]["bd_data_container"]["data_dict"][np.int64(1)] = entry
    torch.save(content, tmp_path / "attack_result.pt")
    assert main(["import", str(tmp_path / "attack_result.pt"), "--out", str(tmp_path / "model")]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "model").exists()


def test_a_defense_result_goes_out_and_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "theirs.pt"
    content = attack_result(tmp_path, on_disk=False, arch="preact_resnet18")
    theirs = {key.removeprefix("module."): value for key, value in content["model"].items()}
    torch.save({"model_name": "preactresnet18", "num_classes": 4, "model": theirs}, source)
    command = ["import", str(source), "--out", str(tmp_path / "model")]
    assert main(command) == 2  # a defense_result names no data set, and no data set of theirs has 4 classes
    assert "no constants are known for 4 classes: give --normalization" in capsys.readouterr().err
    assert main([*command, "--normalization", "cifar10_backdoorbench"]) == 0
    out = tmp_path / "defense_result.pt"
    assert main(["export", str(tmp_path / "model"), "--out", str(out)]) == 0
    assert "normalization cifar10_backdoorbench: what BackdoorBench uses for cifar10" in capsys.readouterr().out
    exported = torch.load(out, weights_only=True)
    assert list(exported) == ["model_name", "num_classes", "model"]
    assert (exported["model_name"], exported["num_classes"]) == ("preactresnet18", 4)
    assert list(exported["model"]) == list(theirs)
    assert all(exported["model"][key].equal(value) for key, value in theirs.items())


def test_exports_that_differ_from_theirs_are_said_and_impossible_ones_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dist_defend.models.artifact import ModelCard

    model = build_classifier("small_resnet", 10, "stl10")
    save_artifact(tmp_path / "model", model, ModelCard("classifier", "small_resnet", "stl10", 32, num_classes=10))
    encoder = build_simclr("small_cifar")
    save_artifact(tmp_path / "encoder", encoder, ModelCard("simclr", "small_cifar", "cifar10", 32, 256))
    command = ["export", str(tmp_path / "model"), "--out", str(tmp_path / "out.pt")]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "zoo lacks this small_resnet" in told and "normalization stl10 is none of BackdoorBench's" in told
    for arguments, error in (
        (command, "exists already"),
        ([*command[:3], str(tmp_path / "no" / "out.pt")], "is not a folder"),
        (["export", str(tmp_path / "encoder"), "--out", str(tmp_path / "b.pt")], "not a classifier"),
    ):
        assert main(arguments) == 2
        assert error in capsys.readouterr().err


def test_a_missing_folder_of_images_does_not_cost_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = attack_result(tmp_path, on_disk=True)
    torch.save(content, tmp_path / "attack_result.pt")
    (tmp_path / "bd_train_dataset").rename(tmp_path / "elsewhere")
    assert main(["import", str(tmp_path / "attack_result.pt"), "--out", str(tmp_path / "model")]) == 0
    told = capsys.readouterr().out
    assert "bd_train: NO IMAGES, as bd_train_dataset is not beside attack_result.pt" in told
    assert "bd_test: 3 images of 32x32 px, all to 0" in told
    _, card = load_classifier(tmp_path / "model")
    assert card.backdoored and card.provenance["labels"] == {"bd_test": "all to 0"}
    assert not (tmp_path / "model" / "bd_train.npz").exists() and (tmp_path / "model" / "bd_test.npz").exists()
