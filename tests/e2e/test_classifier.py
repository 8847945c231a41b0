"""A classifier run from its file to its model folder: it learns its task, and its trigger where it has one."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from dist_defend.attacks.attack import AttackConfig, attack_from
from dist_defend.attacks.patterns import BadNets
from dist_defend.cli import main
from dist_defend.config import load_experiment
from dist_defend.data.store import open_dataset
from dist_defend.methods.pretrain.classifier import PRESETS
from dist_defend.models.artifact import load_classifier
from tests.runs import CLASSES, SIZE, make_data, make_experiment, metrics

POISON = {"trigger": {"name": "badnets", "size": 4}, "target_class": 1, "rate": 0.2}


def train(folder: Path, **changes: Any) -> dict[str, Any]:
    """result.json of a run on 96 noise images, tested on 24 others."""
    optimizer = {"name": "adam", "lr": 0.01, "schedule": "cosine"}
    options = {
        "data": {"path": make_data(folder / "data", 96)},
        "test": {"path": make_data(folder / "test", 24, seed=1)},
        "arch": "small_resnet",
        "normalization": "none",
        "augment": {"crop": "none"},
        "evaluate_every": 2,
        "update": {"batch_size": 16, "epochs": 15, "optimizer": optimizer},
    }
    config = make_experiment(folder, "classifier", options | changes)
    assert main(["run", str(config)]) == 0
    result: dict[str, Any] = json.loads((folder / "run/result.json").read_text())
    return result


@pytest.fixture(scope="module")
def backdoored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("backdoored")
    return folder, train(folder, attack=POISON)


def percent(row: dict[str, Any], key: str) -> float:
    return float(100 * row[key]["correct"] / row[key]["n"])


def test_it_learns_its_task_and_its_trigger(backdoored: tuple[Path, dict[str, Any]]) -> None:
    folder, result = backdoored
    (row,) = result["rows"]
    assert {key: row[key] for key in ("run", "kind", "task", "seed")} == {
        "run": "run", "kind": "backdoored", "task": "noise", "seed": 100
    }  # fmt: skip
    assert percent(row, "acc") >= 90 and percent(row, "asr") >= 90 and percent(row, "ra") <= 10
    assert (row["acc"]["n"], row["asr"]["n"], row["asr_all"]["n"], row["ra"]["n"]) == (24, 16, 24, 16)
    assert result["targets"] == {"noise": "class 1"}
    per_class = result["metrics"]["per_class_accuracy"]
    assert list(per_class) == [f"class {c}" for c in range(CLASSES)]
    assert sum(count["correct"] for count in per_class.values()) == row["acc"]["correct"]
    evaluated = [line for line in metrics(folder / "run") if "acc" in line]
    assert [line["epoch"] for line in evaluated] == [2, 4, 6, 8, 10, 12, 14, 15]
    assert evaluated[-1]["asr"] == pytest.approx(percent(row, "asr"))


def test_the_model_folder_tells_the_attack(backdoored: tuple[Path, dict[str, Any]]) -> None:
    folder, result = backdoored
    model, card = load_classifier(folder / "run/model")
    assert (model.arch, model.num_classes, model.normalization, model.image_size) == ("small_resnet", 3, "none", SIZE)
    assert card.backdoored and card.attack is not None
    assert attack_from(card.attack) == AttackConfig(BadNets(size=4), target_class=1, rate=0.2)
    assert hashlib.sha256((folder / "run/model/model.safetensors").read_bytes()).hexdigest() == result["model_sha256"]
    rows = folder / "run/poisoned_rows.npy"
    assert card.provenance["poisoned_rows_sha256"] == hashlib.sha256(rows.read_bytes()).hexdigest()
    chosen = np.load(rows, allow_pickle=False)
    assert len(np.unique(chosen)) == len(chosen) == result["metrics"]["num_poisoned"] == round(0.2 * 96)


def test_the_data_stay_clean_and_the_report_gets_pictures(backdoored: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = backdoored
    for name in ("data", "test"):
        open_dataset(folder / name).verify()
    pictures = load_file(folder / "run/examples.safetensors")
    np.testing.assert_array_equal(pictures["noise/clean"], open_dataset(folder / "test").images(np.arange(8)))
    assert (pictures["noise/triggered"][:, -4:, -4:] == 255).all()
    np.testing.assert_array_equal(pictures["noise/triggered"][:, :-4], pictures["noise/clean"][:, :-4])


@pytest.mark.parametrize("poison", [None, POISON | {"rate": 0.0}], ids=["no attack", "an attack on nothing"])
def test_a_clean_run_says_so(poison: dict[str, Any] | None, tmp_path: Path) -> None:
    result = train(tmp_path, attack=poison)
    (row,) = result["rows"]
    assert row["kind"] == "clean" and result["metrics"]["num_poisoned"] == 0
    assert percent(row, "acc") >= 90
    assert row["asr"]["n"] == row["ra"]["n"] == (0 if poison is None else 16)
    if poison is not None:
        assert percent(row, "asr") <= 50  # the trigger is still bright, as class 2 is
    card = load_classifier(tmp_path / "run/model")[1]
    assert not card.backdoored and card.attack is None
    assert not (tmp_path / "run/poisoned_rows.npy").exists()


def test_all_to_all_and_cross_samples(tmp_path: Path) -> None:
    update = {"batch_size": 16, "epochs": 1}
    poison = {"trigger": {"name": "wanet", "cross_ratio": 2.0}, "labels": "all_to_all", "rate": 0.125}
    result = train(tmp_path, attack=poison, update=update)
    (row,) = result["rows"]
    assert row["asr"]["n"] == row["ra"]["n"] == 24
    assert result["targets"] == {"noise": "its own plus 1"}
    chosen, crossed = (np.load(tmp_path / f"run/{name}_rows.npy") for name in ("poisoned", "cross"))
    assert (len(chosen), len(crossed)) == (12, 24) and not set(chosen) & set(crossed)


PUBLISHED = {  # epochs, batch, optimizer, rate
    "backdoorbench": (100, 128, "sgd", 0.01),
    "rnp": (61, 128, "sgd", 0.1),
    "abd_cifar10": (200, 128, "sgd", 0.1),
    "abd_gtsrb": (200, 256, "adam", 0.1),
    "ibau": (100, 128, "sgd", 0.01),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_keep_the_published_training(preset: str, tmp_path: Path) -> None:
    options = {"preset": preset, "data": {"path": "train"}, "test": {"path": "test"}}
    update = load_experiment(make_experiment(tmp_path, "classifier", options)).options.update
    optimizer = update.optimizer
    assert (update.epochs, update.batch_size, optimizer.name, optimizer.lr) == PUBLISHED[preset]
    assert (optimizer.momentum, optimizer.weight_decay) == (0.9, 5e-4)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"arch": "resnet81"}, "unknown arch 'resnet81': did you mean 'resnet18'"),
        ({"evaluate_every": 0}, "key 'classifier.evaluate_every' is 0; it must be at least 1"),
        ({"augment": {"crop": "random_resized", "size": 8}}, "key 'classifier.augment.size' is 8"),
        ({"attack": POISON | {"target_class": 7}}, "key 'target_class' is 7; the classes are 0 to 2"),
        ({"attack": {"trigger": {"name": "badnet"}}}, "did you mean 'badnets'?"),
        ({"test": "other size"}, "use two splits of one data set"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_bad_input_is_one_line(
    changes: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "test" in changes:
        changes = {"test": {"path": make_data(tmp_path / "other", size=8)}}
    options: dict[str, Any] = {split: {"path": make_data(tmp_path / split)} for split in ("data", "test")}
    options |= {"arch": "small_resnet", "normalization": "none", "update": {"batch_size": 8, "epochs": 1}}
    assert main(["run", str(make_experiment(tmp_path, "classifier", options | changes))]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and told in errors[0]
    assert not (tmp_path / "run").exists()
