"""What a defence chooses by and what it counts before and after, recounted by plain torch on the files that it read."""

import json
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dist_defend.cli import main
from dist_defend.data.sources import ArraySource
from dist_defend.data.store import open_dataset, write_dataset
from dist_defend.methods import SHARED, defend
from dist_defend.methods.defend.pruning.masks import Neuron, write_mask_values
from dist_defend.methods.defend.rnp.steps import UnlearnStep
from dist_defend.models.artifact import load_classifier, load_simclr, save_artifact
from dist_defend.models.classifier import Classifier
from dist_defend.models.masked_norm import norm_names
from tests.runs import CLASSES, SIZE, make_classifier, make_data, make_experiment, metrics, options_of

ATTACK = {"trigger": {"name": "badnets"}, "target_class": 1}
NAMES = [f"class {c}" for c in range(CLASSES)]


def classes(model: Classifier, images: np.ndarray) -> np.ndarray:
    """Of images (N, H, W, 3) uint8."""
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    return logits.argmax(1).numpy()


def make_suspect(folder: Path, images: np.ndarray) -> str:
    """A classifier that says each of its classes of some of these images."""
    path = make_classifier(folder, attack=ATTACK)
    model, card = load_classifier(path)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
        model.get_parameter("net.linear.bias").sub_(logits.mean(0))
    save_artifact(folder, model, card)
    assert set(classes(model, images)) == set(range(CLASSES))
    return path


def without(folder: str, neurons: list[Neuron]) -> Classifier:
    """The suspect with the gammas of these neurons at 0."""
    model = load_classifier(folder)[0]
    for layer, channel, _ in neurons:
        model.net.get_parameter(f"{layer}.weight").data[channel] = 0
    return model


def test_rnp_chooses_by_the_defenders_images_alone(tmp_path: Path) -> None:
    """The suspect is right on all of the defender's images and wrong on all test images: these would take all stops."""
    draws = np.random.default_rng(1)
    data = {role: draws.integers(0, 256, (40, SIZE, SIZE, 3)).astype(np.uint8) for role in ("defence", "test")}
    suspect = make_suspect(tmp_path / "model", data["defence"])
    net = load_classifier(suspect)[0].net
    channels = [(name, c) for name in norm_names(net) for c in range(len(net.get_parameter(f"{name}.weight")))]
    masks = np.random.default_rng(0).integers(0, 100, len(channels)) / 100
    neurons = [Neuron(*place, mask) for place, mask in zip(channels, masks.tolist(), strict=True)]
    write_mask_values(tmp_path / "masks.txt", neurons)
    ascending = sorted(neurons, key=lambda neuron: neuron.score)
    kept = {t: without(suspect, [n for n in ascending if n.score <= t]) for t in (0.0, 0.2, 0.4, 0.6)}
    models = [load_classifier(suspect)[0], *kept.values()]
    labels = {"defence": classes(models[0], data["defence"]), "test": (classes(models[0], data["test"]) + 1) % CLASSES}
    for role, images in data.items():
        source = ArraySource(images, labels[role], NAMES)
        write_dataset(source, tmp_path / role, name=role, split="train", storage="npy")
    right = {role: [int((classes(m, data[role]) == labels[role]).sum()) for m in models] for role in data}
    by_role = {role: [count < 0.9 * counts[0] for count in counts] for role, counts in right.items()}
    chosen, by_test = ((lost.index(True) if True in lost else len(lost)) - 1 for lost in by_role.values())
    assert chosen != by_test
    options = {
        "model": suspect, "data": {"path": str(tmp_path / "defence")}, "test": {"path": str(tmp_path / "test")},
        "ratio": 1.0, "mask_file": str(tmp_path / "masks.txt"), "pruning_max": 0.6, "pruning_step": 0.2,
        "max_accuracy_drop": 0.1,
    }  # fmt: skip
    assert main(["run", str(make_experiment(tmp_path, "rnp", options))]) == 0
    table = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert [stop["acc_defence"] for stop in table] == [{"correct": n, "n": 40} for n in right["defence"]]
    assert [stop["acc"] for stop in table] == [{"correct": n, "n": 40} for n in right["test"]]
    assert [stop["chosen"] for stop in table] == [number == chosen for number in range(5)]
    (row, _) = json.loads((tmp_path / "run" / "result.json").read_text())["rows"]
    assert row["acc"] == {"correct": right["test"][chosen], "n": 40}


def counted(folder: str, test: str) -> dict[str, float]:
    """acc and asr of a model folder in percent; the trigger is BadNets' white 3 x 3 corner, the target class 1."""
    model, dataset = load_classifier(folder)[0], open_dataset(test)
    clean = dataset.images(np.arange(len(dataset)))
    stamped = clean.copy()
    stamped[:, -3:, -3:] = 255
    others = dataset.labels != 1
    hits = classes(model, stamped)[others] == 1
    return {"acc": 100 * float((classes(model, clean) == dataset.labels).mean()), "asr": 100 * float(hits.mean())}


TUNING = ("ft", "ft_sam", "nad", "fp", "sau", "nc")
OF_ENCODERS = ("ft_simclr", "mimic", "nad_simclr")
DEFENCES = sorted({found.name for found in pkgutil.iter_modules(defend.__path__)} - set(SHARED))


def check_named(result: dict[str, Any], folder: Path, method: str) -> None:
    """Rows, card, data and example pictures of the folder's run are the method's, under the names that all have."""
    kinds = [row["kind"].removesuffix(" (oracle)") for row in result["rows"]]
    assert kinds == ([method, "detector"] if method == "nc" else [method] * len(kinds))
    card = load_classifier(str(folder / "model"))[1]
    assert (card.defended_by, card.provenance["method"], result["method"]) == (method, method, method)
    assert {"test"} <= result["data"].keys() <= {"defence", "test"}
    assert ("defence" in result["data"]) is (method not in ("clp", "cmi", "zskt"))  # which need no data
    pictures = load_file(folder / "examples.safetensors")
    clean, stamped = pictures["noise/clean"], pictures["noise/triggered"]
    assert clean.shape == stamped.shape == (8, SIZE, SIZE, 3) and clean.dtype == stamped.dtype == torch.uint8
    assert (stamped[:, -3:, -3:] == 255).all() and (clean[:, -3:, -3:] != 255).any()
    assert torch.equal(clean[:, :-3], stamped[:, :-3]) and torch.equal(clean[:, :, :-3], stamped[:, :, :-3])


@pytest.mark.parametrize("method", sorted({*DEFENCES} - {*OF_ENCODERS}))
def test_before_is_the_suspect_and_after_is_what_was_saved(method: str, tmp_path: Path) -> None:
    images = np.random.default_rng(3).integers(0, 256, (30, SIZE, SIZE, 3)).astype(np.uint8)
    suspect = make_suspect(tmp_path / "model", images)
    model = load_classifier(suspect)[0]
    write_dataset(  # the suspect is right on all but the last three
        ArraySource(images, (classes(model, images) + (np.arange(30) > 26)) % CLASSES, NAMES),
        tmp_path / "test", name="noise", split="test", storage="npy",
    )  # fmt: skip
    test = str(tmp_path / "test")
    options: dict[str, Any] = {"test": {"path": test}}
    if method in ("ibau", "rnp", "anp", *TUNING):
        options |= {"model": suspect, "data": {"path": make_data(tmp_path / "data"), "max_samples": 12}}
    elif method == "clp":
        options |= {"model": suspect}
    else:
        options |= {"teacher": suspect, "student": "small_resnet"}
    update = {"batch_size": 4, "epochs": 1, "optimizer": {"name": "sgd", "lr": 0.1}}
    more: dict[str, dict[str, Any]] = {
        "ibau": {"rounds": 1, "batch_size": 4, "min_patched": 1, "optimizer": {"lr": 0.1}},
        "rnp": {"mask_file": str(tmp_path / "masks.txt"), "selection": "pruning_number", "pruning_number": 0.5},
        "anp": {"mask_file": str(tmp_path / "masks.txt"), "selection": "pruning_number", "pruning_number": 0.5},
        "clp": {"u": 0.5},
        **{name: {"batch_size": 4, "epochs": 1, "optimizer": {"name": "sgd", "lr": 0.1}} for name in TUNING},
        "kd": {"data": {"path": make_data(tmp_path / "data")}, "update": update},
        "ood": {"data": {"path": make_data(tmp_path / "data")}, "update": update},
        "cmi": {
            "synthesis": {"batch_size": 4, "iterations": 1, "latent_dim": 4, "width": 4}, "distillation_steps": 1,
            "update": update,
        },
        "zskt": {"attention": 0.0, "batch_size": 4, "pseudo_batches": 1, "student_steps": 1},
    }  # fmt: skip
    if method == "nc":
        more[method] |= {"search": {"epochs": 1}, "anomaly_threshold": 1e-3, "stamped_share": 0.5}
    options |= more[method]
    names = norm_names(model.net)
    write_mask_values(
        tmp_path / "masks.txt",
        [Neuron(n, c, (c % 2) * 1.0) for n in names for c in range(len(model.net.get_parameter(f"{n}.weight")))],
    )
    assert main(["run", str(make_experiment(tmp_path, method, options))]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    before, after = counted(suspect, test), counted(str(tmp_path / "run" / "model"), test)
    assert before["acc"] == pytest.approx(90) and after["acc"] != before["acc"]
    found = result["metrics"]
    assert (found["acc_before"], found["asr_before"]) == pytest.approx((before["acc"], before["asr"]))
    row = result["rows"][0]
    assert {key: 100 * row[key]["correct"] / row[key]["n"] for key in after} == pytest.approx(after)
    gain, loss = (max(0.0, before[key] - after[key]) / 100 for key in ("asr", "acc"))
    assert found["der"] == pytest.approx((gain - loss + 1) / 2)
    check_named(result, tmp_path / "run", method)
    if method == "nc":
        detected, (index, flagged) = result["rows"][1], (found["anomaly_index"], found["flagged_classes"])
        assert detected["score"] == index and detected["flags"] == "above" and detected["bound"] == 1e-3
        assert (detected["verdict"], detected["truth"]) == ("backdoored" if flagged else "clean", "backdoored")


@pytest.mark.parametrize("method", OF_ENCODERS)
def test_a_purified_encoder_is_measured_by_others_and_called_by_its_methods_name(method: str, tmp_path: Path) -> None:
    assert main(["run", str(make_experiment(tmp_path, method, options_of(method, tmp_path)))]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    card = load_simclr(tmp_path / "run" / "model")[1]
    assert (card.defended_by, card.provenance["method"], result["method"]) == (method, method, method)
    assert result["data"].keys() == {"defence"} and "rows" not in result


@pytest.mark.parametrize(("accuracy", "epochs"), [(0.25, 1), (0.2500001, 4)])
def test_unlearning_stops_at_an_accuracy_of_just_the_threshold(
    accuracy: float, epochs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published: running accuracy <= clean_threshold ends it, here after the first of 3 + 1 epochs."""
    monkeypatch.setattr(UnlearnStep, "read_accuracy", lambda self: accuracy)
    options = {
        "model": make_classifier(tmp_path / "model"), "data": {"path": make_data(tmp_path / "data")}, "ratio": 0.5,
        "test": {"path": make_data(tmp_path / "test", 9, seed=1)}, "batch_size": 12, "unlearning_epochs": 3,
        "recovering_epochs": 1, "clean_threshold": 0.25, "not_unlearned": "fail", "full_table": False,
    }  # fmt: skip
    status = main(["run", str(make_experiment(tmp_path, "rnp", options))])
    assert status == (0 if epochs == 1 else 2)
    assert [row["stage"] for row in metrics(tmp_path / "run")].count("unlearn") == epochs


def test_unlearning_that_reaches_the_threshold_in_its_last_epoch_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last epoch nothing asks whether to stop, so the end looks at the accuracy by itself."""
    accuracies = iter([0.5, 0.25])
    monkeypatch.setattr(UnlearnStep, "read_accuracy", lambda self: next(accuracies))
    options = {
        "model": make_classifier(tmp_path / "model"), "data": {"path": make_data(tmp_path / "data")}, "ratio": 0.5,
        "test": {"path": make_data(tmp_path / "test", 9, seed=1)}, "batch_size": 12, "unlearning_epochs": 2,
        "epochs_inclusive": False, "recovering_epochs": 1, "clean_threshold": 0.25, "not_unlearned": "fail",
        "full_table": False,
    }  # fmt: skip
    assert main(["run", str(make_experiment(tmp_path, "rnp", options))]) == 0
