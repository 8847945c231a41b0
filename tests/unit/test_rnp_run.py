"""RNP from its configuration to its run folder, and what it refuses."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_defend.cli import main
from dist_defend.config import load_experiment
from dist_defend.data.loader import DatasetConfig, select_rows
from dist_defend.data.store import open_dataset
from dist_defend.methods.defend.pruning.masks import read_mask_values
from dist_defend.models.artifact import ModelCard, load_classifier, save_artifact
from dist_defend.models.batch_statistics import estimate_statistics
from dist_defend.models.classifier import build_classifier
from dist_defend.models.masked_norm import norm_names
from tests.runs import CLASSES, SIZE, make_data, make_experiment, metrics

CHANNELS = 16 * 4 + 32 * 3 + 64 * 3 + 128 * 3
ATTACK = {"trigger": {"name": "badnets"}, "target_class": 1}


def make_classifier(folder: Path, arch: str = "small_resnet") -> str:
    torch.manual_seed(0)
    model = build_classifier(arch, CLASSES, "cifar10", image_size=SIZE)
    if arch == "small_resnet":
        with torch.no_grad():
            model.train()(torch.rand(16, 3, SIZE, SIZE))
    save_artifact(folder, model, ModelCard("classifier", arch, "cifar10", SIZE, num_classes=CLASSES))
    return str(folder)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    return {
        "model": make_classifier(tmp_path / "model"),
        "data": {"path": make_data(tmp_path / "data"), "max_samples": 12},
        "test": {"path": make_data(tmp_path / "test", 9, seed=1)},
        "attack": ATTACK,
        "batch_size": 8,
        "unlearning_epochs": 2,
        "recovering_epochs": 2,
        "recovering_lr": 5.0,
        "clean_threshold": 0.0,
        "max_accuracy_drop": 1.0,
    }


def run(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The entries of result.json, with the table as "table"."""
    assert main(["run", str(make_experiment(folder, "rnp", options))]) == 0
    result = json.loads((folder / "run" / "result.json").read_text())
    return {**result, "table": json.loads((folder / "run" / "sweep.json").read_text())}


def test_a_run(options: dict[str, Any], tmp_path: Path) -> None:
    found = run(tmp_path, options)
    kinds = [row["kind"] for row in found["rows"]]
    assert kinds == ["rnp", "rnp (oracle)"]
    assert {row["task"] for row in found["rows"]} == {"noise"}
    (chosen,) = [row for row in found["table"] if row["chosen"]]
    assert {key: found["rows"][0][key] for key in ("acc", "asr", "asr_all", "ra")} == {
        key: chosen[key] for key in ("acc", "asr", "asr_all", "ra")
    }
    assert len(found["table"]) == 20 and found["table"][0]["pruned"] == 0
    assert found["metrics"]["pruned_neurons"] == chosen["pruned"] > 0
    assert found["metrics"]["defence_images"] == 12
    stages = [row["stage"] for row in metrics(tmp_path / "run")]
    assert (stages.count("unlearn"), stages.count("recover")) == (3 * 2, 2 * 2)  # one epoch more: inclusive

    model, card = load_classifier(tmp_path / "run" / "model")
    before, _ = load_classifier(options["model"])
    neurons = read_mask_values(tmp_path / "run" / "mask_values.txt")
    assert len(neurons) == CHANNELS
    dead = {(name, c) for name in norm_names(model.net)
            for c in (model.net.get_parameter(f"{name}.weight") == 0).nonzero().flatten().tolist()}  # fmt: skip
    threshold = chosen["threshold"]
    assert dead == {(neuron.layer, neuron.channel) for neuron in neurons if neuron.score <= threshold}
    for key, value in before.state_dict().items():  # nothing but gammas has changed
        is_gamma = key.removeprefix("net.").removesuffix(".weight") in norm_names(model.net)
        assert is_gamma or torch.equal(model.state_dict()[key], value), key
    asr = chosen["asr"]  # the suspect's card names no backdoor: an ASR of half or more does
    assert card.backdoored is (2 * asr["correct"] >= asr["n"]) and card.parent_sha256 is not None
    assert (card.defended_by, card.chosen_by) == ("rnp", "defence_data")
    assert card.provenance["method"] == "rnp"


def test_dropout_follows_the_seed(options: dict[str, Any], tmp_path: Path) -> None:
    """Unlearning runs in train mode, so a network with dropout draws there."""
    options["model"] = make_classifier(tmp_path / "vgg", "ibau_vgg")
    for name in ("first", "second"):
        run(tmp_path / name, options)
    first, second = (
        [row.get("cross_entropy") for row in metrics(tmp_path / name / "run")] for name in ("first", "second")
    )
    assert first == second and any(value is not None for value in first)


def test_masks_from_a_file_skip_both_phases(options: dict[str, Any], tmp_path: Path) -> None:
    first = run(tmp_path / "first", options)
    masks = tmp_path / "first" / "run" / "mask_values.txt"
    again = run(tmp_path / "again", {**options, "mask_file": str(masks)})
    assert again["table"] == first["table"]
    assert metrics(tmp_path / "again" / "run") == []
    assert (tmp_path / "again" / "run" / "mask_values.txt").read_bytes() == masks.read_bytes()


def test_a_choice_without_the_full_table_is_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    full, short = (run(tmp_path / str(flag), {**options, "full_table": flag}) for flag in (True, False))
    assert short["rows"][0]["acc"] == full["rows"][0]["acc"]
    assert [row["kind"] for row in short["rows"]] == ["rnp"]
    assert short["metrics"] == full["metrics"]
    assert [row["acc_defence"] for row in short["table"]] == [row["acc_defence"] for row in full["table"]]
    assert sum("acc" in row for row in short["table"]) == 2


def test_backdoorbench_delivers_the_model_at_pruning_number(options: dict[str, Any], tmp_path: Path) -> None:
    found = run(tmp_path, {**options, "preset": "backdoorbench", "pruning_number": 0.5})
    (chosen,) = [row for row in found["table"] if row["chosen"]]
    assert chosen is found["table"][-1] and chosen["threshold"] == 0.5
    neurons = read_mask_values(tmp_path / "run" / "mask_values.txt")
    assert chosen["pruned"] == sum(neuron.score <= 0.5 for neuron in neurons)
    stages = [row["stage"] for row in metrics(tmp_path / "run")]
    assert stages.count("unlearn") == 2 * 2  # not one epoch more


@pytest.mark.parametrize(("off_by_one", "counts"), [(False, [0, 0, 20, 40, 20]), (True, [0, 20, 40, 60, 40])])
def test_pruning_by_number(off_by_one: bool, counts: list[int], options: dict[str, Any], tmp_path: Path) -> None:
    changes = {"pruning_by": "number", "pruning_max": 40, "pruning_step": 20, "pruning_number": 20}
    found = run(tmp_path, {**options, **changes, "off_by_one": off_by_one, "selection": "pruning_number"})
    assert [row["pruned"] for row in found["table"]] == counts


def test_accuracy_without_the_target_class(options: dict[str, Any], tmp_path: Path) -> None:
    found = run(tmp_path, {**options, "exclude_target_from_acc": True})
    assert found["rows"][0]["acc"]["n"] == 6 and found["rows"][0]["asr"]["n"] == 6


def test_pruning_beta_too(options: dict[str, Any], tmp_path: Path) -> None:
    run(tmp_path, {**options, "prune_beta": True})
    model, _ = load_classifier(tmp_path / "run" / "model")
    for name in norm_names(model.net):
        norm = dict(model.net.get_submodule(name).named_parameters())
        assert (norm["bias"][norm["weight"] == 0] == 0).all()


def test_statistics_of_the_pruned_model_follow(options: dict[str, Any], tmp_path: Path) -> None:
    found = run(tmp_path, {**options, "adapt_statistics": True})
    (chosen,) = [row for row in found["table"] if row["chosen"]]
    assert chosen["pruned"] > 0
    dataset = open_dataset(options["data"]["path"])
    rows = select_rows(dataset, DatasetConfig(options["data"]["path"], max_samples=12), seed=0)
    images = torch.from_numpy(dataset.images(rows)).permute(0, 3, 1, 2).float() / 255
    (before, _), (model, _) = load_classifier(options["model"]), load_classifier(tmp_path / "run" / "model")
    seen_before, seen_after = copy.deepcopy(before), copy.deepcopy(model)
    for seen in (seen_before, seen_after):
        estimate_statistics(seen, images.split(8))
    own, was, now = (net.state_dict() for net in (before, seen_before, seen_after))
    for key, value in model.state_dict().items():
        if key.endswith("running_mean"):
            torch.testing.assert_close(value, own[key] + now[key] - was[key], rtol=1e-4, atol=1e-6, msg=key)
        elif key.endswith("running_var"):
            expected = own[key] * (now[key] + 1e-5) / (was[key] + 1e-5)
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=key)
    moved = "net.layer4.0.bn2.running_mean"
    assert not torch.allclose(before.get_buffer(moved), model.get_buffer(moved))
    plain = run(tmp_path / "plain", options)
    assert plain["table"][0] == found["table"][0]  # where nothing is pruned nothing moves


def test_one_image_in_the_last_batch_has_no_statistics(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "first", options)
    masks = str(tmp_path / "first" / "run" / "mask_values.txt")
    short = {**options, "mask_file": masks, "batch_size": 11, "adapt_statistics": True}
    assert main(["run", str(make_experiment(tmp_path, "rnp", short))]) == 2
    assert "key 'rnp.batch_size' is 11" in capsys.readouterr().err


def test_without_an_attack_there_is_only_accuracy(options: dict[str, Any], tmp_path: Path) -> None:
    found = run(tmp_path, {**options, "attack": None})
    assert [row["kind"] for row in found["rows"]] == ["rnp"]
    assert found["rows"][0]["asr"]["n"] == 0
    assert "der" not in found["metrics"]


def test_rows_from_an_index_file(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "index.txt").write_text("3\n1\n20\n7\n")
    data = {"path": options["data"]["path"]}
    found = run(tmp_path, {**options, "data": data, "index": str(tmp_path / "index.txt")})
    assert found["metrics"]["defence_images"] == 4


def test_a_ratio_of_the_images(options: dict[str, Any], tmp_path: Path) -> None:
    found = run(tmp_path, {**options, "data": {"path": options["data"]["path"]}, "ratio": 0.5})
    assert found["metrics"]["defence_images"] == 12


def test_a_stop_rule_that_is_not_met_is_loud(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = {**options, "unlearning_lr": 1e-9}
    run(tmp_path / "loud", slow)
    assert "above clean_threshold 0.0" in capsys.readouterr().err
    path = make_experiment(tmp_path / "fail", "rnp", {**slow, "not_unlearned": "fail"})
    assert main(["run", str(path)]) == 2
    assert "above clean_threshold 0.0" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "fail" / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 0.5}, "key 'rnp.ratio' is set, but 'data' chooses"),
        ({"index": "nowhere.txt", "data": {"path": "DATA"}}, "rnp.index"),
        ({"alpha": 0}, "rnp.alpha"),
        ({"pruning_step": 0}, "rnp.pruning_step"),
        ({"max_grad_norm": -1.0}, "rnp.max_grad_norm"),
        ({"pruning_by": "number", "pruning_max": 10000, "pruning_step": 10}, "rnp.pruning_max"),
        ({"batch_size": 11}, "rnp.batch_size"),
        ({"mask_file": "nowhere.txt"}, "nowhere.txt"),
        ({"unlearn_lr": 0.1}, "did you mean 'rnp.unlearning_lr'"),
        ({"preset": "oficial"}, "rnp.preset"),
        ({"graph": "on"}, "graph"),
    ],
)
def test_bad_input(
    changes: dict[str, Any], message: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = {**options, **changes}
    if merged["data"]["path"] == "DATA":
        merged["data"] = {"path": options["data"]["path"]}
    assert main(["run", str(make_experiment(tmp_path, "rnp", merged))]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_network_without_batch_norm(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_classifier(tmp_path / "plain", "timm:convnext_atto")
    assert main(["run", str(make_experiment(tmp_path, "rnp", {**options, "model": model}))]) == 2
    assert "no BatchNorm2d" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["official", "backdoorbench"])
def test_presets(preset: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = make_experiment(tmp_path, "rnp", {**options, "preset": preset, "batch_size": 4})
    config = load_experiment(path).options
    assert (config.off_by_one, config.batch_size) == (True, 4)  # the file's own keys win
    assert config.epochs_inclusive is (preset == "official")
    assert config.not_unlearned == ("fail" if preset == "official" else "use_last")
    assert config.exclude_target_from_acc is (preset == "official")
