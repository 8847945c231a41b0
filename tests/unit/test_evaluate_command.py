"""``dist-defend evaluate``: the counts of plain torch, for every way of naming an attack; its folder; its refusals."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dist_defend.attacks.attack import AttackConfig
from dist_defend.attacks.patterns import BadNets
from dist_defend.cli import main
from dist_defend.data.sources import ArraySource
from dist_defend.data.store import open_dataset, write_dataset
from dist_defend.models.artifact import load_classifier, save_artifact
from dist_defend.report.runs import find_runs
from tests.runs import CLASSES, SIZE, make_classifier, make_data, make_experiment, make_model

SQUARE = {"name": "badnets", "size": 6, "margin": 1}
N = 21


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A model folder without an attack and a test set, in a folder of its own to run in."""
    monkeypatch.chdir(tmp_path)
    return make_classifier(tmp_path / "net" / "model"), make_data(tmp_path / "test", N, seed=1)


def evaluate(model: str, data: str, *more: str) -> dict[str, Any]:
    """The result of the command."""
    out = f"out{len(list(Path.cwd().glob('out*')))}"
    assert main(["evaluate", model, "--data", data, "--out", out, *more]) == 0
    result: dict[str, Any] = json.loads((Path(out) / "result.json").read_text())
    return result


def row_of(result: dict[str, Any]) -> dict[str, tuple[int, int]]:
    (row,) = result["rows"]
    return {key: (row[key]["correct"], row[key]["n"]) for key in ("acc", "asr", "asr_all", "ra")}


def classes_of(model: str, images: np.ndarray) -> np.ndarray:
    net = load_classifier(model)[0].eval()
    with torch.no_grad():
        logits: torch.Tensor = net(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    return logits.argmax(1).numpy()


def expected(model: str, data: str, wanted: Any = 1) -> dict[str, tuple[int, int]]:
    """Counts of a white square of 6 px, one from the border; wanted: of a label."""
    test = open_dataset(data)
    images, labels = test.images(np.arange(len(test))), test.labels
    stamped = images.copy()
    stamped[:, SIZE - 7 : SIZE - 1, SIZE - 7 : SIZE - 1] = 255
    clean, triggered = classes_of(model, images), classes_of(model, stamped)
    wants = wanted(labels) if callable(wanted) else np.full(len(labels), wanted)
    others, hits = labels != wants, triggered == wants
    pairs = {"acc": (clean == labels, np.ones(N, bool)), "asr": (hits, others), "asr_all": (hits, np.ones(N, bool)),
             "ra": (triggered == labels, others)}  # fmt: skip
    return {key: (int((hit & among).sum()), int(among.sum())) for key, (hit, among) in pairs.items()}


def test_every_way_of_naming_the_attack_counts_the_same(places: tuple[str, str], tmp_path: Path) -> None:
    model, data = places
    section = {"trigger": SQUARE, "target_class": 1}
    poison = {"method": "classifier", "output": "x", "classifier": {"attack": section}}
    files = {"keys.yaml": section, "section.yaml": {"attack": section}, "experiment.yaml": poison,
             "defence.yaml": {"method": "ibau", "ibau": {"attack": section}}}  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(yaml.safe_dump(content))
    told = make_classifier(tmp_path / "told", attack=asdict(AttackConfig(BadNets(size=6, margin=1), target_class=1)))
    wanted = expected(model, data)
    assert 0 < wanted["acc"][1] == N and wanted["asr"][1] == N - N // CLASSES
    for attack in (*files, f"{told}/model.json", told):
        assert row_of(evaluate(model, data, "--attack", attack)) == wanted
    assert row_of(evaluate(told, data)) == wanted  # the same weights; its card names the attack
    assert row_of(evaluate(model, data))["asr"] == (0, 0)  # whose card names none


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"labels": "all_to_all", "shift": 2}, lambda labels: (labels + 2) % CLASSES),
        ({"labels": "clean_label", "target_class": 2}, 2),
    ],
)
def test_other_rules_for_labels(changes: dict[str, Any], wanted: Any, places: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "attack.yaml").write_text(yaml.safe_dump({"trigger": SQUARE, **changes}))
    assert row_of(evaluate(*places, "--attack", "attack.yaml")) == expected(*places, wanted)


def test_images_of_others(places: tuple[str, str], tmp_path: Path) -> None:
    """Each image with noise and a wanted class of its own, as an npz and as a prepared set."""
    model, data = places
    x = np.random.default_rng(3).integers(0, 256, (10, SIZE, SIZE, 3)).astype(np.uint8)
    y = np.arange(10) % CLASSES
    y_bd = np.where(y == 2, 0, 2)
    np.savez(tmp_path / "bd_test.npz", x=x, y=y, y_bd=y_bd)
    found = classes_of(model, x)
    row = row_of(evaluate(model, data, "--triggered", "bd_test.npz"))
    assert row["asr"] == row["asr_all"] == (int((found == y_bd).sum()), 10)
    assert row["ra"] == (int((found == y).sum()), 10) and row["acc"] == expected(model, data)["acc"]

    names = open_dataset(data).classes
    write_dataset(ArraySource(x, y, names), tmp_path / "bd", name="bd", split="test", storage="npy")
    row = row_of(evaluate(model, data, "--triggered", "bd", "--target-class", "2"))
    assert row["asr"] == (int((found == 2)[y != 2].sum()), 7) and row["asr_all"] == (int((found == 2).sum()), 10)


def test_what_it_writes(places: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = places
    net, card = load_classifier(model)
    sha256 = save_artifact(model, net, replace(card, backdoored=True, guessed=("normalization", "image_size")))
    (tmp_path / "attack.yaml").write_text(yaml.safe_dump({"trigger": SQUARE, "target_class": 1}))
    assert main(["evaluate", model, "--data", data, "--attack", "attack.yaml", "--seed", "3", "--batch-size", "4"]) == 0
    out, err = capsys.readouterr()
    (folder,) = (tmp_path / "runs/evaluate").iterdir()
    assert folder.name.startswith("net-") and f"{folder.relative_to(tmp_path)}/result.json" in out
    result = json.loads((folder / "result.json").read_text())
    assert (result["method"], result["seed"], result["model_sha256"]) == ("evaluate", 3, sha256)
    assert result["data"] == {"test": open_dataset(data).digest} and result["targets"] == {"noise": "class 1"}
    assert result["rows"][0]["kind"] == "backdoored" and result["rows"][0]["seed"] == 3
    assert sum(count["n"] for count in result["metrics"]["per_class_accuracy"].values()) == N
    for name, (correct, n) in expected(model, data).items():
        assert f"{name:<8}{100 * correct / n:6.1f} %  {correct:7d} of {n}\n" in out
    guesses = f"{model}: its source did not tell normalization none, image_size 16, so import guessed"
    assert err.count(guesses) == 1 and sum(note.startswith(guesses) for note in result["notes"]) == 1
    with Image.open(folder / "trigger.png") as picture:  # 8 lines of an image, the same triggered, the difference
        assert picture.size == (190 + 3 * 76, 8 * 76 + 4)
    (run,), unfinished, _ = find_runs([tmp_path / "runs"])
    assert [{"run": run.path.name} | row for row in run.rows] == result["rows"] and not unfinished
    clean, stamped = run.examples["noise/clean"], run.examples["noise/triggered"]
    assert (stamped[:, 9:15, 9:15] == 255).all() and np.array_equal(stamped[:, :9], clean[:, :9])

    assert main(["evaluate", model, "--data", data, "--attack", "attack.yaml", "--seed", "3", "--batch-size", "4"]) == 0
    assert main(["evaluate", model, "--data", data]) == 0  # another evaluation has a folder of its own
    assert len(list((tmp_path / "runs/evaluate").iterdir())) == 2
    assert main(["report", "runs", "--out", "report"]) == 0


def test_its_counts_are_those_of_a_run(places: tuple[str, str], tmp_path: Path) -> None:
    _, data = places
    options = {
        "data": {"path": make_data(tmp_path / "data")},
        "test": {"path": data},
        "arch": "small_resnet",
        "normalization": "none",
        "augment": {"crop": "none"},
        "attack": {"trigger": SQUARE, "target_class": 1},
        "update": {"batch_size": 8, "epochs": 2},
    }
    assert main(["run", str(make_experiment(tmp_path, "classifier", options))]) == 0
    run = json.loads((tmp_path / "run/result.json").read_text())
    found = evaluate(str(tmp_path / "run/model"), data)
    assert row_of(found) == row_of(run) and found["targets"] == run["targets"]
    assert found["metrics"]["per_class_accuracy"] == run["metrics"]["per_class_accuracy"]


def test_a_model_that_is_mostly_wrong_is_told_of(places: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    model, data = places
    net, card = load_classifier(model)
    with torch.no_grad():
        net.get_parameter("net.linear.weight").zero_()
    save_artifact(model, net, card)
    evaluate(model, data)
    assert f"{model} gets only 7 of 21 clean images of {data} right (33.3 %, chance 33.3 %)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--target-class", "1"], "--target-class is a class number, 0 or more, and goes with --triggered"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--attack", "none.yaml"], "none.yaml: cannot read the configuration"),
        (["--attack", "empty.yaml"], "empty.yaml has no attack: give the keys trigger (or images)"),
        (["--attack", "typo.yaml"], "typo.yaml: key 'attack.trigger.name' is 'badnet'; did you mean 'badnets'?"),
        (["--attack", "MODEL"], "model.json names no attack"),
        (["--attack", "far.yaml"], "key 'attack.target_class' is 3; the classes are 0 to 2"),
        (["--triggered", "none.npz"], "none.npz"),
        (["--data", "test/nowhere"], "test/nowhere: not a prepared data set"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str], told: str, places: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = places
    (tmp_path / "empty.yaml").write_text("method: ibau\nibau: {model: x}\n")
    (tmp_path / "typo.yaml").write_text("attack: {trigger: {name: badnet}}\n")
    (tmp_path / "far.yaml").write_text("trigger: {name: badnets}\ntarget_class: 3\n")
    given = [model if argument == "MODEL" else argument for argument in arguments]
    assert main(["evaluate", model, "--data", data, *given]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and told in error
    assert not (tmp_path / "runs").exists()


def test_an_encoder_is_refused_with_the_way_to_measure_it(
    places: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", make_model(tmp_path / "encoder"), "--data", places[1]]) == 2
    assert "not a classifier: " in (error := capsys.readouterr().err) and "method 'probe'" in error


def test_a_folder_of_another_evaluation_is_kept(
    places: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = places
    assert main(["evaluate", model, "--data", data, "--out", "mine"]) == 0
    before = (tmp_path / "mine/result.json").read_bytes()
    assert main(["evaluate", model, "--data", data, "--out", "mine", "--seed", "1"]) == 2
    assert "holds another experiment: key 'seed' is 100 there and 1 here" in capsys.readouterr().err
    assert (tmp_path / "mine/result.json").read_bytes() == before
